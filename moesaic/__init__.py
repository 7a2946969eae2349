"""moesaic: make a giant mixture-of-experts model fit the machine you have, and prove what that cost.

The house, floor by floor: a module imports only from floors below its own, and the order is also
the order of reading (tests/test_floors.py holds it).
"""

__version__ = "0.1.0"

FLOORS = (
    ("errors",),
    ("files",),
    ("utf8",),
    ("registry", "artifact", "conversations", "progress", "verdict"),
    ("formats", "plan", "resources", "overlay", "digests", "criteria", "rope", "stated", "documents", "tokenizer"),
    ("kernels", "families", "recode", "texts"),
    ("containers", "rounding"),
    ("damage",),
    ("checkpoint", "tokens"),
    ("corpus", "stream", "shards", "target", "reader"),
    ("images", "calibrate", "activations", "divergence", "generate"),
    ("measure", "allocate", "render"),
    ("fit", "export"),
    ("verify", "evaluate", "inspect"),
    ("select", "serve", "make", "tasks", "spots"),
    ("report", "served"),
    ("preview", "settle", "loops", "candidates", "repair"),
    ("compress", "prune", "quantize", "convert"),
    ("demo",),
    ("cli",),
)
