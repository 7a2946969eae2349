"""MLX: what mlx-lm reads on Apple machines, written without mlx. A mode, a width and a group for each module.

A layer's experts lie stacked, one tensor [experts, out, …] for each projection, so a projection has one format over
all experts of a layer, while gate, up and down may differ. Codes are streams of bits in uint32 words, which for
MXFP4 and MXFP8 are the very bytes that other containers hold. NVFP4 knows its second scale for stacked experts
alone, as the largest weight where the format stores the divisor 2688 / largest. The small tensors keep their names,
and routers their F32; the vision tower goes along, and mlx-lm leaves it unread. Leaves out what MLX would convert itself.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, PlanError
from ...families import Architecture, Linear
from ...formats import FORMATS, Scales
from .base import Container, Packing, Part, Place, check_loadable, compare, stream_bytes, table
from .unquantized import BF16

PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
LARGEST = 448.0 * 6.0  # NVFP4's divisor times the largest weight of the matrix


def parts(shape: Sequence[int], *, format: str, scale_dtype: str) -> dict[str, Part]:
    (rows, columns), number = shape, FORMATS[format]
    grid = number.grid(shape)
    found = {
        "codes": Part("weight", "U32", (rows, stream_bytes(columns, number.element_bits, 4) // 4)),
        "blocks": Part("scales", scale_dtype, grid),
    }
    if format.startswith("affine"):
        found["offsets"] = Part("biases", "BF16", grid)
    if number.share is not None:
        found["shared"] = Part("global_scale", "F32", ())
    return found


def write(stream_OS: Tensor, scales: Scales, shape: Sequence[int]) -> dict[str, Tensor]:
    assert scales.blocks is not None
    stored = {"codes": stream_OS.view(torch.uint32), "blocks": scales.blocks}
    if scales.offsets is not None:
        stored["offsets"] = scales.offsets
    if scales.shared is not None:
        stored |= {"blocks": scales.blocks.view(torch.uint8), "shared": largest(scales.shared).reshape(())}
    return stored


def read(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
    stream_OS = stored["codes"].view(torch.uint8)
    if "shared" in stored:
        return stream_OS, Scales(stored["blocks"].view(torch.float8_e4m3fn), (LARGEST / stored["shared"]).reshape(1))
    return stream_OS, Scales(stored["blocks"], offsets=stored.get("offsets"))


def largest(divisor: Tensor) -> Tensor:
    """The F32 that 2688 has to be divided by to get this very divisor, which division alone misses by a last bit."""
    near = LARGEST / divisor
    for candidate in (near, near.nextafter(near.new_tensor(torch.inf)), near.nextafter(near.new_tensor(0.0))):
        if torch.equal(LARGEST / candidate, divisor):
            return candidate
    return near


def packing(format: str, scale_dtype: str, layout: str) -> Packing:
    return Packing(
        format,
        layout,
        partial(parts, format=format, scale_dtype=scale_dtype),
        write,
        read,
        word=4,
    )


MODES = {  # format -> (mode, bits, group size)
    "mxfp4": ("mxfp4", 4, 32),
    "mxfp8": ("mxfp8", 8, 32),
    "nvfp4": ("nvfp4", 4, 16),
    **{f"affine{bits}_g{group}": ("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)},
}
PACKINGS = {
    "mxfp4": packing("mxfp4", "U8", "e2m1 nibbles + e8m0 1x32"),
    "mxfp8": packing("mxfp8", "U8", "e4m3 + e8m0 1x32"),
    "nvfp4": packing("nvfp4", "U8", "e2m1 nibbles + e4m3 1x16 + f32 largest"),
    **{format: packing(format, "BF16", f"{format} u32 stream") for format in MODES if format.startswith("affine")},
    "bf16": BF16,
}


def place(architecture: Architecture, linear: Linear) -> Place:
    if linear.expert is None:
        return Place(linear.name)
    block = linear.name.rsplit(".experts.", 1)[0]
    return Place(f"{block}.switch_mlp.{PROJECTIONS[linear.projection]}", linear.expert, architecture.experts)


def config(architecture: Architecture, formats: Mapping[str, str], source: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization map, by every module's path.

    Raises `PlanError` for experts of one layer whose formats differ within a projection, rows that are not whole
    groups, NVFP4 outside the experts, and what the family says mlx-lm would not load. The default is the commonest
    format; a model of BF16 alone has one too, which nothing follows, so that its map says that experts are stacked.
    """
    chosen: dict[str, str] = {}
    weights: Counter[str] = Counter()
    for linear in architecture.linears:
        module, format = place(architecture, linear).module, formats[linear.name]
        if chosen.setdefault(module, format) != format:
            raise PlanError(f"{module} would stack experts in {chosen[module]} and {format}; give them one format")
        check(linear, format)
        weights[format] += linear.elements
    weights.pop("bf16", None)
    common = max(weights, key=weights.__getitem__, default="affine4_g64")
    small = [t.name.removesuffix(".weight") for t in architecture.tensors if t.role in ("embedding", "head", "router")]
    return {
        **described(common),
        **dict.fromkeys(small, False),
        **{module: entry(format) for module, format in chosen.items()},
    }


