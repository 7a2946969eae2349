"""What is decided, and what that makes of a source before anything is written.

plan.py is the decision, blueprint.py the model that it describes, pieces.py the folder that it will be, overlay.py the
tensors that come from elsewhere. Leaves out how a plan is found (allocate) and carried out (export).
"""

from .plan import DROP, KEEP, SOURCE, Plan, dropped

__all__ = ["DROP", "KEEP", "SOURCE", "Plan", "dropped"]
