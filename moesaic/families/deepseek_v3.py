"""DeepSeek-V3, R1, V3.1 and Kimi-K2: latent attention, dense layers first, routed experts beside a shared one.

DeepSeek selects within groups of experts, Kimi among all. V3, R1 and K2-Instruct are released in FP8 blocks with scales
in F32, every matrix but the router, the embedding, the head and MTP's `eh_proj`. Kimi-K2-Thinking and K2.5 to K2.7 have
routed experts in 4-bit integers; K2.5 and later wrap the language model, and a vision tower is carried along untouched.
"""

from dataclasses import replace

from torch.nn.functional import silu

from . import mla
from .base import (
    Architecture,
    Arithmetic,
    Engine,
    Family,
    Linear,
    Split,
    TensorInfo,
    Wiring,
)
from .blocks import as_on_disk, ends, norms
from .deepseekmoe import MTP_KEY, check, mlp, mtp, optional, parameters, routers, small_tensors
from .rope import plain_rope
from .stated import MOST_LAYERS, Config, allow, count, expect, section
from .talk import Markup, Talk

NORMS = ("input_layernorm", "post_attention_layernorm")


def architecture(family: str, config: Config, outer: str = "") -> Architecture:
    """The language model whose names begin with `outer`. Raises `FamilyError` for a value that is not supported."""
    check(config)
    mla.check(config)
    prefix = f"{outer}model.layers."

    def layer(config: Config, number: int) -> tuple[list[Linear], list[TensorInfo]]:
        at, hidden = f"{prefix}{number}.", config["hidden_size"]
        small = norms(at, ((name, hidden) for name in NORMS)) + mla.small_tensors(prefix, config, number)
        matrices = mla.attention(prefix, config, number) + mlp(prefix, config, number)
        return matrices, small + small_tensors(prefix, config, number)

    linears: list[Linear] = []
    embedding, tail = ends(config["vocab_size"], config["hidden_size"], outer)
    tensors = [embedding]
    for i in range(config["num_hidden_layers"]):
        matrices, small = layer(config, i)
        linears, tensors = linears + matrices, tensors + small
    matrices, small = mtp(prefix, config, layer)
    return Architecture(
        family=family, hidden=config["hidden_size"], vocab=config["vocab_size"],
        context=count(config, "max_position_embeddings"), layers=config["num_hidden_layers"],
        routers=routers(prefix, config), experts=config["n_routed_experts"], top_k=config["num_experts_per_tok"],
        layer_prefix=prefix, linears=(*linears, *matrices), tensors=(*tensors, *small, *tail),
        embedding=embedding.name, norm=f"{outer}model.norm.weight", head=f"{outer}lm_head.weight",
        optional=optional(prefix, config),
    )  # fmt: skip


def wired(architecture: Architecture, number: int) -> dict[str, tuple[str, ...]]:
    at = f"{architecture.layer_prefix}{number}."
    in_two_steps = f"{at}self_attn.q_a_proj" in architecture.by_name
    names = [*(f"{name}.weight" for name in NORMS), *mla.parameters(in_two_steps)]
    return as_on_disk(at, [*names, *parameters(number in architecture.routers)])


def read_kimi(config: Config) -> Architecture:
    """Raises `FamilyError` for a value that is not supported."""
    expect(config, "model_type", "kimi_k25")
    text = section(config, "text_config")
    expect(text, "model_type", "kimi_k2", "deepseek_v3")
    allow(text, MTP_KEY, 0)  # no release has one, and a cut would leave it whole
    found = architecture("kimi_k25", text, "language_model.")
    return replace(found, tensors=(*found.tensors, *vision(config, text["hidden_size"])))


def vision(config: Config, hidden: int) -> list[TensorInfo]:
    """The tower and its projector."""
    v = section(config, "vision_config")
    width, inner, patch = count(v, "vt_hidden_size"), count(v, "vt_intermediate_size"), count(v, "patch_size")
    height, across = count(v, "init_pos_emb_height"), count(v, "init_pos_emb_width")
    merged = width * v["merge_kernel_size"][0] * v["merge_kernel_size"][1]
    at = "vision_tower."
    found = [
        *both(f"{at}patch_embed.proj", (width, 3, patch, patch)),
        TensorInfo(f"{at}patch_embed.pos_emb.weight", "BF16", (height, across, width), "vision"),
    ]
    for i in range(count(v, "vt_num_hidden_layers", MOST_LAYERS)):
        block = f"{at}encoder.blocks.{i}."
        found += both(f"{block}norm0", (width,)) + both(f"{block}norm1", (width,))
        found += both(f"{block}wqkv", (3 * width, width)) + both(f"{block}wo", (width, width))
        found += both(f"{block}mlp.fc0", (inner, width)) + both(f"{block}mlp.fc1", (width, inner))
    found += both(f"{at}encoder.final_layernorm", (width,)) + both("mm_projector.pre_norm", (width,))
    return found + both("mm_projector.proj.0", (merged, merged)) + both("mm_projector.proj.2", (hidden, merged))


