"""MiniMax-M3: dense layers first, then 128 experts with a shared one, and block-sparse attention with an indexer.

The language model sits under `language_model.`; the vision tower is carried along untouched. The
configs promise MTP modules (and the BF16 index counts one in its total_size), but no released file
holds a tensor of them, so none is expected.
"""

from typing import Any

from ..errors import FamilyError
from .base import (
    Architecture,
    Arithmetic,
    Engine,
    Family,
    Linear,
    Refusal,
    Router,
    Serving,
    Split,
    TensorInfo,
    Vision,
    Wiring,
)
from .blocks import attended, gated
from .rope import plain_rope
from .stated import MOST_EXPERTS, MOST_LAYERS, Config, count, expect, schedule, section
from .talk import Markup, Talk

PREFIX = "language_model.model.layers."
INDEXER_REFUSALS = (
    Refusal(
        "compressed_tensors", ("nvfp4", "nvfp4_a4"),
        "holds an indexer, which vLLM does not load in NVFP4; give it mxfp8, fp8_block or bf16",
    ),
    Refusal(
        "auto_round", (),
        "holds an indexer, which vLLM loads from auto-round models unquantized only; give it bf16, "
        "or write gptq or compressed_tensors",
    ),
)  # fmt: skip


def text(config: Config) -> Config:
    return section(config, "text_config")


SAVED = {  # key of transformers 5 -> the vendor's, within sparse_attention_config
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}
KINDS = {  # the same for lists of what each layer is: -> the vendor's list of 0 and 1
    "mlp_layer_types": {"dense": 0, "sparse": 1},
    "layer_types": {"full_attention": 0, "minimax_m3_sparse": 1},
}


def released(config: Config) -> Config:
    """config.json as the vendor writes it, from that or from what transformers 5 saves.

    transformers keeps the indexer's numbers flat, lists of layers in words, and of the activation no name. Raises
    `FamilyError` where both forms are there and differ.
    """
    if not isinstance(config.get("text_config"), dict):
        return config
    found = {**config, "text_config": plain_rope(released_text(config["text_config"]))}
    if isinstance(vision := config.get("vision_config"), dict):
        named = {"model_type": "clip_vision_model"} if vision.get("model_type") == "minimax_m3_vl_vision" else {}
        found["vision_config"] = plain_rope({**vision, **named})
    return found


def released_text(t: Config) -> Config:
    if not any(key in t for key in (*SAVED, *KINDS)):
        return t
    moe, sparse = (layer_flags(t, name) for name in KINDS)
    attention = {theirs: expect(t, ours) for ours, theirs in SAVED.items()} | {
        "use_sparse_attention": True, "sparse_attention_freq": sparse, "sparse_disable_index_value": sparse,
        "sparse_score_type": "max", "sparse_init_block": 0,
    }  # fmt: skip
    found = {key: value for key, value in t.items() if key not in (*SAVED, *KINDS, "model_type")}
    if found.get("hidden_act") == "silu":  # transformers' name for what swiglu_alpha and swiglu_limit describe
        found["hidden_act"] = "swigluoai"
    for key, value in (("moe_layer_freq", moe), ("sparse_attention_config", attention)):
        if (before := found.setdefault(key, value)) != value:
            raise FamilyError(
                f"config.json has {key} = {before!r:.160}, and transformers' keys beside it say {value!r:.160}; "
                "keep those that the model was trained with"
            )
    return found


def layer_flags(t: Config, name: str) -> list[int]:
    """A list of what each layer is, in the vendor's 0 and 1. Raises `FamilyError` for another word."""
    words = expect(t, name)
    if not isinstance(words, list) or any(word not in list(KINDS[name]) for word in words):
        raise FamilyError(f"config.json has {name} = {words!r:.120}; wanted {' or '.join(KINDS[name])} for each layer")
    return [KINDS[name][word] for word in words]


