"""compressed-tensors: what vLLM, SGLang and transformers read, with a format for each fused matrix of a model.

A config group says how weights lie and names modules by regular expression. The names are a trap,
because nobody means those on disk: vLLM matches its own (`mlp.experts.0.w1` where M2's disk says
`block_sparse_moe`, `experts.0.gate_proj` where M3's says `w1`), asks for expert 0 alone, and leaves a layer
unquantized, with garbage in it, where nothing matches. transformers matches a third set (`gate_up_proj`), and
takes the first group that says "experts" for the one of all experts. So each target lists every name that
a module goes by, expert groups come first, and no other target says "experts".

Activations: 4-bit and integer weights are declared weight-only, FP8 and MXFP8 with activations rounded as they
come, as the sources are served. (vLLM's MXFP4 kernels for Blackwell round activations whatever is declared.)
`nvfp4_a4` rounds them to NVFP4 under a calibrated divisor, `input_global_scale`. Leaves out zero points.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, PlanError
from ...families import FAMILIES, Architecture, Linear
from ...formats import FORMATS, Scales, weights_of
from .base import (
    Container,
    Packing,
    Part,
    Read,
    Write,
    check_loadable,
    compare,
    entries,
    siblings,
    stream_bytes,
    table,
)
from .fp8 import FP8_BLOCK, read_e4m3, write_e4m3
from .mxfp8 import MXFP8_PACKING
from .names import expression, firsts, modules, small_modules
from .unquantized import BF16

Parts = dict[str, Part]


# What lies on disk -----------------------------------------------------------------------------------------------


def nibble_parts(shape: Sequence[int], *, format: str, scale_dtype: str) -> Parts:
    parts = {
        "codes": Part("weight_packed", "U8", (shape[0], stream_bytes(shape[1], 4))),
        "blocks": Part("weight_scale", scale_dtype, FORMATS[format].grid(shape)),
    }
    return parts | ({"shared": Part("weight_global_scale", "F32", (1,))} if FORMATS[format].share else {})


def write_nibbles(stream_OS: Tensor, scales: Scales, shape: Sequence[int]) -> dict[str, Tensor]:
    assert scales.blocks is not None
    stored = {"codes": stream_OS, "blocks": scales.blocks}
    return stored | ({} if scales.shared is None else {"shared": scales.shared})


def read_nibbles(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
    return stored["codes"], Scales(stored["blocks"], stored.get("shared"))


def integer_parts(shape: Sequence[int], *, format: str, bits: int) -> Parts:
    return {
        "codes": Part("weight_packed", "I32", (shape[0], stream_bytes(shape[1], bits, 4) // 4)),
        "blocks": Part("weight_scale", "BF16", FORMATS[format].grid(shape)),
        "shape": Part("weight_shape", "I64", (2,)),
    }


def write_integers(stream_OS: Tensor, scales: Scales, shape: Sequence[int]) -> dict[str, Tensor]:
    assert scales.blocks is not None
    return {"codes": stream_OS.view(torch.int32), "blocks": scales.blocks, "shape": torch.tensor(shape)}


def read_integers(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
    """Raises `CheckpointError` when `weight_shape`, which transformers believes, is not the matrix's."""
    if (said := stored["shape"].tolist()) != list(shape):
        raise CheckpointError(f"weight_shape says {said} of a matrix {list(shape)}; export it again")
    return stored["codes"].view(torch.uint8), Scales(stored["blocks"])


def channel_parts(shape: Sequence[int], *, code_dtype: str, scale_dtype: str) -> Parts:
    return {
        "codes": Part("weight", code_dtype, tuple(shape)),
        "blocks": Part("weight_scale", scale_dtype, (shape[0], 1)),
    }


def write_int8(stream_OS: Tensor, scales: Scales, shape: Sequence[int]) -> dict[str, Tensor]:
    """int8_channel: q itself, where a code is q + 128."""
    assert scales.blocks is not None
    return {"codes": (stream_OS ^ 0x80).view(torch.int8), "blocks": scales.blocks}


