"""Checkpoint folders of the Qwen3, OLMoE, Mixtral, GLM-4, DeepSeek-V3 and Kimi-K2 releases, from their config.json alone.

An independent witness: nothing here imports moesaic, so a name, a shape or a scale that moesaic gets wrong
is not wrong here in the same way. `tensors` lists what a release has on disk; `make` writes a tiny model,
`layer` one MoE layer of the released widths, `headers` a whole release that takes no room on the disk.
A tensor depends on the seed, its name and its shape alone.
"""

import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from replica_tokenizer import write_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

Config = dict[str, Any]
Shape = tuple[int, ...]
Kinds = dict[str, tuple[str, Shape]]  # tensor -> dtype, shape

CONFIGS = Path(__file__).parent / "configs"
SHARD = 5_000_000_000  # bytes, at most, of a release's file
BYTES = {"BF16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
LARGEST = 448.0  # of E4M3
BLOCK, GROUP = 128, 32  # of FP8 and of Kimi's int4
IN_FP8 = ("attention", "dense", "shared", "expert")  # roles; in Kimi's int4 releases only "expert" is quantized
# the config's word -> ours
SOURCES: dict[str | None, str] = {
    None: "bf16",
    "fp8": "fp8",
    "float-quantized": "fp8_channel",
    "pack-quantized": "int4",
}
MTP_APART = ("glm4_7",)  # configs whose release keeps the MTP layer in mtp.safetensors
ELEMENTS_AS_SIZE = ("glm4_7",)  # configs whose release has, in its index, a total_size of elements, not of bytes


@dataclass(frozen=True)
class Entry:
    """One tensor of the unquantized model."""

    name: str
    shape: Shape
    role: str  # one of IN_FP8, or embedding, head, norm, router, correction, bias, buffer, mtp, vision


def released(name: str) -> Config:
    config: Config = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def text(config: Config) -> Config:
    """The part of the config that describes the language model: Kimi-K2.5's lies inside."""
    inner: Config = config.get("text_config", config)
    return inner


def quantization(config: Config) -> Config:
    found: Config = text(config).get("quantization_config", {})
    return found


# --- what is on disk ---------------------------------------------------------------------------------


def tensors(config: Config, *, mtp_embedding: bool = True) -> Kinds:
    """Name -> (dtype, shape) of every tensor on disk, in the precision that `quantization_config` says.

    mtp_embedding  whether the MTP layer has embed_tokens and shared_head.head; GLM-4.6 has neither,
                   under the same config as GLM-4.7
    """
    return inventory(entries(config, mtp_embedding), config)


def entries(config: Config, mtp_embedding: bool = True) -> Iterator[Entry]:
    t, prefix = text(config), "language_model." if "text_config" in config else ""
    vocabulary, last = (t["vocab_size"], t["hidden_size"]), t["num_hidden_layers"]
    yield Entry(f"{prefix}model.embed_tokens.weight", vocabulary, "embedding")
    for index in range(last + t.get("num_nextn_predict_layers", 0)):
        name = f"{prefix}model.layers.{index}."
        yield from attention(name, t)
        if config["model_type"] == "kimi_k2":
            # a buffer that nobody reads: of the width hidden / heads first, of 256 with the long context
            width = 256 if t["max_position_embeddings"] > 131072 else t["hidden_size"] // t["num_attention_heads"]
            yield Entry(f"{name}self_attn.rotary_emb.inv_freq", (width // 2,), "buffer")
        yield from dense(name, t) if index < t.get("first_k_dense_replace", 0) else moe(name, t)
        if index >= last:
            yield from mtp(name, t, mtp_embedding)
    yield Entry(f"{prefix}model.norm.weight", (t["hidden_size"],), "norm")
    yield Entry(f"{prefix}lm_head.weight", vocabulary, "head")
    if "vision_config" in config:
        yield from vision(config["vision_config"])


def attention(name: str, t: Config) -> Iterator[Entry]:
    """With the two norms of the layer."""
    h, heads = t["hidden_size"], t["num_attention_heads"]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Entry(f"{name}{norm}.weight", (h,), "norm")
    matrices: dict[str, Shape]
    norms: dict[str, int] = {}
    if "kv_lora_rank" in t:
        q, kv, rope = t["q_lora_rank"], t["kv_lora_rank"], t["qk_rope_head_dim"]
        nope, value = t["qk_nope_head_dim"], t["v_head_dim"]
        matrices = {
            "q_a_proj": (q, h), "q_b_proj": (heads * (nope + rope), q), "kv_a_proj_with_mqa": (kv + rope, h),
            "kv_b_proj": (heads * (nope + value), kv), "o_proj": (h, heads * value),
        }  # fmt: skip
        norms = {"q_a_layernorm": q, "kv_a_layernorm": kv}
    else:
        width = t.get("head_dim") or h // heads
        q, kv = heads * width, t["num_key_value_heads"] * width
        matrices = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        if t["model_type"] == "olmoe":
            norms = {"q_norm": q, "k_norm": kv}
        elif t["model_type"] == "qwen3_moe" or t.get("use_qk_norm"):
            norms = {"q_norm": width, "k_norm": width}
    for part, shape in matrices.items():
        yield Entry(f"{name}self_attn.{part}.weight", shape, "attention")
        if t.get("attention_bias") and part in ("q_proj", "k_proj", "v_proj"):
            yield Entry(f"{name}self_attn.{part}.bias", shape[:1], "bias")
    for part, size in norms.items():
        yield Entry(f"{name}self_attn.{part}.weight", (size,), "norm")


def dense(name: str, t: Config) -> Iterator[Entry]:
    yield from gated(f"{name}mlp.", t["hidden_size"], t["intermediate_size"], "dense")


def moe(name: str, t: Config) -> Iterator[Entry]:
    mixtral = t["model_type"] == "mixtral"
    name += "block_sparse_moe." if mixtral else "mlp."
    h, i = t["hidden_size"], t.get("moe_intermediate_size") or t["intermediate_size"]
    experts = t[experts_key(t)]
    yield Entry(f"{name}gate.weight", (experts, h), "router")
    if "topk_group" in t:  # GLM, DeepSeek and Kimi: sigmoid routers
        yield Entry(f"{name}gate.e_score_correction_bias", (experts,), "correction")
    for expert in range(experts):
        words = ("w1", "w3", "w2") if mixtral else PROJECTIONS
        yield from gated(f"{name}experts.{expert}.", h, i, "expert", words)
    if t.get("n_shared_experts"):
        yield from gated(f"{name}shared_experts.", h, i * t["n_shared_experts"], "shared")


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def gated(name: str, h: int, i: int, role: str, words: tuple[str, str, str] = PROJECTIONS) -> Iterator[Entry]:
    for word, shape in zip(words, ((i, h), (i, h), (h, i))):
        yield Entry(f"{name}{word}.weight", shape, role)


def experts_key(t: Config) -> str:
    return next(key for key in ("n_routed_experts", "num_experts", "num_local_experts") if key in t)


def mtp(name: str, t: Config, embedding: bool) -> Iterator[Entry]:
    """What the MTP layer has beside a whole MoE layer."""
    h = t["hidden_size"]
    for part in ("enorm", "hnorm", "shared_head.norm"):
        yield Entry(f"{name}{part}.weight", (h,), "norm")
    yield Entry(f"{name}eh_proj.weight", (h, 2 * h), "mtp")
    if embedding:
        yield Entry(f"{name}embed_tokens.weight", (t["vocab_size"], h), "embedding")
        yield Entry(f"{name}shared_head.head.weight", (t["vocab_size"], h), "head")


def vision(v: Config) -> Iterator[Entry]:
    """Kimi-K2.5's tower and projector."""
    d, i, patch = v["vt_hidden_size"], v["vt_intermediate_size"], v["patch_size"]
    merged = math.prod(v["merge_kernel_size"]) * v["mm_hidden_size"]
    matrices: dict[str, Shape] = {"vision_tower.patch_embed.proj": (d, 3, patch, patch)}
    norms = {"vision_tower.encoder.final_layernorm": d, "mm_projector.pre_norm": v["mm_hidden_size"]}
    for block in range(v["vt_num_hidden_layers"]):
        name = f"vision_tower.encoder.blocks.{block}."
        matrices |= {name + "wqkv": (3 * d, d), name + "wo": (d, d)}
        matrices |= {name + "mlp.fc0": (i, d), name + "mlp.fc1": (d, i)}
        norms |= {name + "norm0": d, name + "norm1": d}
    matrices |= {"mm_projector.proj.0": (merged, merged), "mm_projector.proj.2": (v["text_hidden_size"], merged)}
    grid = (v["init_pos_emb_height"], v["init_pos_emb_width"], d)
    yield Entry("vision_tower.patch_embed.pos_emb.weight", grid, "vision")
    for name, shape in matrices.items():
        yield Entry(f"{name}.weight", shape, "vision")
        yield Entry(f"{name}.bias", shape[:1], "vision")
    for name, size in norms.items():
        yield Entry(f"{name}.weight", (size,), "norm")
        yield Entry(f"{name}.bias", (size,), "vision")


# --- precisions --------------------------------------------------------------------------------------


def method(entry: Entry, config: Config) -> str:
    """How this tensor is stored: as one of SOURCES, or "" (as it is)."""
    source = source_of(config)
    quantized = ("expert",) if source == "int4" else IN_FP8
    return source if source != "bf16" and entry.role in quantized else ""


def source_of(config: Config) -> str:
    q = quantization(config)
    return SOURCES[q.get("format", q.get("quant_method"))]


def stored(entry: Entry, config: Config) -> Kinds:
    name, shape = entry.name, entry.shape
    match method(entry, config):
        case "fp8":
            scale = "BF16" if config["model_type"] == "qwen3_moe" else "F32"
            blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
            return {name: ("F8_E4M3", shape), f"{name}_scale_inv": (scale, blocks)}
        case "fp8_channel":
            return {name: ("F8_E4M3", shape), f"{name}_scale": ("F32", (shape[0], 1))}
        case "int4":
            packed, groups = (shape[0], shape[1] // 8), (shape[0], shape[1] // GROUP)
            scale = f"{name}_scale"
            return {f"{name}_packed": ("I32", packed), scale: ("BF16", groups), f"{name}_shape": ("I32", (2,))}
    return {name: ("F32" if entry.role == "correction" else "BF16", shape)}


def encode(entry: Entry, value: Tensor, config: Config) -> dict[str, Tensor]:
    """The tensors that `stored` announces."""
    name, kinds = entry.name, stored(entry, config)
    match method(entry, config):
        case "fp8":
            dtype = DTYPES[kinds[f"{name}_scale_inv"][0]]
            powers = quantization(config).get("scale_fmt") == "ue8m0"
            codes, scales = fp8(value, dtype, powers)
            return {name: codes, f"{name}_scale_inv": scales}
        case "fp8_channel":
            step = value.abs().amax(1, keepdim=True) / LARGEST
            return {name: (value / step).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), f"{name}_scale": step}
        case "int4":
            packed, scales = int4(value)
            shape = torch.tensor(value.shape, dtype=torch.int32)
            return {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_shape": shape}
    return {name: value.to(DTYPES[kinds[name][0]])}


def fp8(w_OI: Tensor, dtype: torch.dtype, powers: bool) -> tuple[Tensor, Tensor]:
    """E4M3 and one scale for 128 × 128, the last blocks partial ones; `powers`: scales are powers of two."""
    o, i = w_OI.shape
    padded = pad(w_OI, (0, -i % BLOCK, 0, -o % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    step = (blocks.abs().amax((1, 3), keepdim=True) / LARGEST).clamp(min=2.0**-64)
    step = step.log2().ceil().exp2() if powers else step.to(dtype).float()  # values are divided by the scale stored
    codes = (blocks / step).clamp(-LARGEST, LARGEST).reshape(padded.shape)[:o, :i]
    return codes.to(torch.float8_e4m3fn), step[:, 0, :, 0].to(dtype)


def int4(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Eight codes an I32, lowest first, each the integer + 8; one BF16 scale, largest / 7.5, for 32 inputs."""
    groups = w_OI.unflatten(1, (-1, GROUP))
    step = (groups.abs().amax(2, keepdim=True) / 7.5).clamp(min=2.0**-64).bfloat16()
    codes = ((groups / step.float()).round().clamp(-8, 7) + 8).long().flatten(1).unflatten(1, (-1, 8))
    packed = (codes << (4 * torch.arange(8))).sum(2)
    return (packed - (packed >> 31 << 32)).to(torch.int32), step[..., 0]


# --- values ------------------------------------------------------------------------------------------


def value(entry: Entry, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {entry.name}".encode()))
    x = torch.randn(entry.shape, generator=generator)
    match entry.role:
        case "norm":
            return 1 + 0.1 * x
        case "correction":
            return 8 + 0.2 * x  # BF16 would leave steps of 1/16 or 1/32
        case "bias":
            return 0.1 * x
        case "buffer":
            return torch.logspace(0, -4, len(x)) * (1 + 0.01 * x)
        case "vision":
            return 0.02 * x
    return x * min(0.08, 2 / math.sqrt(entry.shape[1]))


# --- folders -----------------------------------------------------------------------------------------

EIGHT: Config = dict(num_hidden_layers=2, num_experts_per_tok=2)
TINY: dict[str, tuple[str, Config]] = {
    "qwen3_moe": (
        "qwen3_30b_a3b",
        EIGHT | dict(num_key_value_heads=2, head_dim=64, num_experts=8, max_window_layers=2),
    ),
    "olmoe": ("olmoe", EIGHT | dict(num_key_value_heads=4, intermediate_size=128, num_experts=8)),
    "mixtral": ("mixtral", EIGHT | dict(num_key_value_heads=2, intermediate_size=128)),
    "glm4_moe": (
        "glm4_7",
        dict(num_hidden_layers=3, first_k_dense_replace=1, num_key_value_heads=2, head_dim=64, n_routed_experts=8)
        | dict(num_experts_per_tok=2),
    ),
    "deepseek_v3": ("deepseek_v3", dict(n_group=4, topk_group=2)),
    "kimi_k2": ("kimi_k2", {}),
    "kimi_k25": ("kimi_k2_5", {}),
    "glm4_moe_lite": ("glm4_7_flash", EIGHT | dict(n_routed_experts=8, qk_nope_head_dim=192, v_head_dim=256)),
}
COMMON: Config = dict(
    vocab_size=512, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_attention_heads=4,
    max_position_embeddings=512,
)  # fmt: skip
MLA: Config = dict(
    num_hidden_layers=3, first_k_dense_replace=1, num_key_value_heads=4, n_routed_experts=16, num_experts_per_tok=4,
    q_lora_rank=64, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
)  # fmt: skip
VISION: Config = dict(
    vt_hidden_size=64, mm_hidden_size=64, vt_num_hidden_layers=1, vt_num_attention_heads=2, vt_intermediate_size=96,
    text_hidden_size=256, init_pos_emb_height=8, init_pos_emb_width=8,
)  # fmt: skip


def make(
    path: Path,
    family: str,
    source: str = "bf16",
    *,
    seed: int = 0,
    layers: int | None = None,
    mtp: bool = False,
    mtp_embedding: bool = True,
    shards: int = 3,
    **overrides: Any,
) -> Path:
    """Write a tiny model of `family` (a key of TINY) into the folder `path` and return it.

    source         "bf16", "fp8" (blocks), "fp8_channel" (GLM) or "int4" (Kimi)
    layers         all of them, the dense one that GLM, DeepSeek and Kimi begin with included
    mtp            with an MTP layer (GLM, DeepSeek); without `mtp_embedding` as GLM-4.6 has it
    overrides      further keys of the text config, by their names on disk
    """
    name, changes = TINY[family]
    config = released(name)
    t = text(config)
    common = COMMON | (MLA if "kv_lora_rank" in t else {})
    t.update({key: value for key, value in common.items() if key in t} | changes)
    if t.get("rope_scaling"):
        t["rope_scaling"] |= {"factor": 4.0, "original_max_position_embeddings": 128}
    if "vision_config" in config:
        config["vision_config"].update(VISION)
    if "num_nextn_predict_layers" in t:
        t["num_nextn_predict_layers"] = int(mtp)
    elif mtp:
        raise ValueError(f"{family} has no MTP layer")
    if layers is not None:
        t["num_hidden_layers"] = layers
    quantize(config, source)
    t.update(overrides)
    plan = list(entries(config, mtp_embedding))
    where = dealt(inventory(plan, config), shards, config) | apart(plan, config, name)
    return write(path, config, plan, where, seed, name)


def layer(
    path: Path, name: str, *, source: str | None = None, experts: int | None = None, vocab: int = 1024, seed: int = 0
) -> Path:
    """Write one MoE layer of the released widths; `name` is that of a config in tests/configs.

    source   as released, or one that `make` takes
    experts  how many; in groups as released, so DeepSeek-V3 takes multiples of 8 from 16 on

    GLM-4.7-Flash has its dense layer before it: transformers takes layer 0 for one whatever the config says.
    """
    config = released(name)
    t = text(config)
    first = int(t["model_type"] == "glm4_moe_lite")
    t.update(num_hidden_layers=1 + first, vocab_size=vocab)
    if "first_k_dense_replace" in t:
        t.update(first_k_dense_replace=first, num_nextn_predict_layers=0)
    if experts is not None:
        t.update({experts_key(t): experts, "num_experts_per_tok": min(t["num_experts_per_tok"], experts)})
    quantize(config, source or source_of(config))
    if "vision_config" in config:
        config["vision_config"] |= VISION | {"text_hidden_size": t["hidden_size"]}
    plan = list(entries(config))
    return write(path, config, plan, filled(inventory(plan, config), 1_000_000_000, config), seed, name)


def headers(path: Path, name: str, *, source: str | None = None, mtp_embedding: bool = True) -> Path:
    """Write a whole release without its values; `name` is that of a config in tests/configs.

    source   as released, or one that `make` takes

    Headers, offsets, sizes and index are a release's; the values are holes in the files, which read as zeros.
    There is no tokenizer.
    """
    config = released(name)
    quantize(config, source or source_of(config))
    plan = list(entries(config, mtp_embedding))
    kinds, own = inventory(plan, config), apart(plan, config, name)
    where = filled({name: kind for name, kind in kinds.items() if name not in own}, SHARD, config) | own
    path.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {}
    for tensor, shard in where.items():
        files.setdefault(shard, []).append(tensor)
    for shard, names in files.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in sorted(names, key=lambda n: (-BYTES[kinds[n][0]], n)):  # the order in which safetensors writes
            start, end = end, end + size(kinds[tensor])
            header[tensor] = {"dtype": kinds[tensor][0], "shape": kinds[tensor][1], "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (path / shard).open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            out.truncate(8 + len(encoded) + end)
    write_config(path, config, kinds, where, name)
    return path


def quantize(config: Config, source: str) -> None:
    """Set `quantization_config` where a release of this kind has it, in its words; "bf16" removes it.

    "fp8_channel" is how zai-org/GLM-4.5-Air-FP8 is stored: by compressed-tensors, one scale a row.
    """
    t = text(config)
    had = t.pop("quantization_config", {})
    match source:
        case "fp8":
            own = had.get("quant_method") == "fp8"
            t["quantization_config"] = had if own else released("deepseek_v3")["quantization_config"]
            if t["model_type"] == "qwen3_moe":
                words = ("input_layernorm", "mlp.gate", "post_attention_layernorm")
                names = (f"model.layers.{n}.{word}" for n in range(t["num_hidden_layers"]) for word in words)
                t["quantization_config"]["modules_to_not_convert"] = ["lm_head", *names]
        case "fp8_channel":
            plain = [entry.name for entry in entries(config) if entry.role in ("router", "mtp", "head")]
            weights = {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
            group = {"targets": ["Linear"], "weights": weights, "output_activations": None}
            group["input_activations"] = weights | {"dynamic": True, "strategy": "token"}
            t["quantization_config"] = {
                "config_groups": {"group_0": group}, "format": "float-quantized", "kv_cache_scheme": None,
                "ignore": [name.removesuffix(".weight") for name in plain], "quant_method": "compressed-tensors",
                "quantization_status": "compressed",
            }  # fmt: skip
        case "int4":
            t["quantization_config"] = released("kimi_k2_5")["text_config"]["quantization_config"]
        case "bf16":
            pass
        case _:
            raise ValueError(f"unknown source {source!r}; use {', '.join(SOURCES.values())}")


def inventory(plan: Iterable[Entry], config: Config) -> Kinds:
    return {name: kind for entry in plan for name, kind in stored(entry, config).items()}


def size(kind: tuple[str, Shape]) -> int:
    return BYTES[kind[0]] * math.prod(kind[1])


def dealt(kinds: Kinds, count: int, config: Config) -> dict[str, str]:
    """Tensor -> file, in turn, so that a weight and its scale lie in different files."""
    return {name: file(1 + i % count, count, config) for i, name in enumerate(kinds)}


def filled(kinds: Kinds, limit: int, config: Config) -> dict[str, str]:
    """Tensor -> file, one file after the other, each with at most `limit` bytes of tensors."""
    numbers, number, used = {}, 1, 0
    for name, kind in kinds.items():
        if used and used + size(kind) > limit:
            number, used = number + 1, 0
        used += size(kind)
        numbers[name] = number
    return {name: file(n, number, config) for name, n in numbers.items()}


def file(number: int, of: int, config: Config) -> str:
    """DeepSeek's and Kimi-K2.5's count of files has a digit more; Kimi-K2 writes bare numbers."""
    if config["model_type"] == "kimi_k2":
        return f"model-{number}-of-{of}.safetensors"
    digits = 6 if config["model_type"] in ("deepseek_v3", "kimi_k25") else 5
    return f"model-{number:05d}-of-{of:0{digits}d}.safetensors"


def apart(plan: Iterable[Entry], config: Config, name: str) -> dict[str, str]:
    """Tensor of the MTP layer -> file, where the release keeps it in a file of its own."""
    layer = f".layers.{text(config)['num_hidden_layers']}."
    mtp = [entry for entry in plan if name in MTP_APART and layer in entry.name]
    return dict.fromkeys(inventory(mtp, config), "mtp.safetensors")


def write(path: Path, config: Config, plan: Iterable[Entry], where: Mapping[str, str], seed: int, base: str) -> Path:
    """Values of every tensor, each file saved as soon as it is whole; then what lies beside them."""
    path.mkdir(parents=True, exist_ok=True)
    left, waiting = Counter(where.values()), defaultdict[str, dict[str, Tensor]](dict)
    for entry in plan:
        for name, tensor in encode(entry, value(entry, seed), config).items():
            shard = where[name]
            waiting[shard][name] = tensor.contiguous()
            if len(waiting[shard]) == left[shard]:
                save_file(waiting.pop(shard), path / shard, {"format": "pt"})
    ids = write_tokenizer(path, config["model_type"], text(config)["vocab_size"])
    for part in (config, text(config)):
        part.update({key: value for key, value in ids.items() if key in part})
    (path / "LICENSE").write_text("A licence text that has to travel with the weights.\n")
    write_config(path, config, inventory(plan, config), where, base)
    return path


def write_config(path: Path, config: Config, kinds: Kinds, where: Mapping[str, str], base: str) -> None:
    total = sum(math.prod(kind[1]) if base in ELEMENTS_AS_SIZE else size(kind) for kind in kinds.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config, indent=2))
