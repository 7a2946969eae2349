"""Evaluation through a running server: perplexity, needle and samples of any OpenAI-compatible one.

A server tells the log-probability of a prompt's tokens (`echo`), so the same rows that a sweep reads can be
read through it, and the two held against each other. Of the rest of the distribution it tells nothing or a
few tokens: so there is no KL here. Leaves out speed, and servers that do not tell a prompt's log-probabilities.
"""

from .client import Server
from .scores import read, score, swept, writer

__all__ = ["Server", "read", "score", "swept", "writer"]
