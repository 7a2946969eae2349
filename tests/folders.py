"""Write a whole model folder the short way: decode, round to nearest, pack, one safetensors file. And read one back.

What tests of containers need of an export, and nothing else: no plan, no streaming, no index.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moesaic.checkpoint import Checkpoint
from moesaic.containers import CONTAINERS
from moesaic.containers.base import siblings
from moesaic.formats import FORMATS


def write_folder(source: Checkpoint, formats: Mapping[str, str], container: str, out: Path) -> dict[str, Tensor]:
    """Write `source` with `formats` (linear -> format, or "source") and return every linear's decoded weights, F32."""
    target = CONTAINERS[container]
    wanted = {name: source.formats[name] if format == "source" else format for name, format in formats.items()}
    tensors = {info.name: source.read(info.name) for info in source.architecture.tensors}
    decoded = {}
    for group in siblings(source.architecture.linears):
        largest = torch.stack([source.decode(linear.name).abs().max() for linear in group]).max()
        for linear in group:
            packing, theirs = target.packing(wanted[linear.name]), source.container.packing(source.formats[linear.name])
            if packing.layout == theirs.layout:
                stored = source.parts(linear)
            else:
                format = FORMATS[wanted[linear.name]]
                w_OI = source.decode(linear.name)
                scales = format.scales(w_OI, format.share(largest) if format.share else None)
                stored = packing.pack(format.encode(w_OI, scales), scales)
            decoded[linear.name] = packing.decode(stored, linear.shape)
            for key, part in packing.parts(linear.shape).items():
                tensors[f"{linear.name}.{part.suffix}"] = stored[key]
    quantization = target.config(source.architecture, wanted, source.config)
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    write(out, tensors, config | ({"quantization_config": quantization} if quantization else {}))
    return decoded


def write_twin(source: Checkpoint, decoded: Mapping[str, Tensor], out: Path) -> None:
    """The same values as an unquantized BF16 model."""
    tensors = {info.name: source.read(info.name) for info in source.architecture.tensors}
    tensors |= {f"{name}.weight": w_OI.bfloat16() for name, w_OI in decoded.items()}
    write(out, tensors, {k: v for k, v in source.config.items() if k != "quantization_config"})


def write(out: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    out.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    (out / "config.json").write_text(json.dumps(config, indent=1))
