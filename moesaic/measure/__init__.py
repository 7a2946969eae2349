"""Harm in nats: what options cost alone, what plans cost whole, and the rule that leads from one to the other.

branch.py is models that differ from the source in some units; ride.py runs any number of them in one sweep; excess.py is
their KL;
prices.py asks for every option alone; surrogate.py has their prices from one sweep backward (reverse.py) instead;
anchor.py measures a few and puts the rest between them; trace.py has another tool's, to compare; composition.py fits the rule.
"""

from .anchored import anchored
from .branch import Branch, Effort, Trial, affordable_tokens, effort, some_rows
from .branches import Figures, Measured, measure, ridden
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
    "ridden",
    "sense",
    "some_rows",
    "surrogate",
    "trace",
]
