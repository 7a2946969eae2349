"""Exports: what stays is the source's to the byte, what changes is what rounding says, and no death leaves a wrong file.

Sources and exports are read by the safetensors library. Deaths are real: a child process is killed or
interrupted at one of its own writing calls, disks are really full.
"""

import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import folders
import numpy as np
import pytest
import tiny
import torch
from children import child, contents, dying, mend_threads
from requantized import same_bits
from safetensors.torch import load_file
from torch import Tensor

import moesaic.checkpoint.shards as shards_module
import moesaic.export as export_module
from moesaic.checkpoint import Checkpoint, Stored, read_header
from moesaic.checkpoint.containers import CONTAINERS, Container, siblings
from moesaic.checkpoint.shards import Piece, Shard, plan_shards, write_shards
from moesaic.errors import CheckpointError, InputError, PlanError, StaleError
from moesaic.export import export
from moesaic.export.claim import claim
from moesaic.families import TensorInfo
from moesaic.kernels import cpu
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.plan.pieces import carried
from moesaic.progress import Meter
from moesaic.rounding import ROUNDINGS

SMALL = 200_000  # bytes a shard, so that a tiny model has several


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(export_module, "SHARD_BYTES", SMALL)


def stored(path: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def as_bytes(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        n: (str(t.dtype), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()
    }


def uneven(source: Checkpoint, count: int, seed: int = 0) -> dict[int, tuple[int, ...]]:
    """Other experts in every layer."""
    a, rng = source.architecture, np.random.default_rng(seed)
    return {layer: tuple(sorted(rng.permutation(a.experts)[:count].tolist())) for layer in a.moe_layers}


def pruning(source: Checkpoint, count: int = 4, seed: int = 0) -> Plan:
    return Plan(source.container.name, uneven(source, count, seed))


def rounding(source: Checkpoint, format: str, rest: str = "source", **more) -> Plan:
    units = {u: format if m[0].role == "experts" else rest for u, m in source.architecture.units.items()}
    return Plan("compressed_tensors", formats=units, **more)


def wanted_of(source: Checkpoint, plan: Plan) -> dict[str, Tensor]:
    """What pruning has to give, from the source's names alone."""
    found = {}
    for name, tensor in stored(source.path).items():
        words = name.split(".")
        if "block_sparse_moe" in words:
            kept = plan.kept[int(words[words.index("layers") + 1])]
            if words[-2] == "gate" or words[-1] == "e_score_correction_bias":
                tensor = tensor[list(kept)]
            if "experts" in words:
                at = words.index("experts") + 1
                if int(words[at]) not in kept:
                    continue
                words[at] = str(kept.index(int(words[at])))
        found[".".join(words)] = tensor
    return found


# Pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["minimax_m2", "minimax_m3_vl"])
@pytest.mark.parametrize("kind", ["native", "bf16"])
@pytest.mark.parametrize("count", [2, 5, 7])
def test_every_kept_tensor_is_the_sources_to_the_byte(tmp_path, small_shards, family, kind, count):
    """2 is the least that a token needs; 5 and 7 divide nothing."""
    source = Checkpoint.open(tiny.make(tmp_path / "source", family, kind))
    plan = pruning(source, count)
    result = export(source, plan, tmp_path / "out", quiet=True)
    found = stored(tmp_path / "out")
    assert as_bytes(found) == as_bytes(wanted_of(source, plan))
    assert result.architecture.experts == count and result.container.name == source.container.name


def test_counts_index_and_files(source, tmp_path, small_shards):
    out = tmp_path / "out"
    export(source, pruning(source, 3), out, quiet=True)
    before, after = (json.loads((p / "config.json").read_text()) for p in (source.path, out))
    text = after.get("text_config", after)
    assert text.pop("num_local_experts") == 3 and before.get("text_config", before).pop("num_local_experts") == 8
    assert after == before, "nothing else changed"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 2
    assert index["weight_map"] == {n: f for f in files for n in load_file(out / f)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())
    carried = {"LICENSE", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for name in carried:
        assert (out / name).read_bytes() == (source.path / name).read_bytes()
    assert {p.name for p in out.iterdir()} == {
        *carried,
        *files,
        "config.json",
        "model.safetensors.index.json",
        "moesaic",
    }


def test_a_count_that_stands_elsewhere_changes_too(m2, tmp_path):
    shutil.copytree(m2.path, tmp_path / "source")
    config = json.loads((m2.path / "config.json").read_text())
    config |= {"num_experts": 8, "draft": {"n_routed_experts": 8, "num_experts": 4}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    export(Checkpoint.open(tmp_path / "source"), pruning(m2, 3), tmp_path / "out", quiet=True)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (after["num_local_experts"], after["num_experts"], after["draft"]) == (
        3,
        3,
        {"n_routed_experts": 3, "num_experts": 4},
    )


def test_what_is_carried_along_and_what_is_not(m2, tmp_path):
    source = Path(shutil.copytree(m2.path, tmp_path / "source"))
    for name in ("code/modeling.py", "figures/a.png", ".cache/x", "README.md", "old.bin", "moesaic/note.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    os.symlink(source / "LICENSE", source / "LINK")  # as in a hub cache
    export(Checkpoint.open(source), pruning(m2), tmp_path / "out", quiet=True)
    out = contents(tmp_path / "out")
    assert out["code/modeling.py"] == b"code/modeling.py" and out["figures/a.png"] and out["LINK"] == out["LICENSE"]
    assert not {".cache/x", "README.md", "old.bin", "moesaic/note.json"} & set(out)


def test_the_same_call_gives_the_same_bytes(source, tmp_path, small_shards):
    plan = dataclasses.replace(rounding(source, "mxfp4"), kept=uneven(source, 5))
    for name in ("one", "two"):
        export(source, plan, tmp_path / name, quiet=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*.safetensors")}
    export(source, plan, tmp_path / "one", quiet=True)  # onto itself: nothing to do
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert before == {p: p.stat().st_mtime_ns for p in before}, "whole shards are not written again"


# Rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, rest", [("mxfp4", "source"), ("mxfp4", "bf16"), ("int4_g32", "bf16"), ("bf16", "bf16")]
)
def test_rounded_tensors_are_those_of_the_short_way(source, tmp_path, format, rest):
    """folders.py decodes, rounds and packs without plan, pieces or threads."""
    plan = rounding(source, format, rest)
    export(source, plan, tmp_path / "out", quiet=True)
    formats = {linear.name: plan.formats[linear.unit] for linear in source.architecture.linears}
    folders.write_folder(source, formats, "compressed_tensors", tmp_path / "slow")
    assert as_bytes(stored(tmp_path / "out")) == as_bytes(stored(tmp_path / "slow"))
    ours, theirs = (json.loads((tmp_path / p / "config.json").read_text()) for p in ("out", "slow"))
    assert ours == theirs


def test_gate_and_up_share_their_second_level_of_scale(m2, tmp_path):
    export(m2, rounding(m2, "nvfp4", "bf16"), tmp_path / "out", quiet=True)
    found, differs = stored(tmp_path / "out"), 0
    for layer, expert in itertools.product(m2.architecture.moe_layers, range(8)):
        w1, w2, w3 = (
            found[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight_global_scale"]
            for w in ("w1", "w2", "w3")
        )
        assert same(w1, w3)
        differs += not same(w1, w2)
    assert differs > 8, "or the test above could not fail"


def test_prune_and_round_in_one(source, tmp_path):
    plan = dataclasses.replace(rounding(source, "mxfp4"), kept=uneven(source, 3))
    both = export(source, plan, tmp_path / "both", quiet=True)
    first = export(source, pruning(source, 3), tmp_path / "pruned", quiet=True)
    second = export(first, rounding(first, "mxfp4"), tmp_path / "rounded", quiet=True)
    assert plan.kept == pruning(source, 3).kept
    assert as_bytes(stored(both.path)) == as_bytes(stored(second.path)) and both.config == second.config


def test_an_export_is_a_source(m3, tmp_path):
    """Pruned after rounding, the kept experts' packed bytes are copied; rounded once more, they are decoded from them."""
    first = export(m3, rounding(m3, "mxfp4"), tmp_path / "first", quiet=True)
    second = export(first, pruning(first, 3), tmp_path / "second", quiet=True)
    assert as_bytes(stored(second.path)) == as_bytes(wanted_of(first, pruning(first, 3)))
    third = export(first, rounding(first, "mxfp8"), tmp_path / "third", quiet=True)
    linear = next(n for n in first.architecture.linears if n.role == "experts")
    assert third.formats[linear.name] == "mxfp8"
    assert torch.equal(third.decode(linear.name), first.decode(linear.name)), "E4M3 holds every value of E2M1"


# Plans that cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"container": "zip"}, "unknown container 'zip'; choose from"),
        ({"rounding": "magic"}, "unknown rounding 'magic'; choose from"),
        ({"formats": {"layers.77.experts": "mxfp4"}}, r"names units that the model lacks: layers\.77\.experts"),
        ({"formats": {"layers.1.experts": "mxfp5"}}, "carries .* and not mxfp5"),
        ({"container": "fp8", "formats": {"layers.1.experts": "mxfp4"}}, "fp8 carries fp8_block, bf16 and not mxfp4"),
        ({"kept": {1: (0, 1)}}, "keeps experts in 1 layers, and the model has 2 MoE layers"),
        ({"kept": {0: (0,), 1: (1,)}}, "keeps 1 experts a layer; wanted at least 2, which each token selects"),
        ({"kept": {0: tuple(range(8)), 1: tuple(range(8))}}, "and fewer than the 8 there are"),
        ({"kept": {0: (0, 8), 1: (1, 2)}}, "keeps expert 8, and the source numbers them 0 to 7"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_the_first_byte(m2, tmp_path, change, sentence):
    plan = dataclasses.replace(rounding(m2, "mxfp4"), **change)
    with pytest.raises(PlanError, match=sentence):
        export(m2, plan, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists(), "or the corrected plan would find the folder taken"


def test_a_bare_config_can_be_planned_and_not_exported(tmp_path):
    shutil.copy(tiny.CONFIGS / "m2.7.json", tmp_path / "config.json")
    source = Checkpoint.open(tmp_path)
    plan = Plan("fp8", {layer: tuple(range(128)) for layer in source.architecture.moe_layers})
    half = Blueprint.of(source, plan).payload_bytes
    dropped = (
        62 * 128 * (3 * 3072 * 1536 + 3 * 24 * 12 * 4) + 62 * 128 * (3072 + 1) * 4
    )  # matrices, scales, router rows
    assert half == 230_121_630_720 - dropped
    with pytest.raises(CheckpointError, match="has no weights, only a config"):
        export(source, plan, tmp_path / "out", quiet=True)


# Folders that are taken -------------------------------------------------------------------------------------------


def test_a_folder_with_other_things_in_it(m2, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="out exists and was not written by moesaic; name another folder or remove it"):
        export(m2, pruning(m2), tmp_path / "out", quiet=True)
    assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}
    with pytest.raises(InputError, match=r"thesis\.txt exists and was not written"):
        export(m2, pruning(m2), tmp_path / "out" / "thesis.txt", quiet=True)


@pytest.mark.parametrize("inside", ["", "smaller"])
def test_the_sources_own_folder(m2, tmp_path, inside):
    source = Checkpoint.open(shutil.copytree(m2.path, tmp_path / "source"))
    before = contents(source.path)
    with pytest.raises(InputError, match="lies in the source's own folder"):
        export(source, pruning(m2), source.path / inside, quiet=True)
    assert contents(source.path) == before


def test_an_export_by_another_plan_or_of_another_source(m2, m3, tmp_path):
    export(m2, pruning(m2), tmp_path / "out", quiet=True)
    before = contents(tmp_path / "out")
    with pytest.raises(StaleError, match="holds an export by another plan"):
        export(m2, pruning(m2, seed=1), tmp_path / "out", quiet=True)
    with pytest.raises(StaleError, match="was made from source"):
        export(m3, pruning(m3), tmp_path / "out", quiet=True)
    assert contents(tmp_path / "out") == before


def test_a_shard_that_is_another_is_refused_and_one_that_is_torn_is_written_again(m2, tmp_path, small_shards):
    export(m2, pruning(m2), tmp_path / "out", quiet=True)
    before = contents(tmp_path / "out")
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))[:2]
    first.write_bytes(before[first.name][:-1])
    export(m2, pruning(m2), tmp_path / "out", quiet=True)
    assert contents(tmp_path / "out") == before
    shutil.copy(second, first)
    with pytest.raises(CheckpointError, match=f"{first.name} is not the shard that this command writes"):
        export(m2, pruning(m2), tmp_path / "out", quiet=True)


# Deaths -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Checkpoint:
    return Checkpoint.open(tiny.make(tmp_path_factory.mktemp("larger") / "m3", "minimax_m3_vl", shards=4))


@pytest.fixture(scope="module")
def mixed(larger) -> Plan:
    """Some copied, some sliced, some rounded."""
    return dataclasses.replace(rounding(larger, "mxfp4"), kept=uneven(larger, 4))


@pytest.fixture
def whole(larger, mixed, tmp_path, small_shards) -> dict[str, bytes]:
    """An export that nobody disturbed."""
    export(larger, mixed, tmp_path / "whole", quiet=True)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("sign, step", [(signal.SIGKILL, 11), (signal.SIGINT, 29)], ids=lambda x: str(x))
def test_after_any_death_the_same_call_finishes_the_same_folder(larger, mixed, whole, tmp_path, sign, step):
    """Death at the 1st, 12th, 23rd … writing call, until one survives; the last call of all writes config.json."""

    def work() -> None:
        export(larger, mixed, out, quiet=True)

    deaths = untidy = 0
    for at in itertools.count(1, step):
        out = tmp_path / f"out-{at}"
        code = child(dying(work, at, sign))
        if code == 0 and sign == signal.SIGKILL:
            break
        files = contents(out) if out.exists() else {}
        if code == 0:  # a worker's last call: the interrupt came when all was done
            assert files == whole
            break
        assert code == (130 if sign == signal.SIGINT else -signal.SIGKILL)
        deaths += 1
        hidden = [name for name in files if name.endswith(".partial")]
        untidy += sign == signal.SIGINT and bool(hidden)
        for name in set(files) - set(hidden):
            assert files[name] == whole[name] or name not in {n for n in files if n.endswith(".safetensors")}
        assert "config.json" not in files or files["config.json"] == whole["config.json"]
        work()
        assert contents(out) == whole, f"after death at call {at}"
        shutil.rmtree(out)
    assert deaths >= 5
    assert untidy <= 1, "an interrupted writer tidies up, unless the interrupt comes just when it does"


def test_death_by_the_clock(larger, mixed, whole, tmp_path):
    """Killed from outside at moments that nobody chose, time after time in the same folder."""
    started = time.monotonic()
    export(larger, mixed, tmp_path / "first", quiet=True)
    takes, out, deaths = time.monotonic() - started, tmp_path / "out", 0
    for part in (0.02, 0.2, 0.4, 0.6, 0.8):
        pid = os.fork()
        if not pid:
            mend_threads()
            export(larger, mixed, out, quiet=True)
            os._exit(0)
        time.sleep(part * takes)
        os.kill(pid, signal.SIGKILL)
        deaths += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    export(larger, mixed, out, quiet=True)
    assert contents(out) == whole and deaths


def test_no_room_is_said_before_the_first_byte(larger, mixed, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        InputError, match=r"has 1,000 bytes free and the model needs [\d,]+ more; make room, then run again"
    ):
        export(larger, mixed, tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_says_that_it_is_whole_is_on_the_disk_first(larger, mixed, tmp_path, monkeypatch):
    """Every file is synced before it gets its name, and the folder of the shards before config.json does."""
    told: list[tuple[str, str]] = []
    sync, move = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        told.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replace(old: Path, new: Path) -> None:
        told.append(("name", str(new)))
        assert ("sync", str(Path(old).resolve())) in told, f"{new} was named before its bytes were on the disk"
        move(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    out = (tmp_path / "out").resolve()
    export(larger, mixed, out, quiet=True)
    last = told.index(("name", str(out / "config.json")))
    shards = [told.index(("name", str(file))) for file in out.glob("*.safetensors")]
    assert shards and max(shards) < told.index(("sync", str(out))) < last
    assert all(("sync", str(out / file)) in told[:last] for file in carried(larger.path))


def test_leftovers_do_not_count_as_used(larger, mixed, whole, tmp_path, monkeypatch):
    """A killed export's half shard gives its bytes back before the room is measured."""
    out = tmp_path / "out"
    claim(out, Blueprint.of(larger, mixed))
    (out / ".model-00001-of-00009.safetensors.partial").write_bytes(b"x" * 10_000_000)
    measured = []
    usage = shutil.disk_usage

    def measure(path):
        measured.append([p.name for p in Path(path).glob(".*")])
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", measure)
    export(larger, mixed, out, quiet=True)
    assert measured == [[]] and contents(out) == whole


@pytest.mark.parametrize("limit", [100_000, 250_000])
def test_a_file_system_that_refuses_a_long_file(larger, mixed, whole, tmp_path, limit):
    """RLIMIT_FSIZE: the kernel itself fails the write in the middle of a shard."""
    out, said = tmp_path / "out", tmp_path / "said"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        export(larger, mixed, out, quiet=True)

    assert child(limited, said) == 2
    assert said.read_text().startswith(str(out)) and "cannot be written: File too large" in said.read_text()
    assert not [n for n in contents(out) if n.endswith(".partial")]
    export(larger, mixed, out, quiet=True)
    assert contents(out) == whole


@pytest.fixture
def tight_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a really full disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(larger, mixed, whole, tight_disk, monkeypatch):
    """Really full, in the middle of a shard, of a copied file, of config.json; more room, and the same call goes on."""
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: os.statvfs_result and shutil._ntuple_diskusage(2**40, 0, 2**40)
    )
    out, size, failed = tight_disk / "out", 1_000_000, 0
    need = sum(len(content) for content in whole.values())
    while True:
        try:
            export(larger, mixed, out, quiet=True)
            break
        except InputError as error:
            assert "cannot be written: the disk is full; make room, then run the same command again to continue" in str(
                error
            )
            assert not [n for n in contents(out) if n.endswith(".partial")]
            failed += 1
            size += 120_000
            subprocess.run(["mount", "-o", f"remount,size={size}", str(tight_disk)], check=True)
    assert contents(out) == whole and failed >= 3 and size < 2 * need


def test_a_source_that_vanishes(larger, mixed, tmp_path):
    source = Checkpoint.open(shutil.copytree(larger.path, tmp_path / "source"))
    for file in source.path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"safetensors cannot be read: No such file"):
        export(source, dataclasses.replace(mixed), tmp_path / "out", quiet=True)


# Copying ----------------------------------------------------------------------------------------------------------


def refusing(error: int):
    def call(*args):
        raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize("way", ["whole", "bit by bit", "not at all", "not across", "short writes"])
def test_every_way_of_copying_gives_the_same(larger, mixed, whole, tmp_path, monkeypatch, way):
    real, pwrite = getattr(os, "copy_file_range", None), os.pwrite
    if real is None:
        pytest.skip("this system cannot copy inside the kernel")
    match way:
        case "bit by bit":  # the kernel may copy less than it is asked for
            monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *at: real(a, b, min(count, 999), *at))
        case "not at all":
            monkeypatch.delattr(os, "copy_file_range")
        case "not across":
            monkeypatch.setattr(os, "copy_file_range", refusing(18))  # EXDEV
        case "short writes":
            monkeypatch.delattr(os, "copy_file_range")
            monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:777], at))
    export(larger, mixed, tmp_path / "out", quiet=True)
    assert contents(tmp_path / "out") == whole


def test_from_one_file_system_to_another(larger, mixed, whole, tight_disk):
    subprocess.run(["mount", "-o", "remount,size=16m", str(tight_disk)], check=True)
    assert tight_disk.stat().st_dev != larger.path.stat().st_dev
    export(larger, mixed, tight_disk / "out", quiet=True)
    assert contents(tight_disk / "out") == whole


def test_an_error_of_the_disk_is_not_swallowed(larger, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", refusing(5), raising=False)  # EIO
    with pytest.raises(InputError, match="cannot be written: Input/output error"):
        export(larger, mixed, tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_error_of_the_source_s_disk_is_of_the_source(larger, mixed, tmp_path, monkeypatch):
    """Whichever of copying in the kernel, copying through memory and hashing meets it first."""
    for ways in (("copy_file_range", "pread"), ("pread",), ("preadv",)):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
            for way in ways:
                patch.setattr(os, way, refusing(5), raising=False)  # EIO
            if ways == ("pread",):
                patch.delattr(os, "copy_file_range", raising=False)
            export(larger, mixed, tmp_path / "out", quiet=True)
        said = str(caught.value)
        assert said.startswith(str(larger.path)) and "cannot be read: Input/output error" in said, (ways, said)


# Shards -----------------------------------------------------------------------------------------------------------


def piece(name: str, count: int, dtype: str = "U8") -> Piece:
    return Piece((TensorInfo(name, dtype, (count,)),), make=lambda: (torch.arange(count, dtype=torch.uint8),))


def test_pieces_fill_shards_in_their_order():
    shards = plan_shards([piece("a", 4), piece("b", 5), piece("c", 20), piece("d", 1)], limit=10)
    assert [[p.tensors[0].name for p in s.pieces] for s in shards] == [["a", "b"], ["c"], ["d"]]
    assert [s.payload_bytes for s in shards] == [9, 20, 1] and shards[1].file == "model-00002-of-00003.safetensors"


def test_tensors_are_aligned_in_the_file(larger, mixed, whole):
    """The header comes in eights and wide elements first, so that nothing straddles its own alignment."""
    for name, content in whole.items():
        if name.endswith(".safetensors"):
            length = int.from_bytes(content[:8], "little")
            assert length % 8 == 0
            for key, entry in json.loads(content[8 : 8 + length]).items():
                width = {"F32": 4, "BF16": 2, "I64": 8}.get(entry.get("dtype"), 1)
                assert key == "__metadata__" or entry["data_offsets"][0] % width == 0


def test_a_model_that_is_not_small_is_two_files_at_least(m2, tmp_path, monkeypatch):
    """Of about one size: two are written at a time."""
    monkeypatch.setattr(shards_module, "SMALL", 100_000)
    export(m2, pruning(m2), tmp_path / "out", quiet=True)
    first, second = (p.stat().st_size for p in sorted((tmp_path / "out").glob("*.safetensors")))
    assert 0.4 < first / (first + second) < 0.7
    assert as_bytes(stored(tmp_path / "out")) == as_bytes(wanted_of(m2, pruning(m2)))
    assert all(len(read_header(p)) for p in (tmp_path / "out").glob("*.safetensors"))


def test_most_copied_bytes_keep_their_place_in_a_page(tmp_path, monkeypatch):
    """Two thirds lie 264 bytes into a page, and would lie elsewhere without the padding."""
    monkeypatch.setattr(shards_module, "SMALL", 0)
    offsets = {"a": 264, "b": 3 * 4096 + 264, "c": 7 * 4096 + 1000}
    (tmp_path / "source").write_bytes(bytes(i % 251 for i in range(12 * 4096)))
    infos = {name: shards_module.TensorInfo(name, "U8", (4096,)) for name in offsets}
    pieces = [Piece((infos[n],), copy=(tmp_path, Stored(infos[n], "source", at))) for n, at in offsets.items()]
    shard = Shard("model.safetensors", pieces, 3 * 4096)
    _, starts = shard.layout()
    assert [(starts[n] - at) % 4096 for n, at in offsets.items()][:2] == [0, 0]
    write_shards(tmp_path, [shard], Meter("test", 3 * 4096, "B"))
    found, raw = load_file(tmp_path / "model.safetensors"), (tmp_path / "source").read_bytes()
    assert all(found[n].numpy().tobytes() == raw[at : at + 4096] for n, at in offsets.items())


@pytest.mark.parametrize("made", [torch.zeros(3, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)])
def test_a_tensor_of_the_wrong_size_is_never_written(tmp_path, made):
    shard = Shard("model.safetensors", [Piece(piece("a", 4).tensors, make=lambda: (made,))], 4)
    with pytest.raises(CheckpointError, match=f"a came out as {len(made)} bytes, wanted 4"):
        write_shards(tmp_path, [shard], Meter("test", 4, "B"))
    assert not list(tmp_path.iterdir())


def test_scalars_and_columns_are_written_as_they_are(tmp_path):
    info = shards_module.TensorInfo
    values = (torch.tensor(3.5), torch.arange(6.0).reshape(2, 3).t())
    shard = Shard("m.safetensors", [Piece((info("s", "F32", ()), info("t", "F32", (3, 2))), make=lambda: values)], 28)
    meter = Meter("test", 28, "B")
    assert write_shards(tmp_path, [shard], meter) == meter.done == 28
    found = load_file(tmp_path / "m.safetensors")
    assert same(found["s"], values[0]) and torch.equal(found["t"], values[1])


def test_containers_of_the_sources_write_only_their_own(m2):
    with pytest.raises(PlanError, match="mxfp8 container writes models that are mxfp8 throughout"):
        Blueprint.of(m2, Plan("mxfp8", formats=dict.fromkeys(m2.architecture.units, "mxfp8")))
    assert (
        Blueprint.of(m2, Plan("unquantized", formats=dict.fromkeys(m2.architecture.units, "bf16"))).container
        is CONTAINERS["unquantized"]
    )


# Kernels -----------------------------------------------------------------------------------------------------------

WRITTEN = [
    (container, format)
    for container in CONTAINERS.values()
    for format, packing in container.packings.items()
    if packing.format in cpu.TARGETS and container.name in ("compressed_tensors", "auto_round", "gptq", "mlx")
]


@pytest.mark.parametrize(("container", "format"), WRITTEN, ids=lambda value: getattr(value, "name", value))
def test_kernels_write_the_bytes_of_the_reference(minimax: Checkpoint, container: Container, format: str) -> None:
    """Every format that they know, in every container, gate and up of an expert, and its down: tensors and their order."""
    units = minimax.architecture.units.items()
    rest = "mxfp8" if (container.name, format) == ("mlx", "bf16") else "bf16"  # MLX has no folder of BF16 alone
    formats = {u: format if members[0].role == "experts" else rest for u, members in units}
    plan = Plan(
        container.name, formats=formats, activations={f"layers.1.experts.{p}": 3.0 for p in ("gate_up", "down")}
    )
    blueprint, rtn = Blueprint.of(minimax, plan), ROUNDINGS["rtn"]
    for group in siblings([n for n in blueprint.architecture.linears if n.layer == 1 and n.expert == 3]):
        assert export_module.in_kernels(blueprint, group)
        ours = list(export_module.through_kernels(blueprint, group, False))
        slow = list(export_module.through_values(blueprint, group, rtn))
        assert len(ours) == len(slow)
        assert all(same_bits(a, b) for a, b in zip(ours, slow))


def test_kernels_read_what_lies_in_other_containers(m3: Checkpoint, tmp_path: Path) -> None:
    """MXFP8 in MLX's stacks of uint32 words, and in compressed-tensors: the same bytes come out as of the source."""
    first, *_ = siblings([n for n in m3.architecture.linears if n.expert == 3])
    moe = [unit for unit, members in m3.architecture.units.items() if members[0].role == "experts"]
    made = []
    for name in ("mxfp8", "mlx", "compressed_tensors"):
        here = m3 if name == "mxfp8" else export(m3, Plan(name), tmp_path / name, quiet=True)
        blueprint = Blueprint.of(here, Plan("compressed_tensors", formats=dict.fromkeys(moe, "nvfp4")))
        assert export_module.in_kernels(blueprint, first)
        made.append(list(export_module.through_kernels(blueprint, first, False)))
    assert all(same_bits(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))
