"""How far one model is from another: KL in nats, perplexity of both, agreement, each with its error.

comparison.py compares distributions token by token; lockstep.py takes two models through their layers
to get there, branches.py takes many variants of one; bootstrap.py turns tokens into figures with errors.
loops.py looks at a text that was generated.
"""

from .bootstrap import Bootstrap, Estimate
from .branches import against
from .comparison import FIELDS, Comparison, Divergence
from .lockstep import Lockstep, lockstep
from .loops import Looped, looped

__all__ = [
    "FIELDS",
    "Bootstrap",
    "Comparison",
    "Divergence",
    "Estimate",
    "Lockstep",
    "Looped",
    "against",
    "lockstep",
    "looped",
]
