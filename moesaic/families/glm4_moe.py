"""GLM-4.5, 4.6, 4.7 (355B) and 4.5-Air (106B): grouped attention with biases, dense layers first, a shared expert.

The large ones have a norm over each head's queries and keys. Behind the last layer lies one for multi-token prediction;
GLM-4.6 has it without an embedding and a head of its own.
"""

from torch.nn.functional import silu

from .base import (
    Architecture,
    Arithmetic,
    Engine,
    Family,
    Linear,
    Serving,
    Split,
    TensorInfo,
    Wiring,
)
from .blocks import as_on_disk, attended, ends, norms
from .deepseekmoe import MTP_KEY, check, mlp, mtp, optional, parameters, routers, small_tensors
from .rope import plain_rope
from .stated import Config, count, expect
from .talk import Markup, Talk

PREFIX = "model.layers."


def read(config: Config) -> Architecture:
    """Every tensor of the model that `config` describes. Raises `FamilyError` for a value that is not supported."""
    for key, wanted in (("model_type", "glm4_moe"), ("attention_bias", True)):
        expect(config, key, wanted)
    expect(config, "use_qk_norm", True, False)
    check(config)
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        count(config, key)
    linears: list[Linear] = []
    embedding, tail = ends(config["vocab_size"], config["hidden_size"])
    tensors = [embedding]
    for i in range(config["num_hidden_layers"]):
        matrices, small = layer(config, i)
        linears, tensors = linears + matrices, tensors + small
    matrices, small = mtp(PREFIX, config, layer)
    return Architecture(
        family="glm4_moe", hidden=config["hidden_size"], vocab=config["vocab_size"],
        context=count(config, "max_position_embeddings"), layers=config["num_hidden_layers"],
        routers=routers(PREFIX, config), experts=config["n_routed_experts"], top_k=config["num_experts_per_tok"],
        layer_prefix=PREFIX, linears=(*linears, *matrices), tensors=(*tensors, *small, *tail),
        embedding="model.embed_tokens.weight", norm="model.norm.weight", head="lm_head.weight",
        optional=optional(PREFIX, config),
    )  # fmt: skip


def layer(config: Config, number: int) -> tuple[list[Linear], list[TensorInfo]]:
    """Matrices and small tensors of one layer."""
    at, hidden, width = f"{PREFIX}{number}.", config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    matrices = attended(f"{at}self_attn.", hidden, q, kv, number) + mlp(PREFIX, config, number)
    heads = [("self_attn.q_norm", width), ("self_attn.k_norm", width)] * config["use_qk_norm"]
    small = norms(at, [("input_layernorm", hidden), *heads, ("post_attention_layernorm", hidden)])
    small += [
        TensorInfo(f"{at}self_attn.{p}_proj.bias", "BF16", (rows,), "bias") for p, rows in zip("qkv", (q, kv, kv))
    ]
    return matrices, small + small_tensors(PREFIX, config, number)


def wired(architecture: Architecture, number: int) -> dict[str, tuple[str, ...]]:
    at, names = f"{PREFIX}{number}.", [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    small = (
        t.name.removeprefix(at) for t in architecture.tensors if t.name.startswith(at) and t.role in ("norm", "bias")
    )
    return as_on_disk(at, [*names, *small, *parameters(number in architecture.routers)])


def serving(config: Config) -> Serving:
    return Serving(
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head_width=config["head_dim"],
        cached_layers=config["num_hidden_layers"],
        cuts={"q_proj.bias": "rows", "k_proj.bias": "kv", "v_proj.bias": "kv"},
    )  # fmt: skip


CALLS = Markup(
    block=("", ""),
    call=("<tool_call>{}", "</tool_call>"),
    value=("<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>"),
    gaps=("", "\n", "\n", "\n"),
)
JOINED = Markup(  # GLM-4.7
    block=("", ""),
    call=("<tool_call>{}", "</tool_call>"),
    value=("<arg_key>{}</arg_key><arg_value>", "</arg_value>"),
)
GLM4_6 = Talk(("<think>", "</think>"), CALLS, "<arg_key>", "glm45", "glm45")
GLM4_7 = Talk(("<think>", "</think>"), JOINED, "</arg_key><arg_value>", "glm47", "glm45")


GLM4_MOE = Family(
    name="glm4_moe",
    reference="https://huggingface.co/zai-org/GLM-4.7",
    read=read,
    text=lambda config: config,
    arithmetic=Arithmetic(
        lambda config, gate, up: silu(gate) * up, routed_scale=lambda config: float(config["routed_scaling_factor"])
    ),
    wiring=Wiring(
        modeling="transformers.models.glm4_moe.modeling_glm4_moe",
        configuration="transformers.models.glm4_moe.configuration_glm4_moe:Glm4MoeConfig",
        layer_class="Glm4MoeDecoderLayer",
        rotary_class="Glm4MoeRotaryEmbedding",
        norm_class="Glm4MoeRMSNorm",
        parameters=wired,
        shared="mlp.shared_experts",
        split=Split(),
    ),
    engine=Engine(lambda name: name, serving),
    talks=(GLM4_7, GLM4_6),
    mtp_key=MTP_KEY,
    released=plain_rope,
)
