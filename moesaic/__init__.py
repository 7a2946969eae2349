"""moesaic: make a giant mixture-of-experts model fit the machine you have, and prove what that cost.

The house, floor by floor: a module imports only from floors below its own, and the order is also
the order of reading (tests/test_floors.py holds it).
"""

__version__ = "0.1.0"

FLOORS = (
    "errors",
    "files",
    "registry",
    "artifact",
    "lock",
    "progress",
    "resources",
    "formats",
    "kernels",
    "families",
    "rounding",
    "checkpoint",
    "plan",
    "data",
    "stream",
    "generate",
    "calibrate",
    "measure",
    "fit",
    "allocate",
    "export",
    "verify",
    "evaluate",
    "serve",
    "report",
    "recipes",
    "cli",
    "__main__",
)