def both(module: str, shape: tuple[int, ...]) -> list[TensorInfo]:
    return [
        TensorInfo(f"{module}.weight", "BF16", shape, "vision"),
        TensorInfo(f"{module}.bias", "BF16", shape[:1], "vision"),
    ]


def released_kimi(config: Config) -> Config:
    """With quantization_config where engines look first: Kimi's own files have it within `text_config`."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    inner = {key: value for key, value in text.items() if key != "quantization_config"}
    found = {**config, "text_config": plain_rope(inner)}
    if "quantization_config" in text:
        expect(
            {"quantization_config": text["quantization_config"], **config},
            "quantization_config",
            text["quantization_config"],
        )
        found["quantization_config"] = text["quantization_config"]
    return found


FENCED = Markup(
    block=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    call=("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n", "\n```<｜tool▁call▁end｜>"),
    json=True,
)
BARE = Markup(
    block=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    call=("<｜tool▁call▁begin｜>{}<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    json=True,
)
NUMBERED = Markup(
    block=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    call=("<|tool_call_begin|>functions.{}<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    json=True,
    numbered=True,
)
THINK = ("<think>", "</think>")
R1 = Talk(
    THINK, FENCED, "<｜Assistant｜><think>", "deepseek_v3", "deepseek_r1"
)  # its reader takes all for thoughts at first
V3 = Talk(THINK, FENCED, "```json", "deepseek_v3", "deepseek_v3")
V3_1 = Talk(THINK, BARE, "<｜tool▁calls▁begin｜>", "deepseek_v31", "deepseek_v3")
KIMI = Talk(THINK, NUMBERED, "<|tool_calls_section_begin|>", "kimi_k2", "kimi_k2")

ARITHMETIC = Arithmetic(
    lambda config, gate, up: silu(gate) * up, routed_scale=lambda config: float(config["routed_scaling_factor"])
)
MODELS = "transformers.models."


def wiring(configuration: str) -> Wiring:
    return Wiring(
        modeling=f"{MODELS}deepseek_v3.modeling_deepseek_v3",
        configuration=configuration,
        layer_class="DeepseekV3DecoderLayer",
        rotary_class="DeepseekV3RotaryEmbedding",
        norm_class="DeepseekV3RMSNorm",
        parameters=wired,
        shared="mlp.shared_experts",
        latent=True,
        split=Split(),
    )


def flat(name: str, reference: str, *talks: Talk) -> Family:
    def read(config: Config) -> Architecture:
        expect(config, "model_type", name)
        return architecture(name, config)

    return Family(
        name=name,
        reference=reference,
        read=read,
        text=lambda config: config,
        arithmetic=ARITHMETIC,
        wiring=wiring(f"{MODELS}deepseek_v3.configuration_deepseek_v3:DeepseekV3Config"),
        engine=Engine(lambda name: name, mla.serving),
        talks=talks,
        mtp_key=MTP_KEY,
        released=plain_rope,
    )


DEEPSEEK_V3 = flat("deepseek_v3", "https://huggingface.co/deepseek-ai/DeepSeek-V3", R1, V3, V3_1, V3)
KIMI_K2 = flat("kimi_k2", "https://huggingface.co/moonshotai/Kimi-K2-Instruct", KIMI)
KIMI_K25 = Family(
    name="kimi_k25",
    reference="https://huggingface.co/moonshotai/Kimi-K2.5",
    read=read_kimi,
    text=lambda config: section(config, "text_config"),
    arithmetic=ARITHMETIC,
    wiring=wiring(f"{MODELS}kimi_k25.configuration_kimi_k25:Kimi_K25Config"),
    engine=Engine(lambda name: name, lambda config: mla.serving(section(config, "text_config"))),
    talks=(KIMI,),
    dtypes={"weight_shape": "I32"},
    released=released_kimi,
)
