"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, §2.1): all heads' keys and values come of one narrow vector.

Queries and that latent are each made in two steps with a norm between them; the rows that are rotated stand behind the
latent, shared by all heads. Engines cache the latent and those rows, and fuse the two first steps.
"""

from dataclasses import replace
from typing import Any

from .base import Linear, Refusal, Serving, TensorInfo
from .blocks import norms
from .stated import Config, count, expect

KV_B_REFUSALS = (
    Refusal(
        "mlx", (), "holds kv_b_proj, which mlx-lm cuts in two and rounds again where it is quantized; give it bf16"
    ),
)
WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_attention_heads")


def check(config: Config) -> None:
    """Raises `FamilyError` for a value that is not supported."""
    for key in WIDTHS:
        count(config, key)
    expect(config, "attention_bias", False)
    if config.get("q_lora_rank") is not None:
        count(config, "q_lora_rank")


def attention(prefix: str, config: Config, layer: int) -> list[Linear]:
    """The matrices in the order of the modules; without `q_lora_rank` queries are made in one step."""
    at, hidden, heads = f"{prefix}{layer}.self_attn.", config["hidden_size"], config["num_attention_heads"]
    latent, rope, nope = (config[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    value, q_latent = config["v_head_dim"], config.get("q_lora_rank")
    facts: dict[str, Any] = dict(role="qkv", layer=layer)

    def linear(name: str, shape: tuple[int, int], unit: str, projection: str, cut: str, **more: Any) -> Linear:
        found = Linear(
            name=f"{at}{name}", shape=shape, unit=f"layers.{layer}.{unit}", projection=projection, cut=cut, **facts
        )
        return replace(found, **more)

    q_rows = heads * (nope + rope)
    queries = [linear("q_proj", (q_rows, hidden), "q", "q", "rows")]
    if q_latent is not None:
        queries = [
            linear("q_a_proj", (q_latent, hidden), "qkv", "q_a", "whole", fused="qkv_a"),
            linear("q_b_proj", (q_rows, q_latent), "q_b", "q_b", "rows"),
        ]
    fused = "qkv_a" if q_latent is not None else ""
    return [
        *queries,
        linear("kv_a_proj_with_mqa", (latent + rope, hidden), "qkv", "kv_a", "whole", fused=fused),
        linear("kv_b_proj", (heads * (nope + value), latent), "kv_b", "kv_b", "rows", refusals=KV_B_REFUSALS),
        linear("o_proj", (hidden, heads * value), "o", "o", "columns", role="o"),
    ]


def small_tensors(prefix: str, config: Config, layer: int) -> list[TensorInfo]:
    sizes = [("kv_a_layernorm", config["kv_lora_rank"])]
    if config.get("q_lora_rank") is not None:
        sizes = [("q_a_layernorm", config["q_lora_rank"]), *sizes]
    return norms(f"{prefix}{layer}.self_attn.", sizes)


def parameters(in_two_steps: bool) -> list[str]:
    """Names within a layer, which are those of transformers; queries may be made in one step or two."""
    q = ["q_a_proj", "q_a_layernorm", "q_b_proj"] if in_two_steps else ["q_proj"]
    return [f"self_attn.{n}.weight" for n in (*q, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")]


def serving(config: Config) -> Serving:
    """Of the latent there is one for all heads, so that any number of devices may share them."""
    return Serving(
        heads=config["num_attention_heads"], kv_heads=1,
        head_width=config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        latent_width=config["kv_lora_rank"] + config["qk_rope_head_dim"], cached_layers=config["num_hidden_layers"], cuts={},
    )  # fmt: skip
