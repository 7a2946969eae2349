"""Pruning criteria, one file each. `CRITERIA["reap"]` is criteria/reap.py."""

from ...registry import collect
from .base import POLICIES, WEIGHT_SUMS, Criterion, Cut, Totals, combine, cut

CRITERIA = collect(__name__, Criterion)

__all__ = ["CRITERIA", "POLICIES", "WEIGHT_SUMS", "Criterion", "Cut", "Totals", "combine", "cut"]
