"""What a criterion may read of experts' weights alone: sums over each expert's three matrices, and no text.

Every expert is decoded once, one at a time: as fast as the disk, or as one core decodes.
"""

from pathlib import Path

import numpy as np
import torch

from ..artifact import read_tensors, sweep_partials, write_tensors
from ..checkpoint import Checkpoint
from ..progress import progress
from ..stream.memory import ahead
from .criteria.base import WEIGHT_SUMS
from .statistics import VERSION, layer_file

KIND = "weight-sums"
WEIGHTS = "weights"  # folder beside the statistics of texts


def weigh(checkpoint: Checkpoint, folder: Path, quiet: bool = False) -> dict[str, np.ndarray]:
    """Σ|w|, Σw² and how many weights, float64 [L, E] over MoE layers and experts; a file a layer stays in `folder`.

    Interrupted, the same call goes on at the layer it had reached. Raises `CheckpointError` for weights that
    are NaN or infinite.
    """
    a, inputs = checkpoint.architecture, {"source": checkpoint.identity, "statistics": VERSION}
    sweep_partials(folder)
    with progress("weigh experts", len(a.moe_layers) * a.experts, "experts", quiet) as meter:
        for layer in a.moe_layers:
            if not layer_file(folder, layer).exists():
                sums_SE = torch.stack([of_expert(checkpoint, layer, e) for e in range(a.experts)], 1)
                write_tensors(layer_file(folder, layer), KIND, dict(zip(WEIGHT_SUMS, sums_SE)), inputs)
            meter.advance(a.experts)
    found = [read_tensors(layer_file(folder, layer), KIND, inputs)[0] for layer in a.moe_layers]
    return {name: np.stack([tensors[name].numpy() for tensors in found]) for name in WEIGHT_SUMS}


def of_expert(checkpoint: Checkpoint, layer: int, expert: int) -> torch.Tensor:
    """`WEIGHT_SUMS` of one expert, float64."""
    linears = checkpoint.architecture.experts_of[layer, expert].values()
    sums_S = torch.zeros(len(WEIGHT_SUMS), dtype=torch.float64)
    for linear, parts in ahead(checkpoint.parts, linears):
        w_OI = checkpoint.value(linear, parts)
        count = torch.tensor(w_OI.numel(), dtype=torch.float64)
        sums_S += torch.stack([w_OI.abs().sum(dtype=torch.float64), w_OI.square_().sum(dtype=torch.float64), count])
    return sums_S
