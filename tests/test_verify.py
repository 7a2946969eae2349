"""Verify: a clean export has no finding, and every planted fault is found, named, and exits 1.

Each fault is planted by hand in the bytes of a good export, and each check is shown to fail at least
once: a check that nothing can trip is not one.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moesaic.verify as verify_module
from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers import CONTAINERS
from moesaic.cli import main
from moesaic.errors import InputError
from moesaic.export import export
from moesaic.families import Linear
from moesaic.kernels import cpu
from moesaic.plan import Plan
from moesaic.recipes.quantize import formats_of
from moesaic.rounding import round_siblings
from moesaic.verify import linears, verify
from moesaic.verify.linears import check_values, not_finite
from moesaic.verify.verdict import Verdict

KEPT = {1: (0, 2, 3, 6), 2: (1, 4, 5, 7)}
MOE = "language_model.model.layers.1.block_sparse_moe"
EXPERT = f"{MOE}.experts.1.w1"


@pytest.fixture(scope="module")
def exports(m3: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that only copies, and one whose experts are rounded to MXFP4."""
    root = tmp_path_factory.mktemp("exports")
    units = {u: "mxfp4" if m[0].role == "experts" else "source" for u, m in m3.architecture.units.items()}
    export(m3, Plan("mxfp8", KEPT), root / "copied", quiet=True)
    export(m3, Plan("compressed_tensors", KEPT, units), root / "rounded", quiet=True)
    return {name: root / name for name in ("copied", "rounded")}


@pytest.fixture
def copied(exports, tmp_path) -> Path:
    return Path(shutil.copytree(exports["copied"], tmp_path / "copied"))


@pytest.fixture
def rounded(exports, tmp_path) -> Path:
    return Path(shutil.copytree(exports["rounded"], tmp_path / "rounded"))


# Planting ---------------------------------------------------------------------------------------------------------


def poke(path: Path, name: str, at: int, change: Callable[[int], int]) -> None:
    """Change one byte of a tensor where it lies."""
    where = Checkpoint.open(path).where(name)
    with open(path / where.file, "r+b") as f:
        f.seek(where.offset + at)
        byte = f.read(1)[0]
        assert change(byte) != byte, "nothing would be planted"
        f.seek(where.offset + at)
        f.write(bytes([change(byte)]))


