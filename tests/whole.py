"""transformers' full model of a folder that replica.py wrote, in F32, with exactly the values on disk, by no code of moesaic's.

FP8 and 4-bit integers are decoded by plain torch into a folder of F32, which transformers loads by its own names.
Kimi-K2 is loaded as the DeepSeek-V3 that it is: transformers has no class of its own for it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

BLOCK, GROUP = 128, 32


def decoded(path: Path) -> dict[str, Tensor]:
    """Every tensor of the language model in F32, scales applied and gone."""
    stored: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            stored |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    found: dict[str, Tensor] = {}
    for name, w in stored.items():
        if name.endswith(("_scale_inv", "weight_scale", "weight_shape")):
            continue
        if name.endswith("weight_packed"):
            codes = (w[..., None].long() >> (4 * torch.arange(8))) & 15
            groups = (codes.flatten(1).float() - 8).unflatten(1, (-1, GROUP))
            scale = stored[name.replace("weight_packed", "weight_scale")].float()
            found[name.removesuffix("_packed")] = (groups * scale[..., None]).flatten(1)
        elif (scale := stored.get(f"{name}_scale_inv")) is not None:
            o, i = torch.arange(w.shape[0]) // BLOCK, torch.arange(w.shape[1]) // BLOCK
            found[name] = w.float() * scale.float()[o][:, i]
        elif w.dtype == torch.float8_e4m3fn:  # by the row
            found[name] = w.float() * stored[f"{name}_scale"].float()
        elif not name.endswith(".inv_freq"):
            found[name] = w.float()
    outer = "language_model."
    if any(name.startswith(outer) for name in found):
        return {name.removeprefix(outer): w for name, w in found.items() if name.startswith(outer)}
    return found


def whole(path: Path, scratch: Path) -> Any:
    """The model; `scratch` is a folder for what it is loaded from."""
    config = json.loads((path / "config.json").read_text())
    config = dict(config.get("text_config", config))
    config.pop("quantization_config", None)
    config.pop("auto_map", None)
    if config["model_type"] == "kimi_k2":
        config["model_type"] = "deepseek_v3"
    behind = f"model.layers.{config['num_hidden_layers']}."
    tensors = {name: w.contiguous() for name, w in decoded(path).items() if not name.startswith(behind)}
    scratch.mkdir(parents=True, exist_ok=True)
    save_file(tensors, scratch / "model.safetensors", {"format": "pt"})
    (scratch / "config.json").write_text(json.dumps(config))
    model, facts = AutoModelForCausalLM.from_pretrained(
        scratch, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(facts[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), facts
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model.eval()


def logits(model: Any, tokens_BT: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    return found
