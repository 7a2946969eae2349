"""Small random checkpoints of each family as they lie on disk: names, dtypes, scales, shards, index, tokenizer, oddities.

The configs are the released ones (tests/configs), shrunk. Scales are computed here by plain torch, not
by moesaic's formats, so that reading them back is a check. A tensor depends on the seed, its name and
its shape alone. Everything is made in a fraction of a second; nothing is trained.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from moesaic.families import Architecture, TensorInfo, family_of

CONFIGS = Path(__file__).parent / "configs"
LARGEST = 448.0  # of E4M3
SPECIAL = ("[e~[", "]~!b[", "]~b]", "<think>", "</think>")  # ids from 256 on: end, begin, turn
CHAT = (
    "]~!b[{% if tools %}]~b]tools\n{{ tools | tojson }}[e~[\n{% endif %}"
    "{% for m in messages %}]~b]{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}[e~[\n{% endfor %}"
    "{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}"
)


def make(
    path: Path,
    family: str,
    source: str = "native",
    seed: int = 0,
    *,
    layers: int = 2,
    experts: int = 8,
    top_k: int = 2,
    vocab: int = 320,
    shards: int = 3,
    bias_offset: float = 0.0,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `family` ("minimax_m2", "minimax_m3_vl", "mixtral") into the folder `path` and return it.

    source       "native" (FP8 blocks, MXFP8, BF16) or "bf16"
    layers       MoE layers; M3 has a dense one besides, before them
    bias_offset  added to every correction bias: a large one makes any rounding of it show
    overrides    further keys of the text config, by their names on disk
    """
    native = source == "native"
    config = released(family, native)
    SHRINK[family](
        config, layers, dict(num_local_experts=experts, num_experts_per_tok=top_k, vocab_size=vocab) | overrides
    )
    architecture = family_of(config).read(config)
    tensors = values(architecture, config, seed, bias_offset)
    path.mkdir(parents=True, exist_ok=True)
    zero_based, lying = family == "minimax_m2", family == "minimax_m3_vl" and not native
    write_shards(path, tensors, shards, zero_based, lying)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(path, vocab)
    (path / "LICENSE").write_text("A licence text that has to travel with the weights.\n")
    return path


def released(family: str, native: bool) -> dict[str, Any]:
    name = {"minimax_m2": "m2.7", "minimax_m3_vl": "m3_mxfp8" if native else "m3"}.get(family, family)
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    if not native:
        config.pop("quantization_config", None)
    return config


def shrink_m2(config: dict[str, Any], layers: int, changes: Mapping[str, Any]) -> None:
    config.update(
        hidden_size=256, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        rotary_dim=16, num_hidden_layers=layers, attn_type_list=[1] * layers, max_position_embeddings=4096,
    )  # fmt: skip
    config.update(changes)


def shrink_m3(config: dict[str, Any], layers: int, changes: Mapping[str, Any]) -> None:
    """One dense layer with full attention, then `layers` sparse ones: blocks of 16 keys, 4 of them kept."""
    t, schedule = config["text_config"], [0] + [1] * layers
    t.update(
        hidden_size=128, intermediate_size=64, shared_intermediate_size=64, dense_intermediate_size=256,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, rotary_dim=16, num_hidden_layers=1 + layers,
        moe_layer_freq=schedule, max_position_embeddings=4096,
    )  # fmt: skip
    t["sparse_attention_config"].update(
        sparse_index_dim=32, sparse_num_index_heads=2, sparse_topk_blocks=4, sparse_block_size=16,
        sparse_attention_freq=schedule, sparse_disable_index_value=schedule,
    )  # fmt: skip
    t.update(changes)
    config["vision_config"].update(
        hidden_size=80, num_attention_heads=1, num_hidden_layers=1, intermediate_size=96, image_size=112,
        projection_dim=t["hidden_size"],
    )  # fmt: skip
    config.update(
        projector_hidden_size=t["hidden_size"],
        image_token_index=t["vocab_size"] - 3,
        video_token_index=t["vocab_size"] - 2,
    )
    if "quantization_config" in config:
        ignored = [name for name in config["quantization_config"]["ignored_layers"] if ".layers." not in name]
        gates = sorted(f"language_model.model.layers.{i}.block_sparse_moe.gate" for i in range(1, 1 + layers))
        config["quantization_config"]["ignored_layers"] = ignored + gates


