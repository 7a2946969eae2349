"""The writer of checkpoint folders, held to published totals, to transformers' own loaders and to plain arithmetic."""

import json
import os
import re
from collections import Counter
from math import prod
from pathlib import Path

import pytest
import replica
import torch
import transformers
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

# config, source ("": as released), tensors, elements, bytes. Published, so reproduced to the unit, are: elements by the
# hub's API (all but those of Kimi-K2.5 and the models without MTP), bytes by an index (Qwen3-30B and -235B, both
# Mixtrals, Kimi), tensors by an audit of headers (OLMoE, Qwen3-235B, Kimi). The rest is arithmetic, done twice.
TOTALS = [
    ("qwen3_30b_a3b", "", 18_867, 30_532_122_624, 61_064_245_248),
    ("qwen3_235b_a22b", "", 36_945, 235_093_634_560, 470_187_269_120),
    ("coder_480b", "", 30_321, 480_154_875_392, 960_309_750_784),
    ("qwen3_30b_a3b_fp8", "", 37_491, 30_533_947_392, 31_170_895_872),
    ("qwen3_235b_a22b", "fp8", 73_417, 235_107_904_512, 236_416_915_456),
    ("coder_480b", "fp8", 60_329, 480_184_064_000, 482_141_974_528),
    ("mixtral", "", 995, 46_702_792_704, 93_405_585_408),
    ("mixtral_8x22b", "", 1_739, 140_620_634_112, 281_241_268_224),
    ("olmoe", "", 3_219, 6_919_161_856, 13_838_323_712),
    ("glm4_7", "", 44_691, 358_337_791_296, 716_675_611_392),
    ("glm4_7", "without MTP", 44_189, 352_797_829_024, 705_595_686_528),
    ("glm4_7", "fp8_channel", 88_542, 358_458_391_872, 362_052_508_416),
    ("glm4_air", "", 18_329, 110_468_824_832, 220_937_661_440),
    ("glm4_air", "without MTP", 17_925, 106_852_251_264, 213_704_514_048),
    ("glm4_7_flash", "", 9_703, 31_221_488_576, 62_442_983_168),
    ("glm4_7_flash", "without MTP", 9_491, 29_943_393_920, 59_886_793_728),
    ("deepseek_v3", "", 91_991, 684_531_386_000, 688_574_839_360),
    ("deepseek_v3", "without MTP", 90_427, 671_067_257_432, 673_150_611_808),
    ("kimi_k2", "", 139_644, 1_026_470_731_056, 1_029_173_256_720),
    ("kimi_k2_thinking", "", 208_276, 170_267_046_016, 594_205_920_512),
    ("kimi_k2_5", "", 208_550, 170_738_182_128, 595_148_192_736),
]
FILES = {"glm4_7": 716_681_196_792, "kimi_k2": 1_029_190_981_272}  # bytes of all files of a release, with headers
CLASSES = {
    "qwen3_moe": transformers.Qwen3MoeForCausalLM, "olmoe": transformers.OlmoeForCausalLM,
    "mixtral": transformers.MixtralForCausalLM, "glm4_moe": transformers.Glm4MoeForCausalLM,
    "deepseek_v3": transformers.DeepseekV3ForCausalLM, "kimi_k2": transformers.DeepseekV3ForCausalLM,
    "kimi_k25": transformers.Kimi_K25ForConditionalGeneration, "glm4_moe_lite": transformers.Glm4MoeLiteForCausalLM,
}  # fmt: skip
FAMILIES = list(replica.TINY)


@pytest.mark.parametrize("name, source, tensors, elements, size", TOTALS)
def test_totals(name, source, tensors, elements, size):
    config = replica.released(name)
    if source == "without MTP":
        config["num_nextn_predict_layers"] = 0
    elif source:
        replica.quantize(config, source)
    kinds = replica.tensors(config).values()
    assert len(kinds) == tensors
    assert sum(prod(shape) for _, shape in kinds) == elements
    assert sum(map(replica.size, kinds)) == size


def test_deepseek_by_dtype():
    """As the hub counts them."""
    found = Counter()
    for dtype, shape in replica.tensors(replica.released("deepseek_v3")).values():
        found[dtype] += prod(shape)
    assert found == {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600}


def test_qwens_list_of_unquantized_modules_is_the_released_one():
    config = replica.released("qwen3_30b_a3b")
    replica.quantize(config, "fp8")
    assert config == replica.released("qwen3_30b_a3b_fp8")


def test_the_mtp_layer_of_glm_4_6_has_no_embedding():
    config = replica.released("glm4_7")
    less = replica.tensors(config, mtp_embedding=False)
    assert sum(prod(shape) for _, shape in less.values()) == 356_785_898_816, "as the hub counts GLM-4.6"
    gone = replica.tensors(config).keys() - less.keys()
    assert gone == {"model.layers.92.embed_tokens.weight", "model.layers.92.shared_head.head.weight"}


def test_kimis_tower_has_335_tensors():
    assert len(list(replica.vision(replica.released("kimi_k2_5")["vision_config"]))) == 335


