"""The memory that a sweep needs, however little it holds at once: below that a command is refused before it begins."""

import torch

from ..checkpoint import Checkpoint
from .memory import standard_block_bytes

STATE_COPIES = (
    5  # F32 tensors [T, D] of a state in a layer: before, after, normed, the experts' sum, and the shared expert's
)


def needed_bytes(checkpoint: Checkpoint, tokens: int, states: int = 1) -> int:
    """One block; the largest of one layer's attention, its dense or shared MLP, and two experts; `states` of so many tokens."""
    a, sizes = checkpoint.architecture, dict[tuple[int, str, int | None], int]()
    for n in a.linears:
        role = "attention" if n.role in ("qkv", "o") else n.role
        sizes[n.layer, role, n.expert] = sizes.get((n.layer, role, n.expert), 0) + 4 * n.elements
    weights = max((1 if expert is None else 2) * total for (_, _, expert), total in sizes.items())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return standard_block_bytes(device) + weights + states * STATE_COPIES * 4 * tokens * a.hidden
