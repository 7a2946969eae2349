"""What is to be known of every expert before one is dropped: one sweep of text, or the weights alone.

sweep.py streams text through the layers, sums.py adds up what each expert did, statistics.py holds all
of it for criteria and guards, weights.py looks at weights without any text. criteria/ has one score a file,
selection.py is which experts stay by it, and until_stable.py how much text the choice takes.
"""

from .statistics import Statistics, check_domains, check_unread
from .sums import SUMS, LayerSums
from .sweep import CHUNK_TOKENS, calibrate, chunks, groups
from .weights import WEIGHTS, weigh

__all__ = [
    "CHUNK_TOKENS", "SUMS", "WEIGHTS", "LayerSums", "Statistics", "calibrate", "check_domains", "check_unread", "chunks",
    "groups", "weigh",
]  # fmt: skip
