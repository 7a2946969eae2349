"""Harm in nats: what options cost alone, what plans cost whole, and the rule that leads from one to the other.

branch.py is models that differ from the source in some units; branches.py runs any number of them in one sweep, and kl.py
is their KL; prices.py asks for every option alone; surrogate.py has their prices from one sweep backward (slopes.py)
instead; anchored.py measures a few and puts the rest between them; trace.py has another tool's, to compare;
composition.py fits the rule; preview.py compares cuts. divergence/ is how far one model is from another.
"""

from .anchored import anchored
from .branch import Branch, Effort, Trial, affordable_tokens, effort, some_rows
from .branches import Figures, Measured, measure, run_branches
from .composition import Rule
from .prices import ANCHORED, MEASURED, SURROGATE, TRACE, Options, Price, Prices, default_counts, offers, price
from .slopes import reverse_work
from .surrogate import Sensed, sense, surrogate
from .trace import trace

__all__ = [
    "ANCHORED",
    "MEASURED",
    "SURROGATE",
    "TRACE",
    "Branch",
    "Effort",
    "Figures",
    "Measured",
    "Options",
    "Price",
    "Prices",
    "Rule",
    "Sensed",
    "Trial",
    "affordable_tokens",
    "anchored",
    "default_counts",
    "effort",
    "measure",
    "offers",
    "price",
    "reverse_work",
    "run_branches",
    "sense",
    "some_rows",
    "surrogate",
    "trace",
]