def read(config: Config) -> Architecture:
    """Every tensor of the model that `config` describes. Raises `FamilyError` for a value nobody wrote code for."""
    expect(config, "model_type", "minimax_m3_vl")
    t = text(config)
    check(t)
    layers, experts = count(t, "num_hidden_layers", MOST_LAYERS), count(t, "num_local_experts", MOST_EXPERTS)
    hidden, vocab = count(t, "hidden_size"), count(t, "vocab_size")
    sparse = t["sparse_attention_config"]["sparse_attention_freq"]
    moe_layers = tuple(i for i in range(layers) if t["moe_layer_freq"][i])
    linears: list[Linear] = []
    tensors = [
        TensorInfo("language_model.model.embed_tokens.weight", "BF16", (vocab, hidden), "embedding"),
        TensorInfo("language_model.lm_head.weight", "BF16", (vocab, hidden), "head"),
        TensorInfo("language_model.model.norm.weight", "BF16", (hidden,), "norm"),
    ]
    for layer in range(layers):
        linears += attention(t, layer, bool(sparse[layer]))
        linears += moe(t, layer) if layer in moe_layers else dense(t, layer)
        tensors += small_tensors(t, layer, bool(sparse[layer]), layer in moe_layers)
    tensors += vision(config)
    return Architecture(
        family="minimax_m3_vl", hidden=hidden, vocab=vocab, context=count(t, "max_position_embeddings"), layers=layers,
        routers={layer: router(layer) for layer in moe_layers}, experts=experts, top_k=count(t, "num_experts_per_tok", experts),
        layer_prefix=PREFIX, linears=tuple(linears), tensors=tuple(tensors),
        embedding="language_model.model.embed_tokens.weight", norm="language_model.model.norm.weight",
        head="language_model.lm_head.weight",
    )  # fmt: skip


def check(t: Config) -> None:
    """The values that the arithmetic below was written for."""
    for key, wanted in (
        ("scoring_func", "sigmoid"), ("use_routing_bias", True), ("use_qk_norm", True), ("qk_norm_type", "per_head"),
        ("use_gemma_norm", True), ("attention_output_gate", False), ("hidden_act", "swigluoai"),
        ("tie_word_embeddings", False), ("n_shared_experts", 1),
    ):  # fmt: skip
        expect(t, key, wanted)
    for key in (
        "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "dense_intermediate_size",
        "shared_intermediate_size",
    ):  # fmt: skip
        count(t, key)
    layers, s = count(t, "num_hidden_layers", MOST_LAYERS), section(t, "sparse_attention_config")
    for key in ("sparse_index_dim", "sparse_num_index_heads"):
        count(s, key)
    for key, wanted in (("use_sparse_attention", True), ("sparse_score_type", "max"), ("sparse_init_block", 0)):
        expect(s, key, wanted)
    # The indexer only selects; its value path is off on every sparse layer of every released file.
    expect(s, "sparse_disable_index_value", expect(s, "sparse_attention_freq"))
    schedule(t, "moe_layer_freq", layers)
    schedule(s, "sparse_attention_freq", layers)


def attention(t: Config, layer: int, sparse: bool) -> list[Linear]:
    """Where attention is sparse, the indexer's q and k are fused with q, k and v."""
    hidden, width, s = t["hidden_size"], t["head_dim"], t["sparse_attention_config"]
    q, kv, index = t["num_attention_heads"] * width, t["num_key_value_heads"] * width, s["sparse_index_dim"]
    at, indexer = f"{PREFIX}{layer}.self_attn.", list[Linear]()
    if sparse:
        facts: dict[str, Any] = dict(
            role="qkv", unit=f"layers.{layer}.qkv", layer=layer, fused="qkv", refusals=INDEXER_REFUSALS
        )
        indexer = [
            Linear(
                f"{at}index_q_proj",
                (s["sparse_num_index_heads"] * index, hidden),
                projection="index_q",
                cut="kv",
                **facts,
            ),
            Linear(f"{at}index_k_proj", (index, hidden), projection="index_k", cut="whole", **facts),
        ]
    return attended(at, hidden, q, kv, layer, indexer)


def dense(t: Config, layer: int) -> list[Linear]:
    return gated(
        f"{PREFIX}{layer}.mlp.", ("gate_proj", "up_proj", "down_proj"), t["hidden_size"], t["dense_intermediate_size"],
        role="dense", unit=f"layers.{layer}.dense", layer=layer,
    )  # fmt: skip


