"""Short questions answered by source and export, side by side: arithmetic, code, SQL, a tool call, other languages; and loops.

Averages over text do not show a model that no longer stops or can no longer call a tool. Answers are
generated greedily, held against what a right one has to contain, and shown whole, for people to read;
longer ones, drawn at two temperatures, are looked through for loops. Leaves out judging style.
"""

from .prompts import PROBES, PROMPTS, Prompt
from .writing import SEED, Writer, compare, judge, local

__all__ = ["PROBES", "PROMPTS", "SEED", "Prompt", "Writer", "compare", "judge", "local"]
