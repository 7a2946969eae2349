"""auto-round: integers of 2, 3, 4 and 8 bits in GPTQ's packing, with a width and a group for each fused matrix.

GPTQ packs down the columns: `qweight` is the transpose of the row stream that compressed-tensors keeps, and the
zero point, which never changes here, is stored less one. The config states the commonest format and lists what
departs from it as regular expressions, which vLLM *searches* in its own names, first match first. For a layer's
experts it asks for the module that holds them (`mlp.experts`), never for one of them: a pattern that ends in
an expert's projection is ignored without a word. Leaves out zero points, activation order and AWQ's packing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, PlanError
from ...families import FAMILIES, Architecture, Linear
from ...formats import FORMATS, Scales
from .base import (
    Container,
    Packing,
    Part,
    check_loadable,
    compare,
    entries,
    pack_bits,
    stream_bytes,
    table,
)
from .names import expression, firsts, modules
from .unquantized import BF16

PLAIN = {"bits": 16, "data_type": "fp"}


def parts(shape: Sequence[int], *, format: str) -> dict[str, Part]:
    (rows, columns), bits = shape, FORMATS[format].element_bits
    groups = FORMATS[format].grid(shape)[1]
    return {
        "codes": Part("qweight", "I32", (stream_bytes(columns, bits, 4) // 4, rows)),
        "blocks": Part("scales", "BF16", (groups, rows)),
        "zeros": Part("qzeros", "I32", (groups, stream_bytes(rows, bits, 4) // 4)),
    }


def zeros(shape: Sequence[int], format: str) -> Tensor:
    """The zero point of every group: 2^(bits − 1), stored less one."""
    bits, groups = FORMATS[format].element_bits, FORMATS[format].grid(shape)[1]
    return pack_bits(torch.full((groups, shape[0]), 2 ** (bits - 1) - 1, dtype=torch.uint8), bits, 4).view(torch.int32)


def write(stream_OS: Tensor, scales: Scales, shape: Sequence[int], *, format: str) -> dict[str, Tensor]:
    assert scales.blocks is not None
    return {
        "codes": stream_OS.view(torch.int32).T.contiguous(),
        "blocks": scales.blocks.T.contiguous(),
        "zeros": zeros(shape, format),
    }


def read(stored: Mapping[str, Tensor], shape: Sequence[int], *, format: str) -> tuple[Tensor, Scales]:
    """Raises `CheckpointError` for zero points that are not the middle."""
    if not torch.equal(stored["zeros"], zeros(shape, format).to(stored["zeros"].device)):
        raise CheckpointError(
            "qzeros are not those of a symmetric matrix; moesaic reads auto-round models made with sym"
        )
    return stored["codes"].T.contiguous().view(torch.uint8), Scales(stored["blocks"].T.contiguous())


def packing(format: str) -> Packing:
    return Packing(
        format,
        f"{format} gptq",
        partial(parts, format=format),
        partial(write, format=format),
        partial(read, format=format),
        word=4,
    )


WIDTHS = {f"int{bits}_g{group}": (bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 128)}
PACKINGS = {**{name: packing(name) for name in WIDTHS}, "bf16": BF16}


def config(architecture: Architecture, formats: Mapping[str, str], source: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a model whose linears have `formats`; None when all of them are BF16.

    Raises `PlanError`, naming the unit, for two formats in one fused matrix or sides that do not fill whole words.
    """
    chosen = {unit: unit_format(unit, members, formats) for unit, members in architecture.units.items()}
    weights: Counter[str] = Counter()
    for unit, format in chosen.items():
        weights[format] += sum(linear.elements for linear in architecture.units[unit])
    weights.pop("bf16", None)
    if not weights:
        return None
    ((common, _),) = weights.most_common(1)
    others = [format for format in dict.fromkeys(chosen.values()) if format != common]
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        **described(common),
        "block_name_to_quantize": architecture.layer_prefix.removesuffix("."),
        "extra_config": {
            m.pattern(whole=True): described(format)
            for format in others
            for m in modules(architecture, [unit for unit in chosen if chosen[unit] == format])
        },
    }


