"""Write a whole model folder the short way: decode, round to nearest, pack, one safetensors file. And read one back.

What tests of containers need of an export, and nothing else: no plan, no streaming, no index.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.checkpoint.containers.base import DTYPES, siblings
from moesaic.formats import weights_of


def deal(source: Checkpoint, experts: str | list[str], rest: str = "source") -> dict[str, str]:
    """A format for every linear. A list of formats for the experts is dealt out MoE layer by MoE layer."""
    formats, layers = experts if isinstance(experts, list) else [experts], source.architecture.moe_layers
    dense = source.formats if rest == "source" else dict.fromkeys(source.formats, rest)
    return {
        n.name: dense[n.name] if n.expert is None else formats[layers.index(n.layer) % len(formats)]
        for n in source.architecture.linears
    }


def write_folder(source: Checkpoint, formats: Mapping[str, str], container: str, out: Path) -> dict[str, Tensor]:
    """Write `source` with `formats` (linear -> format, or "source") and return every linear's decoded weights, F32."""
    formats = {name: source.formats[name] if format == "source" else format for name, format in formats.items()}
    target = CONTAINERS[container]
    tensors = {info.name: source.read(info.name) for info in source.architecture.tensors}
    decoded, stacks = {}, {}  # type: dict[str, Tensor], dict[str, list[Tensor]]
    for group in siblings(source.architecture.linears):
        largest = torch.stack([source.decode(linear.name).abs().max() for linear in group]).max()
        for linear in group:
            packing, theirs = (
                target.packing(formats[linear.name]),
                source.container.packing(source.formats[linear.name]),
            )
            if packing.layout == theirs.layout:
                stored = source.parts(linear)
            else:
                format = weights_of(formats[linear.name])
                w_OI = source.decode(linear.name)
                scales = format.scales(w_OI, format.share(largest) if format.share else None)
                stored = packing.pack(format.encode(w_OI, scales), scales)
            if "inputs" in packing.parts(linear.shape):
                stored = {**stored, "inputs": torch.tensor([2688 / 12.0])}
            decoded[linear.name] = packing.decode(stored, linear.shape)
            place = target.place(source.architecture, linear)
            for key, part in packing.parts(linear.shape).items():
                name = place.tensor(part).name
                tensor = stored[key].reshape(-1).view(torch.uint8).view(DTYPES[part.dtype]).reshape(part.shape)
                if place.row is None:
                    tensors[name] = tensor
                else:
                    stacks.setdefault(name, []).append(tensor)
    tensors |= {name: torch.stack(rows) for name, rows in stacks.items()}
    quantization = target.config(source.architecture, formats, source.config)
    write(out, tensors, plain(source) | ({key: quantization for key in target.keys} if quantization else {}))
    return decoded


def write_twin(
    source: Checkpoint, decoded: Mapping[str, Tensor], out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """The same values as an unquantized model."""
    tensors = {info.name: source.read(info.name) for info in source.architecture.tensors}
    tensors |= {f"{name}.weight": w_OI.to(dtype) for name, w_OI in decoded.items()}
    write(out, tensors, plain(source))


def plain(source: Checkpoint) -> dict[str, object]:
    return {key: value for key, value in source.config.items() if key not in source.container.keys}


def write(out: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    out.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    (out / "config.json").write_text(json.dumps(config, indent=1))


def saved(source: Checkpoint, folder: Path) -> Path:
    """A copy of a model whose config.json was written by transformers 5."""
    shutil.copytree(source.path, folder)
    AutoConfig.from_pretrained(source.path).save_pretrained(folder)
    return folder


TOWER = {  # transformers' key -> Kimi's
    "hidden_size": "vt_hidden_size",
    "intermediate_size": "vt_intermediate_size",
    "num_hidden_layers": "vt_num_hidden_layers",
    "num_attention_heads": "vt_num_attention_heads",
    "pos_emb_height": "init_pos_emb_height",
    "pos_emb_width": "init_pos_emb_width",
}


def reword_tower(folder: Path) -> None:
    """The sizes of Kimi-K2.5's tower in transformers' words, which knows no others and takes the released sizes without them."""
    config = json.loads((folder / "config.json").read_text())
    if "vt_hidden_size" in (tower := config.get("vision_config", {})):
        tower |= {theirs: tower[kimis] for theirs, kimis in TOWER.items()}
        config["projection_hidden_size"] = tower["mm_hidden_size"]
        (folder / "config.json").write_text(json.dumps(config))
