"""Scores, one file each, of what one sweep of source and export found. `EVALUATIONS["kld"]` is scores/kld.py."""

from ...registry import collect
from .base import Evaluation, Reading, Score, Scores, Scoring

__all__ = ["EVALUATIONS", "Evaluation", "Reading", "Score", "Scores", "Scoring"]

EVALUATIONS = collect(__name__, Evaluation)
