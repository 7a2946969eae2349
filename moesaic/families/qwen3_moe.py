"""Qwen3-MoE: 30B-A3B, 235B-A22B, Coder-30B, Coder-480B. A softmax router without a bias, grouped attention with a norm
over each head, no shared expert.

Released in BF16, router included, and in FP8 blocks with scales in BF16. transformers 5 saves `num_experts` under
another name, which mlx-lm does not read.
"""

from torch.nn.functional import silu

from ..errors import FamilyError
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
from .blocks import PROJECTIONS, as_on_disk, attended, ends, gated, norms, routed
from .rope import plain_rope
from .stated import MOST_EXPERTS, MOST_LAYERS, Config, allow, count, expect
from .talk import Markup, Talk

PREFIX = "model.layers."
NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")


def read(config: Config) -> Architecture:
    """Every tensor of the model that `config` describes. Raises `FamilyError` for a value that is not supported."""
    check(config)
    layers, experts = count(config, "num_hidden_layers", MOST_LAYERS), count(config, "num_experts", MOST_EXPERTS)
    hidden, vocab, width = count(config, "hidden_size"), count(config, "vocab_size"), count(config, "head_dim")
    sparse = moe_layers(config)
    linears: list[Linear] = []
    embedding, tail = ends(vocab, hidden)
    tensors = [embedding]
    for layer in range(layers):
        linears += attention(config, layer) + mlp(config, layer, layer in sparse)
        tensors += norms(f"{PREFIX}{layer}.", zip(NORMS, (hidden, width, width, hidden)))
        if layer in sparse:
            tensors += [TensorInfo(router(config, layer).weight, "BF16", (experts, hidden), "router")]
    tensors += tail
    return Architecture(
        family="qwen3_moe", hidden=hidden, vocab=vocab, context=count(config, "max_position_embeddings"), layers=layers,
        routers={layer: router(config, layer) for layer in sparse}, experts=experts,
        top_k=count(config, "num_experts_per_tok", experts), layer_prefix=PREFIX, linears=tuple(linears),
        tensors=tuple(tensors), embedding="model.embed_tokens.weight", norm="model.norm.weight", head="lm_head.weight",
    )  # fmt: skip


def check(config: Config) -> None:
    """The values that the code below was written for."""
    for key, wanted in (("model_type", "qwen3_moe"), ("hidden_act", "silu"), ("tie_word_embeddings", False)):
        expect(config, key, wanted)
    expect(config, "norm_topk_prob", True, False)
    for key in ("attention_bias", "qkv_bias", "use_sliding_window"):
        allow(config, key, False)
    allow(config, "use_qk_norm", True)
    allow(config, "shared_expert_intermediate_size", 0)
    for key in ("intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads"):
        count(config, key)


def moe_layers(config: Config) -> list[int]:
    """Every `decoder_sparse_step`-th layer but those of `mlp_only_layers`. Raises `FamilyError` where none is left."""
    step, dense = (
        count({"decoder_sparse_step": 1, **config}, "decoder_sparse_step"),
        config.get("mlp_only_layers") or [],
    )
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise FamilyError(f"config.json has mlp_only_layers = {dense!r:.80}; wanted a list of layers")
    found = [i for i in range(config["num_hidden_layers"]) if (i + 1) % step == 0 and i not in dense]
    if not found:
        raise FamilyError("config.json leaves no layer with experts; moesaic is for models that have some")
    return found


def attention(config: Config, layer: int) -> list[Linear]:
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    return attended(f"{PREFIX}{layer}.self_attn.", config["hidden_size"], q, kv, layer)


def mlp(config: Config, layer: int, sparse: bool) -> list[Linear]:
    at, hidden = f"{PREFIX}{layer}.mlp.", config["hidden_size"]
    if sparse:
        inner = config["moe_intermediate_size"]
        return routed(f"{at}experts.", config["num_experts"], PROJECTIONS, hidden, inner, layer)
    inner = config["intermediate_size"]
    return gated(at, PROJECTIONS, hidden, inner, role="dense", unit=f"layers.{layer}.dense", layer=layer)


def router(config: Config, layer: int) -> Router:
    rule = "softmax_of_chosen" if config["norm_topk_prob"] else "softmax"
    return Router(f"{PREFIX}{layer}.mlp.gate.weight", rule)


def parameters(architecture: Architecture, layer: int) -> dict[str, tuple[str, ...]]:
    names = [*NORMS, *(f"self_attn.{p}_proj" for p in "qkvo")]
    if layer not in architecture.routers:
        names += [f"mlp.{projection}" for projection in PROJECTIONS]
    return as_on_disk(f"{PREFIX}{layer}.", (f"{name}.weight" for name in names))


def released(config: Config) -> Config:
    """As the vendor writes it: transformers 5 says `num_local_experts`. Raises `FamilyError` where both stand and differ."""
    if "num_local_experts" not in config:
        return plain_rope(config)
    found = {key: value for key, value in config.items() if key != "num_local_experts"}
    expect({"num_experts": config["num_local_experts"], **config}, "num_experts", config["num_local_experts"])
    return plain_rope(found | {"num_experts": config["num_local_experts"]})


def serving(config: Config) -> Serving:
    return Serving(
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head_width=config["head_dim"],
        cached_layers=config["num_hidden_layers"], cuts={},
    )  # fmt: skip


HERMES = Markup(block=("", ""), call=("<tool_call>\n", "\n</tool_call>"), gaps=("", "", "", "\n"), json=True)
TAGGED = Markup(
    block=("", ""),
    call=("<tool_call>\n<function={}>", "</function>\n</tool_call>"),
    value=("<parameter={}>\n", "\n</parameter>"),
    gaps=("", "\n", "\n", "\n"),
)
CODER = Talk(calls=TAGGED, sign="<function=", tool_parser="qwen3_coder")
THINKING = Talk(("<think>", "</think>"), HERMES, "<think>", "hermes", "qwen3")
INSTRUCT = Talk(calls=HERMES, sign="<tool_call>", tool_parser="hermes")


QWEN3_MOE = Family(
    name="qwen3_moe",
    reference="https://huggingface.co/Qwen/Qwen3-30B-A3B",
    read=read,
    text=lambda config: config,
    arithmetic=Arithmetic(lambda config, gate, up: silu(gate) * up, routed_scale=lambda config: 1.0),
    wiring=Wiring(
        modeling="transformers.models.qwen3_moe.modeling_qwen3_moe",
        configuration="transformers.models.qwen3_moe.configuration_qwen3_moe:Qwen3MoeConfig",
        layer_class="Qwen3MoeDecoderLayer",
        rotary_class="Qwen3MoeRotaryEmbedding",
        norm_class="Qwen3MoeRMSNorm",
        parameters=parameters,
        split=Split(),
    ),
    engine=Engine(lambda name: name, serving),
    talks=(CODER, THINKING, INSTRUCT, THINKING),  # the last: of a bare config
    dtypes={"weight_scale_inv": "BF16"},
    released=released,
)
