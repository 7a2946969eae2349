"""Inspect: totals to the unit against the published figures, and kept experts found again by their router rows."""

import io
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console

from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.inspect import inspect, size, table
from moesaic.errors import CheckpointError, InputError
from moesaic.export import export
from moesaic.plan import Plan

RELEASED = {  # tensors, bytes and parameters of the released files; parameters a token, to the digits that are published
    "m2.7": (96_103, 230_121_630_720, 228_689_764_864, 10.42e9),
    "m3": (23_416, 854_172_958_720, 427_040_140_160, 24.73e9),
    "m3_mxfp8": (45_838, 443_742_085_120, 427_040_140_160, 24.73e9),
}


@pytest.fixture(scope="module", params=RELEASED)
def bare(request, tmp_path_factory) -> tuple[str, Path]:
    """A folder that holds a released config.json alone."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(tiny.CONFIGS / f"{request.param}.json", folder / "config.json")
    return request.param, folder


def test_a_bare_config_gives_the_totals_of_the_release(bare):
    release, folder = bare
    facts = inspect(folder)
    tensors, count, parameters, active = RELEASED[release]
    assert (facts["tensors"], facts["bytes"], facts["parameters"]) == (tensors, count, parameters)
    assert facts["active_parameters"] == pytest.approx(active, abs=0.005e9)
    assert not facts["weights_present"]
    for total, part in (("tensors", "tensors"), ("bytes", "bytes"), ("parameters", "parameters")):
        assert facts[total] == sum(share[part] for share in facts["roles"].values())


def test_what_is_printed_says_so(bare):
    release, folder = bare
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table(inspect(folder)))
    text = console.export_text()
    wanted = {
        "m2.7": ("96,103 tensors", "230.12 GB = 214.32 GiB", "228.69 B parameters", "10.42 B active"),
        "m3": ("23,416 tensors", "854,172,958,720 bytes", "854.17 GB = 795.51 GiB", "427.04 B parameters"),
        "m3_mxfp8": ("45,838 tensors", "443,742,085,120 bytes", "443.74 GB = 413.27 GiB", "24.73 B active"),
    }[release]
    assert all(words in text for words in wanted), text
    assert "no weights here: what a complete release of this config holds" in text


def test_a_folder_with_weights_gives_what_its_headers_say(source):
    facts = inspect(source.path)
    assert facts["weights_present"] and facts["tensors"] == len(source.stored)
    assert facts["bytes"] == sum(s.info.bytes for s in source.stored.values())
    formats = {f for counts in facts["formats"].values() for f in counts}
    assert formats == {{"minimax_m2": "fp8_block", "minimax_m3_vl": "mxfp8", "mixtral": "bf16"}[facts["family"]]}
    assert sum(n for counts in facts["formats"].values() for n in counts.values()) == len(source.architecture.linears)


def test_no_byte_of_the_payload_is_needed(m2, tmp_path):
    """All but a header's worth of samples may be a hole in the disk."""
    folder = Path(shutil.copytree(m2.path, tmp_path / "model"))
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        head = 8 + int.from_bytes(raw[:8], "little")
        file.write_bytes(raw[:head])
        with open(file, "r+b") as f:
            f.truncate(len(raw))
    before, after = inspect(m2.path), inspect(folder)
    assert {k: v for k, v in after.items() if k not in ("model", "identity")} == {
        k: v for k, v in before.items() if k not in ("model", "identity")
    }


@pytest.mark.parametrize("format", ["source", "mxfp4"])
def test_kept_experts_are_found_without_any_note(source, tmp_path, format):
    kept = {layer: (0, 2 + layer, 7) for layer in source.architecture.moe_layers}
    units = {u: "mxfp4" for u, m in source.architecture.units.items() if m[0].role == "experts" and format != "source"}
    container = "compressed_tensors" if units else source.container.name
    export(source, Plan(container, kept, units), tmp_path / "out", quiet=True)
    shutil.rmtree(tmp_path / "out" / "moesaic")
    assert inspect(tmp_path / "out", source.path)["kept"] == {str(layer): list(ids) for layer, ids in kept.items()}
    assert inspect(source.path, source.path)["kept"] == {str(layer): list(range(8)) for layer in kept}


def test_a_stranger_is_no_relative(m2, m3, tmp_path):
    stranger = tiny.make(tmp_path / "stranger", "minimax_m2", seed=1)
    with pytest.raises(
        CheckpointError, match=r"router row \d of layer 0 .* resembles none of .* it was not made from that model"
    ):
        inspect(stranger, m2.path)
    with pytest.raises(InputError, match="have different families, layers or widths"):
        inspect(m3.path, m2.path)


def test_two_rows_that_are_one_experts_are_no_pruning(m2, tmp_path):
    """Each expert is kept once, or it is another kind of surgery."""
    folder = Path(shutil.copytree(m2.path, tmp_path / "model"))
    where = Checkpoint.open(folder).where(m2.architecture.routers[0].weight)
    rows = m2.read(m2.architecture.routers[0].weight).clone()
    rows[3] = rows[4]
    with open(folder / where.file, "r+b") as f:
        f.seek(where.offset)
        f.write(rows.view(torch.uint8).numpy().tobytes())
    with pytest.raises(CheckpointError, match=r"layer 0"):
        inspect(folder, m2.path)


@pytest.mark.parametrize(
    "count, words",
    [(0, "0.00 MB = 0.00 MiB"), (2**20, "1.05 MB = 1.00 MiB"), (230_121_630_720, "230.12 GB = 214.32 GiB")],
)
def test_sizes_as_people_compare_them(count, words):
    assert size(count) == words
