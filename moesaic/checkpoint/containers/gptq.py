"""Plain GPTQ: integers of 4 or 8 bits, one format for all that is quantized, and BF16 for the rest.

The packing that most tools have read longest. vLLM takes a layer's experts for quantized unless `dynamic` says
"-:" of the module that holds them; of every other module it believes the dtypes on disk. `g_idx` gives each column
its group, in the natural order: older readers want it there, vLLM drops it. Leaves out activation order, and mixed
widths (auto_round).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, PlanError
from ...families import FAMILIES, Architecture
from ...formats import Scales
from . import auto_round
from .base import (
    Container,
    Packing,
    Part,
    compare,
    table,
)
from .names import expression, firsts, modules
from .unquantized import BF16

WIDTHS = {format: wide for format, wide in auto_round.WIDTHS.items() if wide[0] in (4, 8)}


def packing(format: str) -> Packing:
    """auto-round's tensors and `g_idx`."""
    plain, group = auto_round.PACKINGS[format], WIDTHS[format][1]

    def order(columns: int) -> Tensor:
        return torch.arange(columns, dtype=torch.int32) // group

    def parts(shape: Sequence[int]) -> dict[str, Part]:
        return plain.parts(shape) | {"order": Part("g_idx", "I32", (shape[1],))}

    def write(stream_OS: Tensor, scales: Scales, shape: Sequence[int]) -> dict[str, Tensor]:
        return plain.write(stream_OS, scales, shape) | {"order": order(shape[1])}

    def read(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
        """Raises `CheckpointError` for columns in another order."""
        if not torch.equal(stored["order"], order(shape[1]).to(stored["order"].device)):
            raise CheckpointError("g_idx is not in the natural order; moesaic reads GPTQ models made without desc_act")
        return plain.read(stored, shape)

    return replace(plain, layout=f"{plain.layout} + g_idx", parts=parts, write=write, read=read)


PACKINGS = {**{format: packing(format) for format in WIDTHS}, "bf16": BF16}


def config(architecture: Architecture, formats: Mapping[str, str], source: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a model whose linears have `formats`; None when all of them are BF16.

    Raises `PlanError` for a second format, or sides that do not fill whole words.
    """
    chosen = {unit: auto_round.one_format(unit, members, formats) for unit, members in architecture.units.items()}
    quantized = sorted(set(chosen.values()) - {"bf16"})
    if not quantized:
        return None
    if len(quantized) > 1:
        raise PlanError(
            f"gptq carries one format beside bf16, and the plan has {', '.join(quantized)}; write auto_round"
        )
    bits, group = WIDTHS[quantized[0]]
    plain = modules(architecture, [unit for unit in chosen if chosen[unit] == "bf16"])
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {f"-:{m.pattern(whole=True)}": {} for m in plain},
    }


def formats(architecture: Architecture, config: Mapping[str, Any], names: frozenset[str] | None) -> dict[str, str]:
    """The format of every linear as vLLM would take it: of experts what `dynamic` says, of the rest what is on disk.

    Raises `CheckpointError` for another kind of GPTQ, and where an expert's tensors are not those of its format.
    """
    quantization = config["quantization_config"]
    wide = quantization.get("bits"), quantization.get("group_size")
    format = next((f for f, w in WIDTHS.items() if w == wide), None)
    if format is None or not quantization.get("sym", True) or quantization.get("desc_act"):
        said = {key: quantization.get(key) for key in ("bits", "group_size", "sym", "desc_act")}
        raise CheckpointError(
            f"config.json has GPTQ with {said}; moesaic reads {', '.join(WIDTHS)}, symmetric, in order"
        )
    skips = [expression(key[2:]) for key in table(quantization, "dynamic") if key.startswith("-:")]
    engine_name = FAMILIES[architecture.family].engine.name_of
    found: dict[str, str] = {}
    for members in architecture.units.values():
        for first in firsts(members):
            name = engine_name(first.name)
            name = name if first.expert is None else name.rsplit(".", 2)[0]
            plain = any(skip.match(name) for skip in skips)
            if first.expert is None and names is not None:
                plain = f"{first.name}.weight" in names
            same = [n for n in members if n.projection == first.projection]
            found |= dict.fromkeys((n.name for n in same), "bf16" if plain else format)
    if names is not None:
        compare(PACKINGS, architecture, found, names)
    return found


GPTQ = Container("gptq", "gptq", PACKINGS, formats, config, "https://arxiv.org/abs/2210.17323")