def described(format: str) -> dict[str, Any]:
    if format == "bf16":
        return dict(PLAIN)
    bits, group = WIDTHS[format]
    return {"bits": bits, "group_size": group, "sym": True, "data_type": "int"}


def unit_format(unit: str, members: Sequence[Linear], formats: Mapping[str, str]) -> str:
    """`one_format`, in which the engines load it. Raises `PlanError`."""
    format = one_format(unit, members, formats)
    check_loadable("auto_round", unit, members, format)
    return format


def one_format(unit: str, members: Sequence[Linear], formats: Mapping[str, str]) -> str:
    """The one format of a unit's matrices, which have to fill whole groups and words. Raises `PlanError`."""
    found = sorted({formats[linear.name] for linear in members})
    if len(found) > 1:
        raise PlanError(f"{unit} would mix {' and '.join(found)}, and engines fuse its matrices; give them one format")
    if found[0] == "bf16":
        return "bf16"
    bits, group = WIDTHS[found[0]]
    for rows, columns in (linear.shape for linear in members):
        if columns % group or rows * bits % 32:
            raise PlanError(
                f"{unit} has a matrix of {rows} × {columns}, and {found[0]} in GPTQ's packing needs rows in whole groups "
                f"of {group} and columns in whole words of 32 bits; give it a smaller group, or bf16"
            )
    return found[0]


def formats(architecture: Architecture, config: Mapping[str, Any], names: frozenset[str] | None) -> dict[str, str]:
    """The format of every linear as vLLM would take it: by its own names, by the holder of a layer's experts.

    Raises `CheckpointError` where a fused matrix would get two formats, or where the tensors on disk are
    not those of the format that it would get.
    """
    quantization = config["quantization_config"]
    if quantization.get("packing_format", "auto_round:auto_gptq") != "auto_round:auto_gptq":
        raise CheckpointError(
            f"config.json says packing_format {quantization['packing_format']!r}; moesaic reads 'auto_round:auto_gptq'"
        )
    said = quantization.get("block_name_to_quantize") or ""
    blocks = said.split(",") if isinstance(said, str) else entries(quantization, "block_name_to_quantize")
    engine_name = FAMILIES[architecture.family].engine.name_of
    found: dict[str, str] = {}
    for unit, members in architecture.units.items():
        asked = {}
        for linear in firsts(members):
            name = engine_name(linear.name)
            asked[linear.name] = asked_format(
                name if linear.expert is None else name.rsplit(".", 2)[0], quantization, blocks
            )
        if len(set(asked.values())) > 1:
            raise CheckpointError(
                f"config.json gives {unit}, which engines fuse, several formats: {asked}; export it again"
            )
        found |= dict.fromkeys((n.name for n in members), next(iter(asked.values())))
    if names is not None:
        compare(PACKINGS, architecture, found, names)
    return found


def asked_format(name: str, quantization: Mapping[str, Any], blocks: Sequence[str]) -> str:
    """The format that vLLM gives a module of this (engine's) name. Raises `CheckpointError` for one that is not supported."""
    extra = table(quantization, "extra_config")
    exact = next((key for key in extra if key == name or name.endswith(f".{key}")), None)
    searched = (key for key in extra if set(key) & set(r"*+?^$()[]{}|\\") and expression(key).search(name))
    key = exact or next(searched, None)
    if key is None and blocks and not any(name.startswith(block) for block in blocks):
        return "bf16"
    said = {"data_type": "int", **quantization, **(table(extra, key) if key is not None else {})}
    if said.get("bits") in (16, 32):
        return "bf16"
    format = next((f for f, wide in WIDTHS.items() if wide == (said.get("bits"), said.get("group_size"))), None)
    if format is None or said["data_type"] != "int" or not said.get("sym", True):
        asked = {k: said.get(k) for k in ("bits", "group_size", "data_type", "sym")}
        raise CheckpointError(f"config.json has {name} as {asked}; moesaic reads {', '.join(WIDTHS)}")
    return format


AUTO_ROUND = Container(
    "auto_round", "auto-round", PACKINGS, formats, config, "https://github.com/intel/auto-round",
)  # fmt: skip