def described(format: str) -> dict[str, Any]:
    mode, bits, group = MODES[format]
    return {"group_size": group, "bits": bits, "mode": mode}


def entry(format: str) -> dict[str, Any] | bool:
    """What the map says of a module: where a second scale lies beside the first, that has to be said as well."""
    if format == "bf16":
        return False
    return described(format) | ({"global_scale": True} if FORMATS[format].share else {})


def check(linear: Linear, format: str) -> None:
    """Refuse what mlx-lm would not load. Raises `PlanError`."""
    check_loadable("mlx", linear.unit, (linear,), format)
    if format == "bf16":
        return
    _, _, group = MODES[format]
    if linear.shape[1] % group:
        raise PlanError(
            f"{linear.unit} has rows of {linear.shape[1]} weights, which are not whole groups of {format}'s {group}; "
            "give it a format of smaller groups, or bf16"
        )
    if format == "nvfp4" and linear.expert is None:
        raise PlanError(
            f"{linear.unit} holds no routed experts, and MLX has NVFP4's second scale for those alone; give it mxfp4"
        )


def formats(architecture: Architecture, config: Mapping[str, Any], names: frozenset[str] | None) -> dict[str, str]:
    """The format of every linear, by the map; of a module that it leaves out, the default, if there are scales on disk.

    Raises `CheckpointError` for a mode that is not supported, and where the tensors are not those of the format.
    """
    quantization = table(config, "quantization")
    found: dict[str, str] = {}
    by_module: dict[str, str] = {}
    for linear in architecture.linears:
        module = place(architecture, linear).module
        if module not in by_module:
            absent = names is None or f"{module}.scales" in names
            by_module[module] = format_of(module, quantization, quantization.get(module, absent))
        found[linear.name] = by_module[module]
    if names is not None:
        compare(PACKINGS, architecture, found, names, place)
    return found


def format_of(module: str, default: Mapping[str, Any], said: Mapping[str, Any] | bool) -> str:
    """The format that the map gives a module. Raises `CheckpointError`."""
    if said is False:
        return "bf16"
    said = {**default, **(said if isinstance(said, Mapping) else {})}
    wanted = (said.get("mode", "affine"), said.get("bits"), said.get("group_size"))
    format = next((f for f, mode in MODES.items() if mode == wanted), None)
    if format is None:
        raise CheckpointError(f"config.json has {module} as {wanted}; moesaic reads {', '.join(MODES)}")
    return format


MLX = Container(
    name="mlx", quant_method="mlx", packings=PACKINGS, formats=formats, config=config, reference="https://github.com/ml-explore/mlx-lm",
    place=place, keys=("quantization", "quantization_config"), expert_parallel=False,
)  # fmt: skip
