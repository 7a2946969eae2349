"""No container at all: every matrix is one BF16 tensor named `weight`, or lies as its family's releases stack experts.

Exports have a tensor for each matrix: engines that read stacks read those as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...families import Architecture
from ...formats import Scales
from .base import Container, Packing, Part


def parts(shape: Sequence[int]) -> dict[str, Part]:
    return {"codes": Part("weight", "BF16", tuple(shape))}


def write(stream_OS: Tensor, scales: Scales, shape: Sequence[int]) -> dict[str, Tensor]:
    return {"codes": stream_OS.view(torch.bfloat16)}


def read(stored: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Tensor, Scales]:
    return stored["codes"].view(torch.uint8), Scales()


BF16 = Packing("bf16", "bf16", parts, write, read)


def formats(architecture: Architecture, config: Mapping[str, Any], names: frozenset[str] | None) -> dict[str, str]:
    return {linear.name: "bf16" for linear in architecture.linears}


def config(architecture: Architecture, formats: Mapping[str, str], source: Mapping[str, Any]) -> dict[str, Any] | None:
    return None


UNQUANTIZED = Container(
    "unquantized", "", {"bf16": BF16}, formats, config, "https://github.com/huggingface/safetensors", stacks=True
)
