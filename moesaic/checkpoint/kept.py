"""Which experts of its base a pruned model kept, told by its router's rows alone.

Leaves out whether they are still the base's experts (verify).
"""

from collections.abc import Mapping, Sequence

import torch

from ..errors import CheckpointError, InputError
from .open import Checkpoint

SAME_ROW = 0.999  # cosine; rows of different experts are far below, rows rounded to BF16 far above
Kept = Mapping[int, Sequence[int]]  # MoE layer -> ids in the base, by id in the other


def kept_of(pruned: Checkpoint, base: Checkpoint) -> dict[int, list[int]]:
    """Which of the base's experts a pruned model kept, found by its router rows: no calibration, no note needed.

    Raises `CheckpointError` when a row resembles none of the base's: then it is no relative of it.
    """
    a, b = pruned.architecture, base.architecture
    if (a.family, a.moe_layers, a.hidden) != (b.family, b.moe_layers, b.hidden):
        raise InputError(
            f"{pruned.path} and {base.path} have different families, layers or widths; name the base it was made from"
        )
    found = {}
    for layer in a.moe_layers:
        mine, theirs = (
            torch.nn.functional.normalize(c.read(c.architecture.routers[layer].weight).double(), dim=1)
            for c in (pruned, base)
        )
        cosine, ids = (mine @ theirs.T).max(1)
        if float(cosine.min()) < SAME_ROW or len(set(ids.tolist())) != len(ids):
            worst = int(cosine.argmin())
            raise CheckpointError(
                f"router row {worst} of layer {layer} in {pruned.path} resembles none of {base.path} "
                f"(cosine {float(cosine[worst]):.3f}); it was not made from that model"
            )
        found[layer] = ids.tolist()
    return found
