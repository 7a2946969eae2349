"""The full transformers model of a checkpoint, filled with exactly the values on disk, by no code of moesaic's.

Reads safetensors with their own library, decodes with plain torch, and knows each family's names by
itself. transformers' loader will not do: it dequantizes to BF16 and casts the routers' correction bias.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralModel
from transformers.models.minimax_m2.configuration_minimax_m2 import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2Model
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel

MODELS: dict[str, tuple[type, type, str]] = {
    "minimax_m2": (MiniMaxM2Config, MiniMaxM2Model, ""),
    "minimax_m3_vl": (MiniMaxM3VLConfig, MiniMaxM3VLTextModel, "language_model."),
    "mixtral": (MixtralConfig, MixtralModel, ""),
}


class Reference:
    """transformers' language model in F32, and its head."""

    def __init__(self, path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config.pop("quantization_config", None)
        config_class, model_class, self.prefix = MODELS[config["model_type"]]
        text = config_class.from_dict(config).get_text_config()
        self.values = decoded(path)
        self.model = model_class(text).float().eval()
        self.head_VD = self.values[f"{self.prefix}lm_head.weight"]
        self.fill(text)

    def fill(self, text: Any) -> None:
        root = f"{self.prefix}model."
        state = {name: None for name in self.model.state_dict()}
        for name in state:
            state[name] = self.value(root, name, text.num_local_experts)
        self.model.load_state_dict(state, strict=True, assign=True)
        assert all(p.dtype == torch.float32 for p in [*self.model.parameters(), *self.model.buffers()])

    def value(self, root: str, name: str, experts: int) -> Tensor:
        """What transformers calls `name`, from what the disk calls otherwise."""
        at = name.rsplit("mlp.", 1)[0]
        moe = f"{root}{at}block_sparse_moe."
        if name.endswith("mlp.experts.gate_up_proj"):
            w1, w3 = (self.stack(f"{moe}experts.{{}}.{w}.weight", experts) for w in ("w1", "w3"))
            return torch.cat([w1, w3], 1)
        if name.endswith("mlp.experts.down_proj"):
            return self.stack(f"{moe}experts.{{}}.w2.weight", experts)
        if name.endswith("e_score_correction_bias"):
            return self.values[f"{moe}e_score_correction_bias"]
        if name.endswith("mlp.gate.weight"):
            return self.values[f"{moe}gate.weight"]
        disk = root + name.replace("indexer.", "index_").replace(
            "mlp.shared_experts.", "block_sparse_moe.shared_experts."
        )
        if disk.endswith("gate_up_proj.weight"):
            return torch.cat([self.values[disk.replace("gate_up", part)] for part in ("gate", "up")])
        return self.values[disk]

    def stack(self, name: str, experts: int) -> Tensor:
        return torch.stack([self.values[name.format(e)] for e in range(experts)])

    def biases(self) -> dict[int, Tensor]:
        """Layer -> the correction bias in use, to be changed in place."""
        return {
            int(name.split(".")[1]): buffer
            for name, buffer in self.model.named_buffers()
            if name.endswith("e_score_correction_bias")
        }

    def logits(self, tokens_BT: Tensor) -> Tensor:
        with torch.no_grad():
            hidden_BTD = self.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            return nn.functional.linear(hidden_BTD, self.head_VD)


def decoded(path: Path) -> dict[str, Tensor]:
    """Every tensor of a source checkpoint in F32, scales applied and gone."""
    stored: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            stored |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return {
        name: with_scales(w, stored.get(f"{name}_scale_inv"))
        for name, w in stored.items()
        if not name.endswith("_scale_inv")
    }


def with_scales(w: Tensor, scale: Tensor | None) -> Tensor:
    """F32 [128 × 128] blocks multiply; uint8 b of 32 columns multiplies by 2 ** (b - 127)."""
    if scale is None:
        return w.float()
    if scale.dtype == torch.uint8:
        scale, rows, columns = torch.ldexp(torch.ones(scale.shape), scale.int() - 127), 1, 32
    else:
        rows = columns = 128
    o, i = torch.arange(w.shape[0]) // rows, torch.arange(w.shape[1]) // columns
    return w.float() * scale[o][:, i]
