"""Mixtral 8x7B and 8x22B: a softmax router over 8 experts, full attention with grouped keys, no shared expert.

Released in BF16, router included. The Instruct models have no words for thoughts or tool calls.
"""

from torch.nn.functional import silu

from .base import (
    Architecture,
    Arithmetic,
    Engine,
    Family,
    Linear,
    Router,
    Serving,
    TensorInfo,
    Wiring,
)
from .blocks import attended, gated
from .rope import plain_rope
from .stated import MOST_EXPERTS, MOST_LAYERS, Config, count, expect
from .talk import Talk

PREFIX = "model.layers."
NORMS = ("input_layernorm", "post_attention_layernorm")


def read(config: Config) -> Architecture:
    """Every tensor of the model that `config` describes. Raises `FamilyError` for a value that is not supported."""
    expect(config, "model_type", "mixtral")
    expect(config, "hidden_act", "silu")
    expect(config, "tie_word_embeddings", False)
    expect({"sliding_window": None, **config}, "sliding_window", None)
    layers, experts = count(config, "num_hidden_layers", MOST_LAYERS), count(config, "num_local_experts", MOST_EXPERTS)
    hidden, vocab = count(config, "hidden_size"), count(config, "vocab_size")
    for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        count(config, key)
    linears: list[Linear] = []
    tensors = [TensorInfo("model.embed_tokens.weight", "BF16", (vocab, hidden), "embedding")]
    for layer in range(layers):
        linears += attention(config, layer) + moe(config, layer)
        tensors += [TensorInfo(f"{PREFIX}{layer}.{norm}.weight", "BF16", (hidden,), "norm") for norm in NORMS]
        tensors += [TensorInfo(router(layer).weight, "BF16", (experts, hidden), "router")]
    tensors += [
        TensorInfo("model.norm.weight", "BF16", (hidden,), "norm"),
        TensorInfo("lm_head.weight", "BF16", (vocab, hidden), "head"),
    ]
    return Architecture(
        family="mixtral", hidden=hidden, vocab=vocab, context=count(config, "max_position_embeddings"), layers=layers,
        routers={layer: router(layer) for layer in range(layers)}, experts=experts,
        top_k=count(config, "num_experts_per_tok", experts), layer_prefix=PREFIX, linears=tuple(linears),
        tensors=tuple(tensors), embedding="model.embed_tokens.weight", norm="model.norm.weight", head="lm_head.weight",
    )  # fmt: skip


def head_width(config: Config) -> int:
    """The releases leave it to this quotient; configs saved by transformers 5 may name it."""
    width: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return width


def attention(config: Config, layer: int) -> list[Linear]:
    width = head_width(config)
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    return attended(f"{PREFIX}{layer}.self_attn.", config["hidden_size"], q, kv, layer)


def moe(config: Config, layer: int) -> list[Linear]:
    found: list[Linear] = []
    for e in range(config["num_local_experts"]):
        found += gated(
            f"{PREFIX}{layer}.block_sparse_moe.experts.{e}.", ("w1", "w3", "w2"), config["hidden_size"],
            config["intermediate_size"], role="experts", unit=f"layers.{layer}.experts", layer=layer, expert=e,
        )  # fmt: skip
    return found


def router(layer: int) -> Router:
    return Router(f"{PREFIX}{layer}.block_sparse_moe.gate.weight", "softmax_of_chosen")


def parameters(architecture: Architecture, layer: int) -> dict[str, tuple[str, ...]]:
    names = (*NORMS, *(f"self_attn.{p}_proj" for p in "qkvo"))
    return {f"{name}.weight": (f"{PREFIX}{layer}.{name}.weight",) for name in names}


def serving(config: Config) -> Serving:
    return Serving(
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head_width=head_width(config),
        cached_layers=config["num_hidden_layers"], cuts={},
    )  # fmt: skip


MIXTRAL = Family(
    name="mixtral",
    reference="https://huggingface.co/mistralai/Mixtral-8x7B-Instruct-v0.1",
    read=read,
    text=lambda config: config,
    arithmetic=Arithmetic(lambda config, gate, up: silu(gate) * up, routed_scale=lambda config: 1.0),
    wiring=Wiring(
        modeling="transformers.models.mixtral.modeling_mixtral",
        configuration="transformers.models.mixtral.configuration_mixtral:MixtralConfig",
        layer_class="MixtralDecoderLayer",
        rotary_class="MixtralRotaryEmbedding",
        norm_class="MixtralRMSNorm",
        parameters=parameters,
    ),
    engine=Engine(lambda name: name, serving),  # vLLM asks for block_sparse_moe.experts.0.w1, as on disk
    talks=(Talk(),),
    released=plain_rope,
)
