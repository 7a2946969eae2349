"""How far one model is from another: KL in nats, perplexity of both, agreement, each with its error.

comparison.py compares distributions token by token, routing.py where tokens go; lockstep.py takes models
through their layers to get there, branches.py takes many variants of one; activations.py is what an
engine does besides; bootstrap.py turns tokens into figures with errors.
"""

from .activations import WAYS, intakes
from .bootstrap import Bootstrap, Estimate
from .boundary import Known
from .branches import against
from .comparison import FIELDS, Comparison, Divergence
from .lockstep import Contender, Lockstep, Rows, lockstep

__all__ = [
    "FIELDS",
    "WAYS",
    "Bootstrap",
    "Comparison",
    "Contender",
    "Divergence",
    "Estimate",
    "Known",
    "Lockstep",
    "Rows",
    "against",
    "intakes",
    "lockstep",
]