def moe(t: Config, layer: int) -> list[Linear]:
    at, hidden = f"{PREFIX}{layer}.block_sparse_moe.", t["hidden_size"]
    found: list[Linear] = []
    for e in range(t["num_local_experts"]):
        found += gated(
            f"{at}experts.{e}.", ("w1", "w3", "w2"), hidden, t["intermediate_size"],
            role="experts", unit=f"layers.{layer}.experts", layer=layer, expert=e,
        )  # fmt: skip
    return found + gated(
        f"{at}shared_experts.", ("gate_proj", "up_proj", "down_proj"), hidden,
        t["shared_intermediate_size"] * t["n_shared_experts"],
        role="shared", unit=f"layers.{layer}.shared", layer=layer,
    )  # fmt: skip


def small_tensors(t: Config, layer: int, sparse: bool, is_moe: bool) -> list[TensorInfo]:
    at, hidden, index = f"{PREFIX}{layer}.", t["hidden_size"], t["sparse_attention_config"]["sparse_index_dim"]
    norms = [("input_layernorm", hidden), ("self_attn.q_norm", t["head_dim"]), ("self_attn.k_norm", t["head_dim"])]
    if sparse:
        norms += [("self_attn.index_q_norm", index), ("self_attn.index_k_norm", index)]
    norms += [("post_attention_layernorm", hidden)]
    found = [TensorInfo(f"{at}{name}.weight", "BF16", (size,), "norm") for name, size in norms]
    if is_moe:
        e = t["num_local_experts"]
        found += [
            TensorInfo(f"{at}block_sparse_moe.gate.weight", "F32", (e, hidden), "router"),
            TensorInfo(f"{at}block_sparse_moe.e_score_correction_bias", "F32", (e,), "router_bias"),
        ]
    return found


def router(layer: int) -> Router:
    at = f"{PREFIX}{layer}.block_sparse_moe."
    return Router(f"{at}gate.weight", "sigmoid", correction=f"{at}e_score_correction_bias")


def vision(config: Config) -> list[TensorInfo]:
    """The vision tower and its projectors. `pre_layrnorm` is spelled so on disk, and there is no layer norm after."""
    v, hidden, out = (
        section(config, "vision_config"),
        text(config)["hidden_size"],
        count(config, "projector_hidden_size"),
    )
    width, inner, patch = count(v, "hidden_size"), count(v, "intermediate_size"), count(v, "patch_size")
    merge, colours = section(v, "img_token_compression_config"), count(v, "num_channels")
    frames, side = count(merge, "temporal_patch_size"), count(merge, "spatial_merge_size")
    at = "vision_tower.vision_model."
    found = [
        TensorInfo(f"{at}embeddings.patch_embedding.weight", "F32", (width, colours, frames, patch, patch), "vision"),
        *both(f"{at}pre_layrnorm", (width,)),
    ]
    for i in range(count(v, "num_hidden_layers", MOST_LAYERS)):
        block = f"{at}encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            found += both(block + norm, (width,))
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found += both(f"{block}self_attn.{projection}", (width, width))
        found += both(f"{block}mlp.fc1", (inner, width)) + both(f"{block}mlp.fc2", (width, inner))
    for projector, wide in (("multi_modal_projector", width), ("patch_merge_mlp", hidden * side * side)):
        found += both(f"{projector}.linear_1", (out, wide)) + both(f"{projector}.linear_2", (hidden, out))
    return found


def both(module: str, shape: tuple[int, ...]) -> list[TensorInfo]:
    return [
        TensorInfo(f"{module}.weight", "BF16", shape, "vision"),
        TensorInfo(f"{module}.bias", "BF16", shape[:1], "vision"),
    ]


def activate(t: Config, gate: Any, up: Any) -> Any:
    """SwiGLU-OAI: clamped gate · sigmoid(α gate) · (clamped up + 1)."""
    limit = t["swiglu_limit"]
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1.0) * (gate * (gate * t["swiglu_alpha"]).sigmoid())