def config_of(folder: Path) -> transformers.PreTrainedConfig:
    """As AutoConfig reads it; but transformers has no `kimi_k2` and reads none of Kimi-K2.5's words of the tower."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "kimi_k2":
        # with its own model_type transformers would not know how to fuse the experts, and would miss them all
        return transformers.DeepseekV3Config.from_dict(config | {"model_type": "deepseek_v3"})
    if config["model_type"] == "kimi_k25":
        v = config["vision_config"]
        v |= {key.removeprefix("vt_"): value for key, value in v.items()} | {"projection_hidden_size": 64}
        v |= {f"pos_emb_{side}": v[f"init_pos_emb_{side}"] for side in ("height", "width", "time")}
        config["projection_hidden_size"] = v["mm_hidden_size"]
        return transformers.Kimi_K25Config.from_dict(config)
    return AutoConfig.from_pretrained(folder)


def load(folder: Path, family: str) -> tuple[torch.nn.Module, dict[str, set[str]]]:
    transformers.utils.logging.set_verbosity_error()
    loaded: tuple[torch.nn.Module, dict[str, set[str]]] = CLASSES[family].from_pretrained(
        folder, config=config_of(folder), dtype=torch.float32, output_loading_info=True
    )
    return loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_tensor(tmp_path, family):
    folder = replica.make(tmp_path / "m", family)
    model, report = load(folder, family)
    assert not any(report.values()), report
    logits = model(input_ids=torch.arange(1, 33)[None]).logits
    assert logits.shape == (1, 32, 512) and logits.isfinite().all() and logits.std() > 0.3


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "glm4_moe_lite"])
def test_the_mtp_layer_is_all_that_transformers_does_not_know(tmp_path, family):
    _, report = load(replica.make(tmp_path / "m", family, mtp=True), family)
    unexpected = report.pop("unexpected_keys")
    last = json.loads((tmp_path / "m/config.json").read_text())["num_hidden_layers"]
    assert unexpected and all(f".layers.{last}." in name for name in unexpected) and not any(report.values())
    assert {"eh_proj.weight", "embed_tokens.weight"} <= {name.split(f".{last}.")[1] for name in unexpected}


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor, with its file checked against the index, and its kind against `tensors`."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            assert {index["weight_map"][name] for name in names} == {file.name}
            found |= {name: opened.get_tensor(name) for name in names}
    config = json.loads((folder / "config.json").read_text())
    words = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}
    assert {name: (words[t.dtype], tuple(t.shape)) for name, t in found.items()} == replica.tensors(config)
    counted = [t.numel() if config["model_type"] == "glm4_moe" else t.nbytes for t in found.values()]
    assert index["metadata"]["total_size"] == sum(counted)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_values(tmp_path, family):
    found = read(replica.make(tmp_path / "m", family, shards=4))
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 4
    for name, t in found.items():
        assert t.float().std() > 0
        if "norm" in name and name.endswith("weight"):
            assert 0.9 < t.float().mean() < 1.1
        if "e_score" in name:
            assert t.dtype == torch.float32 and 7.5 < t.mean() < 8.5 and (t != t.bfloat16()).any()
    again = read(replica.make(tmp_path / "again", family, shards=2))
    assert all(torch.equal(t, again[name]) for name, t in found.items())
    other = read(replica.make(tmp_path / "other", family, seed=1))
    assert not any(torch.equal(t, other[name]) for name, t in found.items())


def stretched(scales: Tensor, shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    wide = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: shape[0], : shape[1]]


def unpacked(packed: Tensor) -> Tensor:
    """Bit by bit, through bytes, not as the writer packs: a byte holds two codes, the lower first."""
    bytes_ = packed.contiguous().view(torch.uint8)
    return (torch.stack([bytes_ % 16, bytes_ // 16], -1).flatten(1)).float() - 8


FP8 = [("qwen3_moe", {}), ("glm4_moe", {}), ("deepseek_v3", {}), ("kimi_k2", {}), ("glm4_moe_lite", {})]
FP8 += [("deepseek_v3", {"quantization_config": replica.released("deepseek_v3_1")["quantization_config"]})]
FP8 += [("qwen3_moe", {"hidden_size": 320, "moe_intermediate_size": 192})]  # partial blocks both ways


@pytest.mark.parametrize("family, changes", FP8)
def test_fp8_decodes_to_the_values_but_for_its_rounding(tmp_path, family, changes):
    plain = read(replica.make(tmp_path / "bf16", family, **{k: v for k, v in changes.items() if "config" not in k}))
    coded = read(replica.make(tmp_path / "fp8", family, "fp8", **changes))
    rounded = [name for name, t in coded.items() if t.dtype == torch.float8_e4m3fn]
    assert len(rounded) >= 40 and not any(re.search("gate.weight|norm|embed|head|eh_proj", name) for name in rounded)
    for name, t in plain.items():
        if name not in rounded:
            assert torch.equal(t, coded[name])
            continue
        scales = coded[f"{name}_scale_inv"]
        assert scales.dtype == (torch.bfloat16 if family == "qwen3_moe" else torch.float32)
        if changes.get("quantization_config"):
            assert (scales.log2() % 1 == 0).all()
        step = stretched(scales, t.shape, 128, 128)
        error = (coded[name].float() * step - t.float()).abs()
        # half a step of E4M3 (3 bits of mantissa; 2^-10 below its normal numbers), and BF16's own
        assert (error <= t.float().abs() * (2**-4 + 2**-8) + step * 2**-10).all()
        assert error.max() > 0


def test_channel_fp8_decodes_by_its_row_scales(tmp_path):
    plain, coded = (read(replica.make(tmp_path / s, "glm4_moe", s, mtp=True)) for s in ("bf16", "fp8_channel"))
    blocks = read(replica.make(tmp_path / "fp8", "glm4_moe", "fp8", mtp=True))
    rounded = [name for name, t in coded.items() if t.dtype == torch.float8_e4m3fn]
    assert rounded == [name for name, t in blocks.items() if t.dtype == torch.float8_e4m3fn]
    for name in rounded:
        step, t = coded[f"{name}_scale"], plain[name].float()
        assert step.dtype == torch.float32 and step.shape == (len(t), 1)
        error = (coded[name].float() * step - t).abs()
        assert (error <= t.abs() * (2**-4 + 2**-8) + step * 2**-10).all() and error.max() > 0
    ignored = json.loads((tmp_path / "fp8_channel/config.json").read_text())["quantization_config"]["ignore"]
    assert not {f"{name}.weight" for name in ignored} & set(rounded)
    matrices = {name for name, t in plain.items() if t.ndim == 2 and "embed" not in name}
    assert matrices - set(rounded) == {f"{name}.weight" for name in ignored}


@pytest.mark.parametrize("family", ["kimi_k2", "kimi_k25"])
def test_int4_decodes_to_the_values_but_for_its_rounding(tmp_path, family):
    plain, coded = read(replica.make(tmp_path / "bf16", family)), read(replica.make(tmp_path / "int4", family, "int4"))
    rounded = [name for name in plain if f"{name}_packed" in coded]
    assert len(rounded) == 2 * 16 * 3 and all(".mlp.experts." in name for name in rounded)
    for name, t in plain.items():
        if name not in rounded:
            assert torch.equal(t, coded[name])
            continue
        assert coded[f"{name}_shape"].tolist() == list(t.shape)
        codes, step = unpacked(coded[f"{name}_packed"]), stretched(coded[f"{name}_scale"], t.shape, 1, 32)
        assert torch.equal(codes, unpack_from_int32(coded[f"{name}_packed"], 4, t.shape).float())
        assert codes.min() == -8 and codes.max() == 7
        error = (codes * step - t.float()).abs()
        assert (error <= step * (0.5 + 2 * 7.5 * 2**-8)).all()  # half a step, and BF16's rounding of value and scale
        assert error.max() > 0.4 * step.max()


@pytest.mark.parametrize("name", ["glm4_7", "kimi_k2"])
def test_headers_of_a_whole_release(tmp_path, name):
    folder = replica.headers(tmp_path / "m", name)
    assert json.loads((folder / "config.json").read_text()) == replica.released(name)
    kinds = replica.tensors(replica.released(name))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    counted = [prod(shape) if name == "glm4_7" else replica.size((dtype, shape)) for dtype, shape in kinds.values()]
    assert index["metadata"]["total_size"] == sum(counted)
    files = sorted(folder.glob("*.safetensors"))
    assert sum(os.stat(file).st_blocks * 512 for file in files) < 100_000_000 < sum(map(os.path.getsize, files)) / 1000
    assert all(os.path.getsize(file) < 5_100_000_000 for file in files if file.name != "mtp.safetensors")
    assert (folder / "mtp.safetensors").exists() == (name == "glm4_7")
    seen = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            seen |= set(names)
            for tensor in (names[0], names[-1]):
                part = opened.get_slice(tensor)
                assert (part.get_dtype(), tuple(part.get_shape())) == kinds[tensor]
                assert index["weight_map"][tensor] == file.name
    assert seen == kinds.keys() == index["weight_map"].keys()
    # so close only because the names are as long as the release's: its files are larger, its offsets have more digits
    assert abs(sum(map(os.path.getsize, files)) - FILES[name]) < 2 * len(kinds)


@pytest.mark.parametrize("name", ["qwen3_30b_a3b_fp8", "glm4_7_flash"])
def test_one_layer_of_the_released_widths(tmp_path, name):
    folder = replica.layer(tmp_path / "m", name, experts=4, vocab=512)
    released, found = replica.tensors(replica.released(name)), read(folder)
    layer = json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1
    assert {n for n in found if ".mlp.experts." in n and n.endswith("proj.weight")} == {
        f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")
    }
    same = [n for n in found if f"layers.{layer}." in n and "mlp.gate." not in n]
    assert all(tuple(found[n].shape) == released[n][1] for n in same)
