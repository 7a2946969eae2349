"""Tasks of lm-evaluation-harness over models that stream: every log-likelihood request of every task in one sweep.

The harness is asked twice. First its questions are only written down (`ask`): they become readings, which
ride the same sweep as everything else, for source and export at once. Then it gets its answers from what
the sweep left (`mark`), and does its own scoring. Leaves out tasks that generate: a token would cost a sweep.
"""

from .asked import Asked, ask
from .marks import mark

__all__ = ["Asked", "ask", "mark"]
