"""Opening checkpoints: every oddity of the released files, exact values, and one sentence for whatever is wrong.

Values are held to a decoding written here in numpy, bit by bit; sizes to the figures published for the
releases; headers to what an enemy would write. Folders are small and random (tiny.py).
"""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moesaic.checkpoint import Checkpoint, read_header
from moesaic.errors import CheckpointError, FamilyError, MoesaicError

CONFIGS = Path(__file__).parent / "configs"
KINDS = [(family, source) for family in ("minimax_m2", "minimax_m3_vl") for source in ("native", "bf16")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def folder(request, tmp_path_factory) -> Path:
    """Both families, as quantized for release and in BF16."""
    family, source = request.param
    return tiny.make(tmp_path_factory.mktemp("checkpoint") / "model", family, source)


@pytest.fixture
def broken(m3, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(m3.path, tmp_path / "model"))


def stored(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the safetensors library."""
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Values of E4M3 bytes by the definition: 1 sign, 4 exponent bits with bias 7, 3 of mantissa, no infinity."""
    sign = np.where(codes >> 7, -1.0, 1.0)
    exponent, mantissa = ((codes >> 3) & 15).astype(np.int64), (codes & 7).astype(np.float64)
    value = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    return np.where((codes & 127) == 127, np.nan, sign * value)


def decoded(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """F64 values of a matrix: what FP8 blocks and MXFP8 mean, written out."""
    w = tensors[f"{name}.weight"]
    if w.dtype == torch.bfloat16:
        bits = w.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    scale, values = tensors[f"{name}.weight_scale_inv"], e4m3(w.view(torch.uint8).numpy())
    if scale.dtype == torch.uint8:
        return values * np.repeat(2.0 ** (scale.numpy().astype(np.float64) - 127), 32, 1)[:, : w.shape[1]]
    grid = np.repeat(np.repeat(scale.numpy().astype(np.float64), 128, 0), 128, 1)
    return values * grid[: w.shape[0], : w.shape[1]]


# What is there ----------------------------------------------------------------------------------------------------


def test_every_tensor_is_found_where_the_library_finds_it(folder):
    checkpoint, wanted = Checkpoint.open(folder), stored(folder)
    assert set(checkpoint.stored) == set(wanted) == {t.name for t in checkpoint.inventory}
    for name, tensor in wanted.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def test_values_are_exact(folder):
    checkpoint, tensors = Checkpoint.open(folder), stored(folder)
    for linear in checkpoint.architecture.linears:
        w_OI = checkpoint.decode(f"{linear.name}.weight")
        assert w_OI.dtype == torch.float32 and tuple(w_OI.shape) == linear.shape
        assert np.array_equal(w_OI.double().numpy(), decoded(tensors, linear.name).astype(np.float32)), linear.name
        assert torch.equal(w_OI, checkpoint.decode(linear.name))
    for info in checkpoint.architecture.tensors:
        assert torch.equal(checkpoint.decode(info.name), tensors[info.name].float()), info.name


def test_the_numpy_decoding_is_right():
    """By numbers worked by hand: 0x38 is 1, 0x7E is 448, 0x01 is 2^-9, 0xC4 is -3, 0x7F is no number."""
    assert e4m3(np.array([0x38, 0x7E, 0x01, 0xC4], np.uint8)).tolist() == [1.0, 448.0, 2.0**-9, -3.0]
    assert np.isnan(e4m3(np.array([0x7F, 0xFF], np.uint8))).all()


def test_some_rows_are_the_same_as_all_of_them(m3):
    name = m3.architecture.embedding
    whole = m3.read(name)
    for start, stop in ((0, 1), (7, 31), (len(whole) - 3, len(whole)), (5, 5), (0, len(whole))):
        assert torch.equal(m3.rows(name, start, stop), whole[start:stop])


def test_oddities_of_the_releases_are_really_in_these_folders(folder):
    """So that the tests above mean something."""
    checkpoint = Checkpoint.open(folder)
    a, dtypes = checkpoint.architecture, {n: s.info.dtype for n, s in checkpoint.stored.items()}
    files = sorted({s.file for s in checkpoint.stored.values()})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    native = "quantization_config" in checkpoint.config
    assert {dtypes[name] for router in a.routers.values() for name in router.tensors} == {"F32"}
    assert dtypes[a.embedding] == dtypes[a.head] == "BF16"
    if a.family == "minimax_m2":
        assert files == [f"model-{i:05d}-of-00008.safetensors" for i in range(3)]  # from zero, and 8 is a lie
        if native:
            assert dtypes[f"{a.linears[0].name}.weight_scale_inv"] == "F32"
            assert not [n for n in checkpoint.config["quantization_config"]["modules_to_not_convert"] if "embed" in n]
    else:
        indexer = next(n for n in a.linears if n.projection == "index_q")
        assert not native or (dtypes[f"{indexer.name}.weight"], dtypes[f"{indexer.name}.weight_scale_inv"]) == (
            "F8_E4M3",
            "U8",
        )
        assert dtypes["vision_tower.vision_model.embeddings.patch_embedding.weight"] == "F32"
        payload = sum(s.info.bytes for s in checkpoint.stored.values())
        assert (index["metadata"]["total_size"] == payload) == native, "the BF16 index lies"


RELEASED = {  # tensors, bytes, and elements by dtype, of the released files
    "m2.7": (96_103, 230_121_630_720, {"BF16": 1_230_021_632, "F8_E4M3": 227_410_968_576, "F32": 62_654_720}),
    "m3": (23_416, 854_172_958_720, {"BF16": 426_993_800_960, "F32": 46_339_200}),
    "m3_mxfp8": (
        45_838,
        443_742_085_120,
        {"BF16": 3_323_221_760, "F8_E4M3": 423_670_579_200, "U8": 13_239_705_600, "F32": 46_339_200},
    ),
}


@pytest.mark.parametrize("release", RELEASED)
def test_a_bare_config_gives_the_release_to_the_byte(release, tmp_path):
    shutil.copy(CONFIGS / f"{release}.json", tmp_path / "config.json")
    checkpoint = Checkpoint.open(tmp_path)
    elements: dict[str, int] = {}
    for t in checkpoint.inventory:
        elements[t.dtype] = elements.get(t.dtype, 0) + t.elements
    assert (len(checkpoint.inventory), sum(t.bytes for t in checkpoint.inventory), elements) == RELEASED[release]
    assert not checkpoint.has_weights and not any(".mtp." in t.name for t in checkpoint.inventory)
    with pytest.raises(CheckpointError, match="has no weights, only a config"):
        checkpoint.decode(checkpoint.architecture.linears[0].name)


def test_an_indexer_left_in_bf16_is_another_size(tmp_path):
    """The sum above can tell: with the indexer's 57 × 2 matrices unquantized it is not the release."""
    config = json.loads((CONFIGS / "m3_mxfp8.json").read_text())
    config["quantization_config"]["ignored_layers"] += ["index_q_proj", "index_k_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    assert sum(f == "bf16" for f in checkpoint.formats.values()) == 2 * 57
    assert sum(t.bytes for t in checkpoint.inventory) != RELEASED["m3_mxfp8"][1]


def test_identity_is_of_config_headers_and_samples(broken):
    before = Checkpoint.open(broken).identity
    file = next(broken.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    at = len(raw) // 2  # a sampled place: other weights under the same headers
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    assert Checkpoint.open(broken).identity != before
    file.write_bytes(raw)
    assert Checkpoint.open(broken).identity == before
    config = json.loads((broken / "config.json").read_text()) | {"rope_theta": 1.0}
    (broken / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(broken).identity != before


# Misread scales ---------------------------------------------------------------------------------------------------


def test_scales_misread_as_numbers_are_refused_by_magnitude(m3, tmp_path):
    """What public tools do: the exponent byte multiplied with, weights written out in BF16 some 10^5 times too large."""
    tensors = {i.name: m3.read(i.name) for i in m3.architecture.tensors}
    factors = []
    for linear in m3.architecture.linears:
        parts = m3.parts(linear)
        byte_OI = parts["blocks"].float().repeat_interleave(32, 1)[:, : linear.shape[1]]
        wrong_OI = parts["codes"].float() * byte_OI
        factors.append(float(wrong_OI.norm() / m3.decode(linear.name).norm()))
        tensors[f"{linear.name}.weight"] = wrong_OI.bfloat16()
    assert min(factors) > 50_000
    config = {k: v for k, v in m3.config.items() if k != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    misread = Checkpoint.open(tmp_path)  # nothing in the headers is wrong
    for linear in misread.architecture.linears:
        with pytest.raises(
            CheckpointError, match=rf"{linear.name} decodes to a root mean square of [\d.e+]+, wanted 1e-07 to 1000"
        ):
            misread.decode(linear.name)


@pytest.mark.parametrize("byte, why", [(200, "inf"), (140, r"\d"), (0, "0,")])
def test_a_damaged_exponent_is_refused(broken, byte, why):
    """200 is 2^73 and 140 is 2^13; 0, in all blocks, is 2^-127. (255, which is NaN: see test_damage.)"""
    checkpoint = Checkpoint.open(broken)
    linear = checkpoint.architecture.linears[0]
    where = checkpoint.where(f"{linear.name}.weight_scale_inv")
    raw = bytearray((broken / where.file).read_bytes())
    count = where.info.bytes if byte == 0 else 1
    raw[where.offset : where.offset + count] = bytes([byte]) * count
    (broken / where.file).write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{linear.name} decodes to a root mean square of {why}"):
        Checkpoint.open(broken).decode(linear.name)


# Folders that are not whole ---------------------------------------------------------------------------------------


def test_a_missing_shard(broken):
    sorted(broken.glob("*.safetensors"))[1].unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks the shard model-00002-of-00003\.safetensors that its index names; fetch it"
    ):
        Checkpoint.open(broken)


def test_a_missing_shard_without_an_index(broken):
    sorted(broken.glob("*.safetensors"))[1].unlink()
    (broken / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"is missing.* and \d+ more; get the complete"):
        Checkpoint.open(broken)


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
def test_a_truncated_shard(broken, keep):
    file = sorted(broken.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=rf"{file.name} (is not a complete|has [\d,]+ bytes, and its header describes)"
    ):
        Checkpoint.open(broken)


def test_a_shard_that_grows_shorter_after_opening(broken):
    checkpoint = Checkpoint.open(broken)
    name, where = max(checkpoint.stored.items(), key=lambda item: item[1].offset)
    with open(broken / where.file, "r+b") as f:
        f.truncate(where.offset + 1)
    with pytest.raises(CheckpointError, match=f"ends inside {name}"):
        checkpoint.read(name)
    (broken / where.file).unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.read(name)


def test_a_foreign_shard(broken):
    save_file({"other.weight": torch.ones(2)}, broken / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds other\.weight, which its index does not name; remove the stale shard"
    ):
        Checkpoint.open(broken)
    (broken / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"other\.weight does not belong to this model"):
        Checkpoint.open(broken)


def test_a_stale_copy_of_a_shard(broken):
    file = sorted(broken.glob("*.safetensors"))[0]
    shutil.copy(file, broken / "model-00009-of-00009.safetensors")
    with pytest.raises(
        CheckpointError, match=r"stands in model-00001-of-00003\.safetensors and in model-00009-of-00009"
    ):
        Checkpoint.open(broken)


def test_another_models_shard(broken, tmp_path):
    """Same names, other shapes."""
    other = tiny.make(tmp_path / "other", "minimax_m3_vl", vocab=336, hidden_size=256, intermediate_size=128)
    file = sorted(broken.glob("*.safetensors"))[0]
    shutil.copy(other / file.name, file)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is BF16 \[336, 256\], wanted BF16 \[320, 256\]"):
        Checkpoint.open(broken)


def test_a_folder_named_like_a_shard(broken):
    (broken / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.safetensors is a folder, wanted a plain file"):
        Checkpoint.open(broken)


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))


def test_an_index_that_names_others(broken):
    index = broken / "model.safetensors.index.json"
    rewrite(index, lambda body: body["weight_map"].update({"ghost.weight": "model-00001-of-00003.safetensors"}))
    with pytest.raises(
        CheckpointError, match=r"puts ghost\.weight in model-00001-of-00003\.safetensors, and it is in no shard"
    ):
        Checkpoint.open(broken)
    name = "language_model.lm_head.weight"
    rewrite(index, lambda body: body["weight_map"].pop("ghost.weight"))
    rewrite(index, lambda body: body["weight_map"].update({name: "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match=rf"puts {name} in model-00001\S+, and it is in model-00002"):
        Checkpoint.open(broken)
    rewrite(index, lambda body: body["weight_map"].pop(name))
    with pytest.raises(CheckpointError, match=f"holds {name}, which its index does not name"):
        Checkpoint.open(broken)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[" * 100_000]
)
def test_an_index_that_is_none(broken, text):
    (broken / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(broken)


@pytest.mark.parametrize(
    "shape, dtype, what",
    [((4, 3), torch.uint8, "is U8 [4, 3]"), ((256, 8), torch.float32, "is F32 [256, 8], wanted U8 [128, 8]")],
)
def test_a_scale_of_the_wrong_shape_or_kind(broken, shape, dtype, what):
    name = next(n for n in Checkpoint.open(broken).stored if n.endswith("index_q_proj.weight_scale_inv"))
    file = broken / Checkpoint.open(broken).where(name).file
    tensors = load_file(file)
    assert what.startswith("is U8 [4") or list(tensors[name].shape) != [256, 8]
    save_file(tensors | {name: torch.zeros(shape, dtype=dtype)}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is (U8 \[4, 3\]|F32 \[256, 8\]), wanted U8 \["):
        Checkpoint.open(broken)


# Configs ----------------------------------------------------------------------------------------------------------


def test_no_config(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", CONFIGS / "m3.json"):
        with pytest.raises(CheckpointError, match=r"has no config\.json; name the folder of a model"):
            Checkpoint.open(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_config_that_is_no_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_config_that_is_no_object(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json holds a \w+, wanted an object"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", None, 3, ["minimax_m2"], {}])
def test_an_unknown_family(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    with pytest.raises(FamilyError, match=r"moesaic knows deepseek_v3, .*minimax_m3_vl, .*\. Add families"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "release, path, value, sentence",
    [
        ("m2.7", "scoring_func", "softmax", "scoring_func = 'softmax'; this family's code was written for 'sigmoid'"),
        ("m2.7", "num_local_experts", "256", "num_local_experts = '256'; wanted a whole number from 1 to"),
        ("m2.7", "num_local_experts", 10**9, "num_local_experts = 1000000000; wanted a whole number from 1 to 8,192"),
        ("m2.7", "num_experts_per_tok", 257, "num_experts_per_tok = 257; wanted a whole number from 1 to 256"),
        ("m2.7", "attn_type_list", [1, 0], r"attn_type_list = \[1, 0\]"),
        ("m3", "text_config.hidden_act", "silu", "hidden_act = 'silu'; this family's code was written for 'swigluoai'"),
        ("m3", "text_config", None, "text_config = None; wanted an object"),
        ("m3", "text_config.moe_layer_freq", [1], "moe_layer_freq = .1.; wanted a 0 or 1 for each of 60 layers"),
        ("m3", "vision_config.patch_size", 0, "patch_size = 0; wanted a whole number"),
    ],
)
def test_a_value_that_nobody_wrote_code_for(tmp_path, release, path, value, sentence):
    config = json.loads((CONFIGS / f"{release}.json").read_text())
    put(config, path, value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FamilyError, match=sentence):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "release, path, value, sentence",
    [
        ("m2.7", "quantization_config.quant_method", "hqq", "quant_method 'hqq'; moesaic reads"),
        ("m2.7", "quantization_config.weight_block_size", [64, 64], r"in blocks \[64, 64\]"),
        ("m3_mxfp8", "quantization_config.weight_block_size", [1, 16], r"in blocks \[1, 16\]"),
        ("m3_mxfp8", "quantization_config.ignored_layers", 3, "ignored_layers = 3"),
        ("m3_mxfp8", "quantization_config", [], ""),
    ],
)
def test_a_container_that_nobody_wrote_code_for(tmp_path, release, path, value, sentence):
    config = json.loads((CONFIGS / f"{release}.json").read_text())
    put(config, path, value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not sentence:  # an empty section says nothing: a model in BF16
        assert Checkpoint.open(tmp_path).container.name == "unquantized"
        return
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.open(tmp_path)


def put(config: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        config = config[section]
    config[key] = value


def paths(config: dict[str, Any], above: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found += [above + key] + (paths(value, f"{above}{key}.") if isinstance(value, dict) else [])
    return found


@pytest.mark.parametrize("family", ["minimax_m2", "minimax_m3_vl"])
def test_whatever_a_config_says_it_is_read_or_refused_in_one_sentence(tmp_path, family):
    """Every key of every section taken away, or given values of the wrong kind."""
    original = (tiny.make(tmp_path / "model", family) / "config.json").read_text()
    folder, refused = tmp_path / "bare", 0
    folder.mkdir()
    for path in paths(json.loads(original)):
        for value in (None, "x", -1, 1.5, [None], {"x": 1}, 10**12):
            config = json.loads(original)
            put(config, path, value)
            (folder / "config.json").write_text(json.dumps(config))
            try:
                Checkpoint.open(folder).inventory  # noqa: B018
            except MoesaicError as error:
                assert str(error) and "\n" not in str(error)
                refused += 1
    assert refused > 100


# Hostile headers --------------------------------------------------------------------------------------------------


def write_raw(file: Path, header: bytes, payload: bytes = b"", length: int | None = None) -> Path:
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + payload)
    return file


def entry(shape: Any = (2,), offsets: Any = (0, 2), dtype: Any = "U8") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def test_a_plain_header_is_read(tmp_path):
    """The next test's other half: what the attacks start from is fine."""
    file = write_raw(tmp_path / "a", f'{{"a": {entry()}, "b": {entry((1, 2), (2, 4))}}}'.encode(), b"1234")
    assert [(i.name, i.dtype, i.shape, at - file.stat().st_size) for i, at in read_header(file)] == [
        ("a", "U8", (2,), -4),
        ("b", "U8", (1, 2), -2),
    ]


ATTACKS: dict[str, tuple[bytes, int]] = {  # header, payload bytes
    "is not valid JSON": (b"\x80\x00 not json", 0),
    "not valid JSON (maximum recursion": (b'{"a":' * 50_000, 0),
    "deep list": (b"[" * 100_000 + b"]" * 100_000, 0),
    "stands there twice": (f'{{"a": {entry()}, "a": {entry()}}}'.encode(), 2),
    "twice inside": (b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', 2),
    "a list": (b"[]", 0),
    "a number": (b"3", 0),
    "an entry that is none": (b'{"a": 3}', 0),
    "no dtype": (b'{"a": {"shape": [2], "data_offsets": [0, 2]}}', 2),
    "unknown dtype": (f'{{"a": {entry(dtype="F4")}}}'.encode(), 2),
    "dtype is a list": (f'{{"a": {entry(dtype=["U8"])}}}'.encode(), 2),
    "shape is text": (f'{{"a": {entry("ab")}}}'.encode(), 2),
    "shape of fractions": (f'{{"a": {entry((2.0,))}}}'.encode(), 2),
    "shape of flags": (f'{{"a": {entry((True, 2))}}}'.encode(), 2),
    "negative shape": (f'{{"a": {entry((-1, -2))}}}'.encode(), 2),
    "huge shape": (f'{{"a": {entry((10**30,))}}}'.encode(), 2),
    "shape of many axes": (f'{{"a": {entry((1,) * 100_000 + (2,))}}}'.encode(), 2),
    "huge product": (f'{{"a": {entry((2**62,) * 16)}}}'.encode(), 2),
    "three offsets": (f'{{"a": {entry(offsets=(0, 1, 2))}}}'.encode(), 2),
    "negative offset": (f'{{"a": {entry(offsets=(-2, 0))}}}'.encode(), 2),
    "offsets backwards": (f'{{"a": {entry(offsets=(2, 0))}}}'.encode(), 2),
    "offset of a fraction": (f'{{"a": {entry(offsets=(0, 2.0))}}}'.encode(), 2),
    "past the end": (f'{{"a": {entry((2000,), (0, 2000))}}}'.encode(), 2),
    "overlap": (f'{{"a": {entry()}, "b": {entry((2,), (1, 3))}}}'.encode(), 3),
    "the same range": (f'{{"a": {entry()}, "b": {entry()}}}'.encode(), 2),
    "a hole": (f'{{"a": {entry()}, "b": {entry((2,), (3, 5))}}}'.encode(), 5),
    "does not start at nought": (f'{{"a": {entry(offsets=(1, 3))}}}'.encode(), 3),
    "bytes that nothing names": (f'{{"a": {entry()}}}'.encode(), 3),
    "range is not the shape's": (f'{{"a": {entry((3,))}}}'.encode(), 2),
    "a name that cannot be printed": (f'{{"\\u001b[2J": {entry()}}}'.encode(), 2),
    "half a character": (f'{{"\\ud800": {entry()}}}'.encode(), 2),
    "a name without end": (f'{{"{"a" * 100_000}": {entry(dtype="x" * 9000)}}}'.encode(), 2),
    "utf-16": (f'{{"a": {entry()}}}'.encode("utf-16"), 2),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_header_is_refused_in_one_sentence_and_little_memory(tmp_path, attack):
    header, payload = ATTACKS[attack]
    file = write_raw(tmp_path / "model.safetensors", header, b"x" * payload)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert peak < 30 * len(header) + (1 << 20)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 200 << 20, 3])
def test_a_header_length_that_lies(tmp_path, length):
    file = write_raw(tmp_path / "model.safetensors", f'{{"a": {entry()}}}'.encode(), b"12", length)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.sampled_from(["U8", "F32", "", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F8_E4M3"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3)


@settings(max_examples=250, deadline=None)
@given(
    st.binary(max_size=200) | headers.map(lambda h: json.dumps(h).encode()), st.binary(max_size=24), st.integers(-4, 4)
)
@example(b'{"__metadata__": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', b"", 0)
def test_any_header_is_read_or_refused(tmp_path_factory, header, payload, lie):
    """And what is read, the library reads too, as the same tensors."""
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write_raw(file, header, payload, max(0, len(header) + lie))
    try:
        found = read_header(file)
    except CheckpointError:
        return
    with safe_open(file, "pt") as theirs:
        assert {i.name for i, _ in found} == set(theirs.keys())
        for info, _ in found:
            assert list(info.shape) == theirs.get_slice(info.name).get_shape()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_flipped_bytes_of_a_real_header_are_read_or_refused(m3, tmp_path_factory, data):
    raw = bytearray(sorted(m3.path.glob("*.safetensors"))[0].read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    file.write_bytes(raw)
    try:
        read_header(file)
    except CheckpointError as error:
        assert "\n" not in str(error)