def put(path: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a tensor by another of the same shape and dtype, in place."""
    where, checkpoint = Checkpoint.open(path).where(name), Checkpoint.open(path)
    old = checkpoint.read(name)
    data = change(old.clone()).contiguous()
    assert data.shape == old.shape and data.dtype == old.dtype and not torch.equal(data.float(), old.float())
    with open(path / where.file, "r+b") as f:
        f.seek(where.offset)
        f.write(data.reshape(-1).view(torch.uint8).numpy().tobytes())


def resave(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the only shard with other tensors, and the index to match."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict.fromkeys(tensors, file.name),
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))


def swap(path: Path, a: str, b: str) -> None:
    first, second = (Checkpoint.open(path).read(name) for name in (a, b))
    put(path, a, lambda _: second)
    put(path, b, lambda _: first)


def extra_expert(tensors: dict[str, Tensor]) -> None:
    """The fifth of four, in full."""
    for name in [n for n in tensors if f"{MOE}.experts.3." in n]:
        tensors[name.replace("experts.3.", "experts.4.")] = tensors[name].clone()


def stale_shard(path: Path) -> None:
    tensors = {f"{MOE}.experts.9.w1.weight": torch.zeros(4, 4, dtype=torch.uint8)}
    save_file(tensors, path / "model-00002-of-00002.safetensors")


def truncate(path: Path) -> None:
    (file,) = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])


def drop_gate(quantization: dict[str, Any]) -> None:
    """A router that an engine would then quantize."""
    quantization["ignored_layers"] = [n for n in quantization["ignored_layers"] if n != f"{MOE}.gate"]


CONFIG, INDEX, PLAN = "config.json", "model.safetensors.index.json", "moesaic/plan.json"

COPIED: dict[str, tuple[Callable[[Path], Any], str]] = {  # fault -> (how it is planted, what verify says)
    "a flipped bit in a copied code": (
        lambda p: poke(p, f"{EXPERT}.weight", 77, lambda b: b ^ 1),
        rf"bytes: {EXPERT} \(codes\) differs",
    ),
    "a flipped bit in a copied scale": (
        lambda p: poke(p, f"{EXPERT}.weight_scale_inv", 5, lambda b: b ^ 1),
        rf"bytes: {EXPERT} \(blocks\) differs",
    ),
    "a flipped bit in a norm": (
        lambda p: poke(p, "language_model.model.norm.weight", 3, lambda b: b ^ 1),
        r"bytes: language_model\.model\.norm\.weight differs",
    ),
    "a flipped bit in the vision tower": (
        lambda p: poke(p, "patch_merge_mlp.linear_1.bias", 2, lambda b: b ^ 1),
        r"bytes: patch_merge_mlp\.linear_1\.bias differs",
    ),
    "a rolled bias row": (
        lambda p: put(p, f"{MOE}.e_score_correction_bias", lambda t: t.roll(1)),
        rf"rows: {MOE}\.e_score_correction_bias differs from the source's kept rows",
    ),
    "permuted router rows": (
        lambda p: put(p, f"{MOE}.gate.weight", lambda t: t[[1, 0, 2, 3]]),
        rf"rows: {MOE}\.gate\.weight differs",
    ),
    "w1 and w3 swapped": (
        lambda p: swap(p, f"{MOE}.experts.0.w1.weight", f"{MOE}.experts.0.w3.weight"),
        rf"bytes: {MOE}\.experts\.0\.w1 \(codes\)(.|\n)*bytes: {MOE}\.experts\.0\.w3 \(codes\)",
    ),
    "two experts swapped": (
        lambda p: swap(p, f"{MOE}.experts.0.w2.weight", f"{MOE}.experts.2.w2.weight"),
        rf"bytes: {MOE}\.experts\.0\.w2 (.|\n)*bytes: {MOE}\.experts\.2\.w2 ",
    ),
    "a scale that is no number": (
        lambda p: poke(p, f"{EXPERT}.weight_scale_inv", 0, lambda b: 255),
        rf"finite: {EXPERT} decodes to 32 NaN or infinite values",
    ),
    "a code that is no number": (
        lambda p: poke(p, f"{EXPERT}.weight", 0, lambda b: 0x7F),
        rf"finite: {EXPERT} decodes to 1 NaN",
    ),
    "a router weight that is no number": (
        lambda p: put(p, f"{MOE}.gate.weight", lambda t: t.index_fill(0, torch.tensor([2]), torch.nan)),
        rf"finite: {MOE}\.gate\.weight holds 256 NaN",
    ),
    "an exponent byte 30 too high": (
        lambda p: poke(p, f"{EXPERT}.weight_scale_inv", 9, lambda b: b + 30),
        rf"magnitude: {EXPERT} decodes to a root mean square of \d",
    ),
    "scales 127 too low": (
        lambda p: put(p, f"{EXPERT}.weight_scale_inv", torch.zeros_like),
        rf"magnitude: {EXPERT} decodes to a root mean square of 0",
    ),
    "a missing scale": (
        lambda p: resave(p, lambda t: t.pop(f"{EXPERT}.weight_scale_inv")),
        rf"structure: {EXPERT}\.weight_scale_inv is missing",
    ),
    "a missing norm": (
        lambda p: resave(p, lambda t: t.pop("language_model.model.norm.weight")),
        r"structure: language_model\.model\.norm\.weight is missing",
    ),
    "an expert too many": (
        lambda p: resave(p, extra_expert),
        rf"structure: {MOE}\.experts\.4\.w1\.weight does not belong to this model",
    ),
    "an expert too many, counted in": (
        lambda p: (resave(p, extra_expert), edit(p / CONFIG, lambda c: c["text_config"].update(num_local_experts=5))),
        rf"structure: {MOE}\.experts\.4\.w2\.weight is not in what the plan makes",
    ),
    "a bias in BF16": (
        lambda p: resave(
            p, lambda t: t.update({f"{MOE}.e_score_correction_bias": t[f"{MOE}.e_score_correction_bias"].bfloat16()})
        ),
        rf"structure: {MOE}\.e_score_correction_bias is BF16 \[4\], wanted F32 \[4\]",
    ),
    "a stale shard": (
        stale_shard,
        r"structure: .* holds .*experts\.9\.w1\.weight, which its index does not name; remove the stale shard",
    ),
    "a stale shard, counted in": (
        lambda p: (stale_shard(p), (p / INDEX).unlink()),
        r"structure: .*experts\.9\.w1\.weight does not belong(.|\n)*index: model\.safetensors\.index\.json is missing",
    ),
    "a truncated shard": (
        truncate,
        r"structure: .*model-00001-of-00001\.safetensors has [\d,]+ bytes, and its header describes",
    ),
    "a wrong count in text_config": (
        lambda p: edit(p / CONFIG, lambda c: c["text_config"].update(num_local_experts=3)),
        rf"structure: {MOE}\.experts\.3\.w1\.weight does not belong",
    ),
    "a wrong count beside text_config": (
        lambda p: edit(p / CONFIG, lambda c: c.update(num_experts=8)),
        r"counts: config\.json num_experts is 8, and the layers hold 4 experts",
    ),
    "fewer experts than a token selects": (
        lambda p: edit(p / CONFIG, lambda c: c["text_config"].update(num_experts_per_tok=5)),
        r"structure: .*num_experts_per_tok = 5; wanted a whole number from 1 to 4",
    ),
    "another value in the config": (
        lambda p: edit(p / CONFIG, lambda c: c["text_config"].update(swiglu_limit=1.0)),
        r"counts: config\.json text_config\.swiglu_limit is not what the plan makes",
    ),
    "a router to be quantized": (
        lambda p: edit(p / CONFIG, lambda c: drop_gate(c["quantization_config"])),
        r"counts: config\.json quantization_config\.ignored_layers is not what the plan makes",
    ),
    "a total that lies": (
        lambda p: edit(p / INDEX, lambda i: i["metadata"].update(total_size=1)),
        r"index: model\.safetensors\.index\.json says total_size 1, and the shards hold \d+ bytes",
    ),
    "no total": (
        lambda p: edit(p / INDEX, lambda i: i.pop("metadata")),
        r"index: model\.safetensors\.index\.json says total_size None",
    ),
    "an index of another model": (
        lambda p: edit(p / INDEX, lambda i: i["weight_map"].pop(f"{EXPERT}.weight")),
        rf"structure: .* holds {EXPERT}\.weight, which its index does not name",
    ),
    "a changed tokenizer": (
        lambda p: (p / "tokenizer.json").write_text("{}"),
        r"files: tokenizer\.json differs from the source's",
    ),
    "a lost licence": (lambda p: (p / "LICENSE").unlink(), "files: LICENSE was not carried along"),
    "a half-written file": (
        lambda p: (p / ".x.partial").write_text("x"),
        r"files: \.x\.partial is half-written; run the export again",
    ),
    "another source's plan": (
        lambda p: edit(p / PLAN, lambda b: b["inputs"].update(source="0" * 16)),
        "plan: moesaic/plan.json is not this export's: .* was made from source 0000000000000000, and this is",
    ),
    "another plan": (
        lambda p: edit(p / PLAN, lambda b: b["kept"].update({"1": [0, 2, 3, 7]})),
        rf"rows: {MOE}\.gate\.weight differs(.|\n)*bytes: {MOE}\.experts\.3\.w1 ",
    ),
    "a plan of fewer experts": (
        lambda p: edit(p / PLAN, lambda b: b.update(kept={"1": [0, 2, 3], "2": [1, 4, 5]})),
        r"structure: .*experts\.3\.w1\.weight is not in what the plan makes",
    ),
    "a plan that is none": (
        lambda p: edit(p / PLAN, lambda b: b.pop("kept")),
        r"plan: moesaic/plan\.json is not this export's: .* not a complete plan",
    ),
    "a plan of no known rounding": (
        lambda p: edit(p / PLAN, lambda b: b.update(rounding="magic")),
        "unknown rounding 'magic'",
    ),
}

ROUNDED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "swapped nibbles": (
        lambda p: poke(p, f"{EXPERT}.weight_packed", 40, lambda b: (b << 4 | b >> 4) & 255),
        rf"codes: {EXPERT} has codes and 2 of [\d,]+ weights that rounding the source does not give",
    ),
    "one nibble": (
        lambda p: poke(p, f"{EXPERT}.weight_packed", 41, lambda b: b ^ 1),
        rf"codes: {EXPERT} has codes and 1 of [\d,]+ weights",
    ),
    "a scale one octave up": (
        lambda p: poke(p, f"{EXPERT}.weight_scale", 3, lambda b: b + 1),
        rf"codes: {EXPERT} has blocks and \d+ of [\d,]+ weights",
    ),
    "all scales two octaves up": (
        lambda p: put(p, f"{EXPERT}.weight_scale", lambda t: t + 2),
        rf"magnitude: {EXPERT} is 3\.9 times as large as the source's",
    ),
    "a scale that is no number": (
        lambda p: poke(p, f"{EXPERT}.weight_scale", 3, lambda b: 255),
        rf"finite: {EXPERT} decodes to 32 NaN",
    ),
    "a missing scale": (lambda p: resave(p, lambda t: t.pop(f"{EXPERT}.weight_scale")), rf"{EXPERT}"),
    "experts to be left alone": (
        lambda p: edit(p / CONFIG, lambda c: c["quantization_config"]["ignore"].append("re:.*experts.*")),
        r"structure: .*experts\.0\.w1",
    ),
    "an ignore entry lost": (
        lambda p: edit(p / CONFIG, lambda c: c["quantization_config"]["ignore"].pop()),
        r"counts: config\.json quantization_config\.ignore is not what the plan makes",
    ),
    "a flipped bit in what was copied": (
        lambda p: poke(p, "language_model.model.layers.1.self_attn.index_k_proj.weight", 9, lambda b: b ^ 1),
        r"bytes: .*index_k_proj \(codes\) differs",
    ),
}


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["verify", *map(str, words), "--quiet"])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("fault", COPIED)
def test_every_fault_in_a_copy_is_named(m3, copied, capsys, fault):
    plant, sentence = COPIED[fault]
    plant(copied)
    code, out = said(capsys, copied, "--source", m3.path)
    check_said(code, out, sentence)


@pytest.mark.parametrize("fault", ROUNDED)
def test_every_fault_in_a_rounded_export_is_named(m3, rounded, capsys, fault):
    plant, sentence = ROUNDED[fault]
    plant(rounded)
    code, out = said(capsys, rounded, "--source", m3.path)
    check_said(code, out, sentence)


def check_said(code: int, out: str, sentence: str) -> None:
    assert code == 1 and "all hold" not in out
    assert re.search(f"FAIL  .*{sentence}", out), out


def test_every_check_can_fail():
    """Between them, the sentences that the faults above are held to begin with every kind of check."""
    tripped = {sentence.split(":")[0] for _, sentence in (*COPIED.values(), *ROUNDED.values())}
    assert tripped >= {"structure", "plan", "counts", "index", "files", "finite", "magnitude", "bytes", "rows", "codes"}


# Clean ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["copied", "rounded"])
def test_a_clean_export_holds_and_everything_was_looked_at(m3, exports, capsys, name):
    tensors = len(Checkpoint.open(exports[name]).inventory)
    verdict = verify(exports[name], m3, quiet=True)
    assert verdict.holds and verdict.compared["finite"] == verdict.compared["structure"] == tensors
    assert sum(verdict.compared[check] for check in ("bytes", "rows", "codes")) == tensors
    assert verdict.compared["rows"] == 4 and verdict.compared["files"] == 5 and verdict.compared["index"] == 1
    assert (verdict.compared["codes"] > 0) == (name == "rounded")
    assert said(capsys, exports[name], "--source", m3.path)[0] == said(capsys, exports[name])[0] == 0


@pytest.mark.parametrize("kind", ["native", "bf16"])
@pytest.mark.parametrize("family", ["minimax_m2", "minimax_m3_vl"])
def test_a_source_holds_by_itself(tmp_path, family, kind):
    """Released files with an index that lies and shards that miscount are no fault of theirs."""
    verdict = verify(tiny.make(tmp_path / "model", family, kind), quiet=True)
    assert verdict.holds and verdict.compared["finite"] == verdict.compared["structure"]


def test_nothing_to_check_is_a_wrong_call(m3, copied, tmp_path, capsys):
    with pytest.raises(InputError, match=r"has no moesaic/plan\.json, so what it should be is unknown"):
        verify(m3.path, m3, quiet=True)
    (tmp_path / "bare").mkdir()
    shutil.copy(m3.path / "config.json", tmp_path / "bare" / "config.json")
    with pytest.raises(InputError, match="holds no weights"):
        verify(tmp_path / "bare", quiet=True)
    assert main(["verify", str(tmp_path / "bare"), "--quiet"]) == 2
    assert said(capsys, tmp_path / "nowhere")[0] == 1


def test_findings_come_in_the_models_order_whatever_the_threads(m3, copied):
    for name in [n for n in Checkpoint.open(copied).stored if n.endswith(".w2.weight")]:
        poke(copied, name, 0, lambda b: b ^ 1)
    found = [str(f) for f in verify(copied, m3, quiet=True).findings]
    assert len(found) == 16 and found == [str(f) for f in verify(copied, m3, quiet=True).findings]
    for check in ("bytes", "digest"):
        mine = [f for f in found if f.startswith(check)]
        assert len(mine) == 8 and mine == sorted(mine)


# Kernels and the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int2_g32", "int4_g32", "fp8_channel"])
def test_kernels_find_what_the_reference_finds(m3, tmp_path, monkeypatch, format):
    """Every group of matrices by the one, then by the other."""
    out, verdicts, calls = tmp_path / "out", [], []
    export(m3, Plan("compressed_tensors", formats=formats_of(m3, format, "experts", "source")), out, quiet=True)
    monkeypatch.setattr(linears, "round_siblings", lambda *a: calls.append(a) or round_siblings(*a))
    for every in (1, 1 << 60):
        monkeypatch.setattr(verify_module, "REFERENCE_EVERY", every)
        verdicts.append(verify(out, m3, quiet=True))
        assert len(calls) == 2 * 8 * 2  # layers, experts, and gate with up beside down: all of them in the first turn
    one, other = verdicts
    assert one.holds and other.holds and one.compared == other.compared and one.errors.keys() == other.errors.keys()
    for name, squares in one.errors.items():
        assert other.errors[name] == pytest.approx(squares, rel=1e-4)


def test_a_kernel_that_errs_the_same_twice_is_found_out(m3, tmp_path, monkeypatch):
    right = cpu.requantize

    def wrong(*args, **options):
        made = right(*args, **options)
        made.packed[0, 0] ^= 1
        return made

    monkeypatch.setattr(cpu, "requantize", wrong)
    export(
        m3,
        Plan("compressed_tensors", formats=formats_of(m3, "mxfp4", "experts", "source")),
        tmp_path / "out",
        quiet=True,
    )
    found = verify(tmp_path / "out", m3, quiet=True).findings
    assert found and {f.check for f in found} == {"codes"}


# Finite and plausible -----------------------------------------------------------------------------------------------


def packings() -> list[tuple[str, str]]:
    return [(c.name, format) for c in CONTAINERS.values() for format in c.packings]


@pytest.mark.parametrize("container, format", packings(), ids="-".join)
def test_a_magnitude_that_no_weight_has_is_found_in_every_packing(container, format):
    packing = CONTAINERS[container].packing(format)
    shape, generator = (128, 256), torch.Generator().manual_seed(0)
    linear = Linear("m", shape, "o", "u", 0, "o", "columns")
    normal, verdicts = torch.randn(shape, generator=generator) * 0.02, set()
    for factor in (1.0, 1e-4, 1e-9, 1e3, 1e6, 0.0):
        scales = packing.number_format.scales(normal * factor)
        stored = packing.pack(packing.number_format.encode(normal * factor, scales), scales)
        w_OI, verdict = packing.decode(stored, shape), Verdict()
        rms = float(w_OI.double().square().mean().sqrt())
        assert check_values(linear, packing, stored, verdict)
        assert verdict.holds == (1e-7 < rms < 1e3 or not rms)
        verdicts.add(verdict.holds)
    assert verdicts == {True, False}


def test_values_that_are_no_numbers_are_counted():
    x = torch.randn(100, 7).bfloat16()
    assert not_finite(x) == 0 and not_finite(torch.full((3,), 3e38)) == 0  # a norm that overflows is no proof
    x[3, 2], x[50] = torch.inf, torch.nan
    assert not_finite(x) == 8 and not_finite(torch.empty(0)) == 0