def shrink_mixtral(config: dict[str, Any], layers: int, changes: Mapping[str, Any]) -> None:
    config.update(
        hidden_size=256, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=layers,
        max_position_embeddings=4096,
    )  # fmt: skip
    config.update(changes)


SHRINK = {"minimax_m2": shrink_m2, "minimax_m3_vl": shrink_m3, "mixtral": shrink_mixtral}


def values(architecture: Architecture, config: Mapping[str, Any], seed: int, bias_offset: float) -> dict[str, Tensor]:
    method = config.get("quantization_config", {}).get("quant_method")
    found = {info.name: small(info, architecture, seed, bias_offset) for info in architecture.tensors}
    for linear in architecture.linears:
        w_OI = matrix(linear.name, linear.shape, seed, 0.5 if linear.projection in ("o", "down") else 1.0)
        found |= encoded(f"{linear.name}.weight", w_OI, method)
    return found


def noise(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))


def matrix(name: str, shape: tuple[int, ...], seed: int, gain: float) -> Tensor:
    """A trained matrix's magnitudes: rows of different sizes and a few heavy entries."""
    w_OI = noise(name, shape, seed) * (0.3 * noise(f"{name} rows", (shape[0], 1), seed)).exp()
    w_OI[noise(f"{name} heavy", shape, seed) > 3.5] *= 4
    return gain / math.sqrt(shape[1]) * w_OI


def small(info: TensorInfo, architecture: Architecture, seed: int, bias_offset: float) -> Tensor:
    """Embedding, head, norms, routers and vision. A family whose norms multiply by 1 + w stores w around 0."""
    x = noise(info.name, info.shape, seed)
    match info.role:
        case "norm":
            x = 0.15 * x + (0.0 if architecture.family == "minimax_m3_vl" else 1.0)
        case "router" | "head":
            x = 2.0 / math.sqrt(info.shape[1]) * x
        case "router_bias":
            x = 0.1 * x + bias_offset
        case "vision":
            x = 0.02 * x
    return x.to(torch.float32 if info.dtype == "F32" else torch.bfloat16)


def encoded(name: str, w_OI: Tensor, method: str | None) -> dict[str, Tensor]:
    """BF16; or E4M3 with an F32 scale for 128 × 128; or E4M3 with a power of two, as its biased exponent, for 1 × 32."""
    if method is None:
        return {name: w_OI.bfloat16()}
    rows, columns = (128, 128) if method == "fp8" else (1, 32)
    (o, i), (ob, ib) = w_OI.shape, (-(-w_OI.shape[0] // rows), -(-w_OI.shape[1] // columns))
    padded = torch.nn.functional.pad(w_OI, (0, ib * columns - i, 0, ob * rows - o))
    blocks = padded.view(ob, rows, ib, columns)
    step = blocks.abs().amax((1, 3), keepdim=True) / LARGEST
    if method == "mxfp8":
        exponent = step.log2().ceil()
        step, stored = exponent.exp2(), (exponent + 127).to(torch.uint8)
    else:
        stored = step
    codes = (blocks / step).clamp(-LARGEST, LARGEST).reshape(padded.shape)[:o, :i].to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": stored.reshape(ob, ib)}


def write_shards(path: Path, tensors: Mapping[str, Tensor], count: int, zero_based: bool, lying: bool) -> None:
    """Tensors dealt to the shards in turn, so that a weight and its scale lie in different files.

    M2's files count from zero under a denominator that is five too large; the BF16 M3's index counts a
    module that is in no file.
    """
    first, of = (0, count + 5) if zero_based else (1, count)
    where = {name: f"model-{first + i % count:05d}-of-{of:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        part = {name: tensors[name].contiguous() for name in tensors if where[name] == file}
        save_file(part, path / file, {"format": "pt"})
    total = sum(t.numel() * t.itemsize for t in tensors.values())
    index = {"metadata": {"total_size": total + total // 57 * lying}, "weight_map": dict(sorted(where.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tokenizer(path: Path, vocab: int) -> None:
    """One token a byte, and the models' own words for begin, turn and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, special=word not in ("<think>", "</think>")) for word in SPECIAL])
    assert tokenizer.get_vocab_size() <= vocab
    tokenizer.save(str(path / "tokenizer.json"))
    end, begin = SPECIAL[:2]
    sizes = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "model_max_length": 4096,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(sizes, indent=2))
    (path / "chat_template.jinja").write_text(CHAT)
    generation = {"bos_token_id": 257, "eos_token_id": 256, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))
