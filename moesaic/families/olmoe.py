"""OLMoE-1B-7B: a softmax router over 64 experts whose gates are not made to sum to one, and norms over all heads at once.

Released in BF16, router included. It has no words for thoughts or tool calls.
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
    Split,
    TensorInfo,
    Wiring,
)
from .blocks import PROJECTIONS, as_on_disk, attended, ends, norms, routed
from .rope import plain_rope
from .stated import MOST_EXPERTS, MOST_LAYERS, Config, allow, count, expect
from .talk import Talk

PREFIX = "model.layers."
NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")


def read(config: Config) -> Architecture:
    """Every tensor of the model that `config` describes. Raises `FamilyError` for a value that is not supported."""
    for key, wanted in (("model_type", "olmoe"), ("hidden_act", "silu"), ("tie_word_embeddings", False)):
        expect(config, key, wanted)
    expect(config, "norm_topk_prob", True, False)
    allow(config, "attention_bias", False)
    layers, experts = count(config, "num_hidden_layers", MOST_LAYERS), count(config, "num_experts", MOST_EXPERTS)
    hidden, vocab, inner = count(config, "hidden_size"), count(config, "vocab_size"), count(config, "intermediate_size")
    q, kv = (count(config, f"num_{what}_heads") * head_width(config) for what in ("attention", "key_value"))
    linears: list[Linear] = []
    embedding, tail = ends(vocab, hidden)
    tensors = [embedding]
    for layer in range(layers):
        at = f"{PREFIX}{layer}."
        linears += attended(f"{at}self_attn.", hidden, q, kv, layer)
        linears += routed(f"{at}mlp.experts.", experts, PROJECTIONS, hidden, inner, layer)
        tensors += norms(at, zip(NORMS, (hidden, q, kv, hidden)))
        tensors += [TensorInfo(router(config, layer).weight, "BF16", (experts, hidden), "router")]
    tensors += tail
    return Architecture(
        family="olmoe", hidden=hidden, vocab=vocab, context=count(config, "max_position_embeddings"), layers=layers,
        routers={layer: router(config, layer) for layer in range(layers)}, experts=experts,
        top_k=count(config, "num_experts_per_tok", experts), layer_prefix=PREFIX, linears=tuple(linears),
        tensors=tuple(tensors), embedding="model.embed_tokens.weight", norm="model.norm.weight", head="lm_head.weight",
    )  # fmt: skip


def head_width(config: Config) -> int:
    width: int = config.get("head_dim") or count(config, "hidden_size") // count(config, "num_attention_heads")
    return width


def router(config: Config, layer: int) -> Router:
    rule = "softmax_of_chosen" if config["norm_topk_prob"] else "softmax"
    return Router(f"{PREFIX}{layer}.mlp.gate.weight", rule)


def parameters(architecture: Architecture, layer: int) -> dict[str, tuple[str, ...]]:
    names = (*NORMS, *(f"self_attn.{p}_proj" for p in "qkvo"))
    return as_on_disk(f"{PREFIX}{layer}.", (f"{name}.weight" for name in names))


def serving(config: Config) -> Serving:
    return Serving(
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head_width=head_width(config),
        cached_layers=config["num_hidden_layers"], cuts={"q_norm.weight": "rows", "k_norm.weight": "kv"},
    )  # fmt: skip


OLMOE = Family(
    name="olmoe",
    reference="https://huggingface.co/allenai/OLMoE-1B-7B-0924",
    read=read,
    text=lambda config: config,
    arithmetic=Arithmetic(lambda config, gate, up: silu(gate) * up, routed_scale=lambda config: 1.0),
    wiring=Wiring(
        modeling="transformers.models.olmoe.modeling_olmoe",
        configuration="transformers.models.olmoe.configuration_olmoe:OlmoeConfig",
        layer_class="OlmoeDecoderLayer",
        rotary_class="OlmoeRotaryEmbedding",
        norm_class="OlmoeRMSNorm",
        parameters=parameters,
        split=Split(),
    ),
    engine=Engine(lambda name: name, serving),
    talks=(Talk(),),
    released=plain_rope,
)
