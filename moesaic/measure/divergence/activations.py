"""What an engine does to activations on their way into a matrix: nothing, or a rounding of its own for each token.

    none    left as they are computed
    engine  as the export's config.json asks: FP8 by token or by 128 of a token, MXFP8, INT8, NVFP4 where it says so
    w4a4    besides, inputs of 4-bit floats rounded to that same 4-bit format, as engines with such kernels can

Rounding is by the formats' own `fit`, `round` and `value`, the values of one token that share a scale
being a block. NVFP4's second level is the one that the export carries (`nvfp4_a4`), or else found for each
token. Leaves out other static scales; INT8's scale is a BF16 here, as for weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...checkpoint.containers.base import table
from ...checkpoint.containers.compressed_tensors import format_of
from ...errors import InputError
from ...families import Linear
from ...formats import NAMES, activations_of, weights_of
from ...stream import Intake

WAYS = ("none", "engine", "w4a4")
FOUR_BITS = {n for n in NAMES if weights_of(n).element_bits == 4 and activations_of(n).token_group is not None}
RELEASED = ("fp8", "mxfp8")  # containers of the sources, whose one format rounds activations in every engine


def intakes(checkpoint: Checkpoint, way: str) -> dict[str, Intake]:
    """Unit -> how its inputs are rounded; units whose inputs are not rounded are left out.

    Raises `InputError` for an unknown one.
    """
    if way not in WAYS:
        raise InputError(f"unknown rounding of activations {way!r}; choose from {', '.join(WAYS)}")
    formats = set() if way == "none" else declared(checkpoint)
    if way == "w4a4":
        formats |= FOUR_BITS
    found: dict[str, Intake] = {}
    for unit, members in checkpoint.architecture.units.items():
        name = checkpoint.formats[members[0].name]
        if name in formats:
            found[unit] = partial(taken_in, name, divisors(checkpoint, members))
    return found


def divisors(checkpoint: Checkpoint, members: Sequence[Linear]) -> dict[str, Tensor]:
    """Projection -> the second level of its inputs, where the export carries one; the same for all experts of a layer."""
    found = {}
    for linear in members:
        if linear.projection not in found and "inputs" in (where := checkpoint.located(linear)):
            found[linear.projection] = checkpoint.read(where["inputs"].info.name).flatten()[:1]
    return found


def taken_in(name: str, divisors: Mapping[str, Tensor], x_nI: Tensor, projection: str) -> Tensor:
    return rounded(name, x_nI, divisors.get(projection))


def declared(checkpoint: Checkpoint) -> set[str]:
    """Formats whose inputs an engine rounds, by what config.json says."""
    if checkpoint.container.name in RELEASED:
        return rounds(checkpoint.formats.values())
    if checkpoint.container.name != "compressed_tensors":
        return set()
    quantization = checkpoint.config["quantization_config"]
    groups = table(quantization, "config_groups")
    of = [table(groups, name) for name in groups]
    return rounds(format_of(group, quantization) for group in of if group.get("input_activations"))


def rounds(names: Iterable[str]) -> set[str]:
    """Those of these formats that engines round activations to."""
    return {name for name in names if activations_of(name).token_group is not None}


def rounded(name: str, x_nI: Tensor, shared: Tensor | None = None) -> Tensor:
    """Each token of `x_nI` in the format of that name, in groups of its own; what is not finite stays as it is.

    shared  the second level for all tokens [1]; by itself each token has its own
    """
    format, (tokens, width) = activations_of(name), x_nI.shape
    assert format.token_group is not None
    group = format.token_group or width
    blocks = torch.nn.functional.pad(x_nI.float(), (0, -width % group)).reshape(tokens, -1, group)
    if shared is not None:
        shared = shared.to(x_nI.device)
    elif format.share is not None:
        shared = format.share(blocks.abs().amax((1, 2)))[:, None]
    steps = [s.unsqueeze(-1) for s in format.steps(format.fit(blocks, shared))]
    near = format.value(format.round(blocks, *steps), *steps).reshape(tokens, -1)[:, :width]
    return near.to(x_nI.dtype).where(x_nI.isfinite(), x_nI)


def told(checkpoint: Checkpoint, way: str) -> str:
    """In words, which inputs are rounded to what."""
    units = checkpoint.architecture.units
    names = sorted({(units[u][0].role, checkpoint.formats[units[u][0].name]) for u in intakes(checkpoint, way)})
    return ", ".join(f"{role} to {name}" for role, name in names) or "not rounded"
