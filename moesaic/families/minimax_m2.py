"""MiniMax-M2, M2.1, M2.5, M2.7: 62 MoE layers of 256 experts, sigmoid router, full attention, no shared expert.

The configs promise three MTP modules and no released file holds a tensor of them, so none is expected.
"""

from typing import Any

from torch.nn.functional import silu

from .base import (
    Architecture,
    Arithmetic,
    Engine,
    Family,
    Linear,
    Router,
    Serving,
    Split,
    TensorInfo,
    Wiring,
)
from .blocks import attended, gated
from .rope import plain_rope
from .stated import MOST_EXPERTS, MOST_LAYERS, Config, count, expect
from .talk import Markup, Talk

PREFIX = "model.layers."


def read(config: Config) -> Architecture:
    """Every tensor of the model that `config` describes. Raises `FamilyError` for a value nobody wrote code for."""
    expect(config, "model_type", "minimax_m2")
    expect(config, "scoring_func", "sigmoid")
    expect(config, "use_routing_bias", True)
    expect(config, "use_qk_norm", True)
    expect(config, "qk_norm_type", "per_layer")
    expect(config, "hidden_act", "silu")
    expect(config, "tie_word_embeddings", False)
    expect(config, "shared_intermediate_size", 0)
    layers, experts = count(config, "num_hidden_layers", MOST_LAYERS), count(config, "num_local_experts", MOST_EXPERTS)
    expect(config, "attn_type_list", [1] * layers)
    hidden, vocab = count(config, "hidden_size"), count(config, "vocab_size")
    for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        count(config, key)
    linears: list[Linear] = []
    tensors = [TensorInfo("model.embed_tokens.weight", "BF16", (vocab, hidden), "embedding")]
    for layer in range(layers):
        linears += attention(config, layer) + moe(config, layer)
        tensors += small_tensors(config, layer)
    tensors += [
        TensorInfo("model.norm.weight", "BF16", (hidden,), "norm"),
        TensorInfo("lm_head.weight", "BF16", (vocab, hidden), "head"),
    ]
    return Architecture(
        family="minimax_m2", hidden=hidden, vocab=vocab, context=count(config, "max_position_embeddings"),
        layers=layers, routers={layer: router(layer) for layer in range(layers)},
        experts=experts, top_k=count(config, "num_experts_per_tok", experts),
        layer_prefix=PREFIX, linears=tuple(linears), tensors=tuple(tensors),
        embedding="model.embed_tokens.weight", norm="model.norm.weight", head="lm_head.weight",
    )  # fmt: skip


def attention(config: Config, layer: int) -> list[Linear]:
    width = config["head_dim"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    return attended(f"{PREFIX}{layer}.self_attn.", config["hidden_size"], q, kv, layer)


def moe(config: Config, layer: int) -> list[Linear]:
    """On disk an expert's matrices are in the order of their names."""
    found: list[Linear] = []
    for e in range(config["num_local_experts"]):
        gate, up, down = gated(
            f"{PREFIX}{layer}.block_sparse_moe.experts.{e}.", ("w1", "w3", "w2"), config["hidden_size"],
            config["intermediate_size"], role="experts", unit=f"layers.{layer}.experts", layer=layer, expert=e,
        )  # fmt: skip
        found += [gate, down, up]
    return found


def small_tensors(config: Config, layer: int) -> list[TensorInfo]:
    hidden, width, experts = config["hidden_size"], config["head_dim"], config["num_local_experts"]
    at = f"{PREFIX}{layer}."
    return [
        TensorInfo(f"{at}input_layernorm.weight", "BF16", (hidden,), "norm"),
        TensorInfo(f"{at}self_attn.q_norm.weight", "BF16", (config["num_attention_heads"] * width,), "norm"),
        TensorInfo(f"{at}self_attn.k_norm.weight", "BF16", (config["num_key_value_heads"] * width,), "norm"),
        TensorInfo(f"{at}post_attention_layernorm.weight", "BF16", (hidden,), "norm"),
        TensorInfo(f"{at}block_sparse_moe.gate.weight", "F32", (experts, hidden), "router"),
        TensorInfo(f"{at}block_sparse_moe.e_score_correction_bias", "F32", (experts,), "router_bias"),
    ]


def router(layer: int) -> Router:
    at = f"{PREFIX}{layer}.block_sparse_moe."
    return Router(f"{at}gate.weight", "sigmoid", correction=f"{at}e_score_correction_bias")


def text(config: Config) -> Config:
    return config


def activate(config: Config, gate: Any, up: Any) -> Any:
    """SwiGLU: silu(gate) · up."""
    return silu(gate) * up


def parameters(architecture: Architecture, layer: int) -> dict[str, tuple[str, ...]]:
    return {
        name: (f"{PREFIX}{layer}.{name}",)
        for name in (
            "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight",
            "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
        )
    }  # fmt: skip


def engine_name(name: str) -> str:
    """vLLM calls the MoE block `mlp`, whatever the disk says; its experts keep w1, w2, w3."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def serving(config: Config) -> Serving:
    return Serving(
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head_width=config["head_dim"],
        cached_layers=config["num_hidden_layers"], cuts={"q_norm.weight": "rows", "k_norm.weight": "kv"},
    )  # fmt: skip


CALLS = Markup(
    block=("<minimax:tool_call>", "</minimax:tool_call>"),
    call=('<invoke name="{}">', "</invoke>"),
    value=('<parameter name="{}">', "</parameter>"),
    gaps=("\n", "\n", "\n", "\n"),
)


MINIMAX_M2 = Family(
    name="minimax_m2",
    reference="https://huggingface.co/MiniMaxAI/MiniMax-M2.7",
    read=read,
    text=text,
    arithmetic=Arithmetic(activate, routed_scale=lambda config: 1.0),
    wiring=Wiring(
        modeling="transformers.models.minimax_m2.modeling_minimax_m2",
        configuration="transformers.models.minimax_m2.configuration_minimax_m2:MiniMaxM2Config",
        layer_class="MiniMaxM2DecoderLayer",
        rotary_class="MiniMaxM2RotaryEmbedding",
        norm_class="MiniMaxM2RMSNorm",
        parameters=parameters,
        split=Split(),
    ),
    engine=Engine(engine_name, serving),
    talks=(Talk(("<think>", "</think>"), CALLS, tool_parser="minimax_m2", reasoning_parser="minimax_m2"),),
    released=plain_rope,
)