def read_int8(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
    return stored["codes"].view(torch.uint8) ^ 0x80, Scales(stored["blocks"])


def renamed(packing: Packing) -> Packing:
    """A source's packing under this container's name for scales; the bytes stay."""

    def parts(shape: Sequence[int]) -> Parts:
        source = packing.parts(shape)
        return source | {"blocks": replace(source["blocks"], suffix="weight_scale")}

    return replace(packing, parts=parts)


def channel(format: str, codes: str, scales: str, write: Write, read: Read) -> Packing:
    parts = partial(channel_parts, code_dtype=codes, scale_dtype=scales)
    return Packing(format, f"{codes} + {scales} of a row", parts, write, read)


def rounded_inputs(packing: Packing) -> Packing:
    """With the divisor of the vectors that a matrix multiplies beside it."""

    def parts(shape: Sequence[int]) -> Parts:
        return packing.parts(shape) | {"inputs": Part("input_global_scale", "F32", (1,))}

    def read(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
        """Raises `CheckpointError` for a divisor that is none."""
        if "inputs" in stored and not 0 < (divisor := float(stored["inputs"])) < float("inf"):
            raise CheckpointError(f"input_global_scale is {divisor}; wanted 2688 over the largest input")
        return packing.read(stored, shape)

    return replace(
        packing, parts=parts, read=read, layout=f"{packing.layout} + f32 divisor of inputs", activations=packing.format
    )


def nibbles(format: str, scale_dtype: str, layout: str) -> Packing:
    parts = partial(nibble_parts, format=format, scale_dtype=scale_dtype)
    return Packing(format, layout, parts, write_nibbles, read_nibbles)


def integers(format: str, bits: int) -> Packing:
    return Packing(
        format,
        f"int{bits} i32 stream + bf16 + shape",
        partial(integer_parts, format=format, bits=bits),
        write_integers,
        read_integers,
        word=4,
    )


GROUPED = tuple(f"int{bits}_g{group}" for bits in (2, 3, 4, 8) for group in (32, 64, 128))
PACKINGS = {
    "mxfp4": nibbles("mxfp4", "U8", "e2m1 nibbles + e8m0 1x32"),
    "nvfp4": nibbles("nvfp4", "F8_E4M3", "e2m1 nibbles + e4m3 1x16 + f32 divisor"),
    "nvfp4_a4": rounded_inputs(nibbles("nvfp4", "F8_E4M3", "e2m1 nibbles + e4m3 1x16 + f32 divisor")),
    "mxfp8": renamed(MXFP8_PACKING),
    "fp8_block": renamed(FP8_BLOCK),
    "fp8_channel": channel("fp8_channel", "F8_E4M3", "F32", write_e4m3, read_e4m3),
    "int8_channel": channel("int8_channel", "I8", "BF16", write_int8, read_int8),
    **{name: integers(name, FORMATS[name].element_bits) for name in GROUPED},
    "bf16": BF16,
}


# What config.json says -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """How a config group describes one format: its `format`, `weights`, and `input_activations` (None: weight-only)."""

    wire: str
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None = None

    def group(self, targets: Sequence[str]) -> dict[str, Any]:
        return {
            "targets": list(targets),
            "weights": {**self.weights, "symmetric": True, "dynamic": False},
            "input_activations": self.activations and {"symmetric": True, "dynamic": True, **self.activations},
            "output_activations": None,
            "format": self.wire,
        }


def number(bits: int, type: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": type, "strategy": strategy, **more}


MX = {"group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
NV = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
SCHEMES = {
    "mxfp4": Scheme("mxfp4-pack-quantized", number(4, "float", "group", **MX)),
    "nvfp4": Scheme("nvfp4-pack-quantized", number(4, "float", "tensor_group", **NV)),
    "nvfp4_a4": Scheme(
        "nvfp4-pack-quantized",
        number(4, "float", "tensor_group", **NV),
        number(4, "float", "tensor_group", dynamic="local", **NV),
    ),
    "mxfp8": Scheme("mxfp8-quantized", number(8, "float", "group", **MX), number(8, "float", "group", **MX)),
    "fp8_block": Scheme(
        "float-quantized",
        number(8, "float", "block", block_structure=[128, 128]),
        number(8, "float", "group", group_size=128),
    ),
    "fp8_channel": Scheme("float-quantized", number(8, "float", "channel"), number(8, "float", "token")),
    "int8_channel": Scheme("int-quantized", number(8, "int", "channel"), number(8, "int", "token")),
    **{
        name: Scheme(
            "pack-quantized", number(FORMATS[name].element_bits, "int", "group", group_size=FORMATS[name].block[1])
        )
        for name in GROUPED
    },
}
DECIDES = ("num_bits", "type", "strategy", "group_size", "block_structure")


def config(architecture: Architecture, formats: Mapping[str, str], source: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a model whose linears have `formats`; None when all of them are BF16.

    Raises `PlanError`, naming the unit, for what vLLM would not load: two formats in one fused matrix, NVFP4
    under a sparse-attention indexer, rows that are not whole groups. Costs nothing: plans may ask it first.
    """
    units: dict[tuple[bool, str], list[str]] = {}  # (dense, format) -> its units
    for unit, members in architecture.units.items():
        units.setdefault((members[0].expert is None, unit_format(unit, members, formats)), []).append(unit)
    ordered = sorted(units, key=lambda key: key[0])  # experts first
    named = {key: targets(architecture, units[key]) for key in ordered}
    groups = [SCHEMES[format].group(found) for (_, format), found in named.items() if format != "bf16"]
    if not groups:
        return None
    wires = {group["format"] for group in groups}
    kept = [target for (_, format), found in named.items() if format == "bf16" for target in found]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": wires.pop() if len(wires) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": kept + [f"re:{pattern}" for pattern in small_modules(architecture)],
    }


def targets(architecture: Architecture, units: Sequence[str]) -> list[str]:
    """`units` by all their names. A dense target may not say "experts": transformers would read all experts by its group."""
    found = modules(architecture, units)
    return [f"re:{m.pattern() if m.routed else m.pattern().replace('experts', 'exper[t]s')}" for m in found]


def unit_format(unit: str, members: Sequence[Linear], formats: Mapping[str, str]) -> str:
    """The one format of a unit's matrices. Raises `PlanError`."""
    found = sorted({formats[linear.name] for linear in members})
    if len(found) > 1:
        raise PlanError(f"{unit} would mix {' and '.join(found)}, and engines fuse its matrices; give them one format")
    format = found[0]
    check_loadable("compressed_tensors", unit, members, format)
    rows, columns = weights_of(format).block
    for linear in members:
        if rows == 1 and columns and linear.shape[1] % columns:
            raise PlanError(
                f"{unit} has rows of {linear.shape[1]} weights, which are not whole groups of {format}'s {columns}; "
                "give it a format of smaller groups, or bf16"
            )
    for linear in (n for group in siblings(members) for n in group[:-1]):
        if rows > 1 and linear.shape[0] % rows:
            raise PlanError(
                f"{linear.name} has {linear.shape[0]} rows and another matrix is fused below it, which breaks "
                f"{format}'s squares of {rows}; give {unit} mxfp8, fp8_channel or bf16"
            )
    return format


# What a config.json on disk says ----------------------------------------------------------------------------------


def formats(architecture: Architecture, config: Mapping[str, Any], names: frozenset[str] | None) -> dict[str, str]:
    """The format of every linear as vLLM would take it: by its own names, by expert 0 for all, one for a fused unit.

    Raises `CheckpointError` where a fused matrix would get two formats, or where the tensors on disk are
    not those of the format that it would get.
    """
    quantization = config["quantization_config"]
    groups = table(quantization, "config_groups")
    rules = {
        target: format_of(group, quantization)
        for group in (table(groups, name) for name in groups)
        for target in entries(group, "targets")
    }
    ignore = entries(quantization, "ignore")
    engine_name = FAMILIES[architecture.family].engine.name_of
    found: dict[str, str] = {}
    for unit, members in architecture.units.items():
        asked = {n.name: asked_format(engine_name(n.name), rules, ignore) for n in firsts(members)}
        if len(set(asked.values())) > 1:
            raise CheckpointError(
                f"config.json gives {unit}, which engines fuse, several formats: {asked}; export it again"
            )
        found |= dict.fromkeys((n.name for n in members), next(iter(asked.values())))
    if names is not None:
        compare(PACKINGS, architecture, found, names)
    return found


def asked_format(name: str, rules: Mapping[str, str], ignore: Iterable[str]) -> str:
    """The format that vLLM gives a module of this (engine's) name: names come before classes, the first match wins."""
    if any(matches(entry, name) for entry in ignore):
        return "bf16"
    by_name = next((format for target, format in rules.items() if matches(target, name)), None)
    return by_name or rules.get("Linear", "bf16")


def matches(target: str, name: str) -> bool:
    return expression(target[3:]).match(name) is not None if target.startswith("re:") else target == name


def format_of(group: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """The format that a config group describes. Raises `CheckpointError` for one that is not supported."""
    wire, weights = group.get("format") or quantization.get("format"), table(group, "weights")
    found = [
        format
        for format, scheme in SCHEMES.items()
        if wire == scheme.wire and all(weights.get(key) == scheme.weights.get(key) for key in DECIDES)
    ]
    if found and weights.get("symmetric", True):  # of weights alike, activations tell: a calibrated divisor or none
        return found[-1] if group.get("input_activations") else found[0]
    asked = {key: weights[key] for key in (*DECIDES, "symmetric") if weights.get(key) is not None}
    raise CheckpointError(f"config.json has weights as {wire} {asked}; moesaic reads {', '.join(SCHEMES)}")


COMPRESSED_TENSORS = Container(
    "compressed_tensors", "compressed-tensors", PACKINGS, formats, config,
    "https://github.com/vllm-project/compressed-tensors",
    dtypes={"weight_shape": ("I64", "I32")},
)  # fmt: skip