def parameters(architecture: Architecture, layer: int) -> dict[str, tuple[str, ...]]:
    at = f"{PREFIX}{layer}."
    found: dict[str, tuple[str, ...]] = {
        f"{name}.weight": (f"{at}{name}.weight",)
        for name in (
            "input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm",
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        )
    }  # fmt: skip
    if f"{at}self_attn.index_q_proj" in architecture.by_name:
        for part in ("q_proj", "k_proj", "q_norm", "k_norm"):
            found[f"self_attn.indexer.{part}.weight"] = (f"{at}self_attn.index_{part}.weight",)
    moe = layer in architecture.moe_layers
    disk, ours = ("block_sparse_moe.shared_experts", "mlp.shared_experts") if moe else ("mlp", "mlp")
    found[f"{ours}.gate_up_proj.weight"] = (f"{at}{disk}.gate_proj.weight", f"{at}{disk}.up_proj.weight")
    found[f"{ours}.down_proj.weight"] = (f"{at}{disk}.down_proj.weight",)
    return found


def engine_name(name: str) -> str:
    """vLLM asks for expert projections by default names, whatever the disk says; all else keeps its name."""
    if ".experts." in name:
        stem, w = name.rsplit(".", 1)
        return f"{stem}.{ {'w1': 'gate_proj', 'w3': 'up_proj', 'w2': 'down_proj'}[w] }"
    return name


def serving(config: Config) -> Serving:
    """A page of the cache is one block of the sparse attention; FlashInfer, which vLLM prefers, has no pages of 128."""
    t = text(config)
    s = t["sparse_attention_config"]
    rows = ("q_proj", "k_proj", "v_proj", "fc1", "linear_1")  # of the vision tower; a matrix cut by rows cuts its bias
    cuts = {f"{name}.{part}": "rows" for name in rows for part in ("weight", "bias")}
    return Serving(
        heads=t["num_attention_heads"], kv_heads=t["num_key_value_heads"], head_width=t["head_dim"],
        cached_layers=t["num_hidden_layers"], index_layers=sum(s["sparse_attention_freq"]), index_width=s["sparse_index_dim"],
        index_tokens=s["sparse_topk_blocks"] * s["sparse_block_size"],
        cuts=cuts | {f"{name}.weight": "columns" for name in ("out_proj", "fc2", "linear_2")},
        block_tokens=s["sparse_block_size"], attention_backend="TRITON_ATTN",
    )  # fmt: skip


VISION = Vision(
    tower_class="MiniMaxM3VLVisionModel",
    projector_class="MiniMaxM3VLMultiModalProjector",
    modules={
        "vision_tower.vision_model.embeddings.patch_embedding.": "tower.embeddings.proj.",
        "vision_tower.vision_model.pre_layrnorm.": "tower.pre_layrnorm.",
        "vision_tower.vision_model.encoder.layers.": "tower.layers.",
        "multi_modal_projector.": "projector.",
        "patch_merge_mlp.": "projector.merge_",
    },
    around=("]<]start of image[>[", "]<]end of image[>["),
    least_pixels=56 * 56,
    most_pixels=672 * 672,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


MARK = "]<]minimax[>["
CALLS = Markup(
    block=(f"{MARK}<tool_call>", f"{MARK}</tool_call>"),
    call=(MARK + '<invoke name="{}">', f"{MARK}</invoke>"),
    value=(MARK + "<{}>", MARK + "</{}>"),
    gaps=("\n", "", "", "\n"),
    mark=MARK,
    nested=True,
)


MINIMAX_M3_VL = Family(
    name="minimax_m3_vl",
    reference="https://huggingface.co/MiniMaxAI/MiniMax-M3",
    read=read,
    text=text,
    arithmetic=Arithmetic(activate, routed_scale=lambda t: float(t["routed_scaling_factor"])),
    wiring=Wiring(
        modeling="transformers.models.minimax_m3_vl.modeling_minimax_m3_vl",
        configuration="transformers.models.minimax_m3_vl.configuration_minimax_m3_vl:MiniMaxM3VLConfig",
        layer_class="MiniMaxM3VLDecoderLayer",
        rotary_class="MiniMaxM3VLRotaryEmbedding",
        norm_class="MiniMaxM3VLRMSNorm",
        parameters=parameters,
        shared="mlp.shared_experts",
        block_scales=True,
        split=Split(),
    ),
    engine=Engine(engine_name, serving),
    talks=(Talk(("<mm:think>", "</mm:think>"), CALLS, tool_parser="minimax_m3", reasoning_parser="minimax_m3"),),
    released=released,
    vision=VISION,
)
