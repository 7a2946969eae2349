"""Releases that stack a layer's experts in one tensor: side by side, row by row in turn, or transposed; read as if they did not.

Mixtral re-saved so, since a layout is a fact of its matrices and nothing else has to know.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_stream import logits, text
from torch import Tensor

import moesaic.families as families_module
from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.inspect import inspect
from moesaic.errors import CheckpointError
from moesaic.export import export
from moesaic.families import Architecture, Linear, Stack, family_of
from moesaic.families.mixtral import MIXTRAL
from moesaic.families.stated import Config
from moesaic.plan import Plan
from moesaic.stream import LayerRun
from moesaic.verify import verify

# name -> gate and up take turns, an expert's part is transposed
LAYOUTS = {"side by side": (False, False), "in turn": (True, False), "transposed": (False, True), "both": (True, True)}


def stack_of(linear: Linear, turns: bool, transposed: bool) -> Stack:
    above = linear.name.rsplit(".", 2)[0]
    if linear.projection == "down":
        return Stack(f"{above}.down_proj", linear.shape[0], transposed=transposed)
    up, rows = linear.projection == "up", linear.shape[0]
    name, first, step = f"{above}.gate_up_proj", int(up) * (1 if turns else rows), 2 if turns else 1
    return Stack(name, 2 * rows, first, step, transposed)


def as_released(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """From now on Mixtral is released in `layout`."""

    def read(config: Config) -> Architecture:
        a = MIXTRAL.read(config)
        linears = (
            n if n.expert is None else dataclasses.replace(n, stack=stack_of(n, *LAYOUTS[layout])) for n in a.linears
        )
        return dataclasses.replace(a, linears=tuple(linears))

    monkeypatch.setitem(families_module.FAMILIES, "mixtral", dataclasses.replace(MIXTRAL, read=read))


def restacked(plain: Checkpoint, folder: Path, layout: str) -> Path:
    """The same values in that layout, by plain torch."""
    turns, transposed = LAYOUTS[layout]
    a = plain.architecture
    tensors = {t.name: plain.read(t.name) for t in a.tensors}
    tensors |= {f"{n.name}.weight": plain.read(f"{n.name}.weight") for n in a.linears if n.expert is None}
    for layer in a.moe_layers:
        experts = [
            {p: plain.read(f"{n.name}.weight") for p, n in a.experts_of[layer, e].items()} for e in range(a.experts)
        ]
        both = [
            torch.stack([e["gate"], e["up"]], 1).flatten(0, 1) if turns else torch.cat([e["gate"], e["up"]])
            for e in experts
        ]
        at = f"{a.layer_prefix}{layer}.block_sparse_moe.experts."
        for name, parts in (("gate_up_proj", both), ("down_proj", [e["down"] for e in experts])):
            stack = torch.stack(parts)
            tensors[at + name] = (stack.mT if transposed else stack).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in plain.path.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, folder)
    return folder


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.stored}


@pytest.fixture(params=LAYOUTS)
def pair(request, mixtral, tmp_path, monkeypatch) -> tuple[Checkpoint, Checkpoint]:
    """Mixtral as it is, and stacked."""
    folder = restacked(mixtral, tmp_path / "stacked", request.param)
    as_released(monkeypatch, request.param)
    return mixtral, Checkpoint.open(folder)


def test_values_and_logits_are_the_same_to_the_bit(pair):
    plain, stacked = pair
    assert len(stacked.stored) == len(plain.stored) - 2 * (3 * 8 - 2)
    for n in plain.architecture.linears:
        assert torch.equal(stacked.decode(n.name), plain.decode(n.name)), n.name
    assert torch.equal(logits(LayerRun(stacked), text(2, 50)), logits(LayerRun(plain), text(2, 50)))


def test_no_more_is_read_than_an_experts_own_part(pair, monkeypatch):
    _, stacked = pair
    read, real = [], Checkpoint.load

    def load(self: Checkpoint, name: str, offset: int, count: int) -> Tensor:
        read.append(count)
        return real(self, name, offset, count)

    monkeypatch.setattr(Checkpoint, "load", load)
    linear = stacked.architecture.experts_of[1, 5]["up"]
    stacked.parts(linear)
    assert sum(read) == 2 * linear.elements * (1 if linear.stack.is_run else 2)


def test_exports_are_the_same_to_the_byte(pair, tmp_path):
    """Cut and copied, cut and rounded, in a container that stacks them its own way: by name, as from a plain source."""
    plain, stacked = pair
    units = {u: "mxfp4" for u in plain.architecture.units if u.endswith("experts")}
    kept = {0: (0, 2, 3, 7), 1: (1, 2, 4, 5)}
    plans = [Plan("unquantized", kept), Plan("compressed_tensors", kept, units), Plan("mlx", {}, units)]
    for i, plan in enumerate(plans):
        mine, theirs = (export(s, plan, tmp_path / f"{i}{j}", quiet=True) for j, s in enumerate((stacked, plain)))
        assert mine.config == theirs.config
        found, wanted = tensors_of(mine), tensors_of(theirs)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())
        verdict = verify(mine.path, stacked, quiet=True)
        assert verdict.holds and sum(verdict.compared.values()) > 10
    assert "block_sparse_moe.experts.0.w1.weight" in " ".join(tensors_of(Checkpoint.open(tmp_path / "00")))


def test_a_lie_is_found(pair, tmp_path):
    """One value of one expert exchanged in the export of a stacked source."""
    _, stacked = pair
    out = export(stacked, Plan("unquantized", {0: (0, 2, 3, 7), 1: (1, 2, 4, 5)}), tmp_path / "out", quiet=True)
    linear = out.architecture.experts_of[1, 2]["up"]
    where = out.located(linear)["codes"]
    with open(out.path / where.file, "r+b") as file:
        file.seek(where.offset)
        file.write(torch.tensor([0.75], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    assert not verify(out.path, stacked, quiet=True).holds


def test_inspect_counts_what_is_there_or_will_be(pair, tmp_path):
    plain, stacked = pair
    facts = inspect(stacked.path)
    assert facts["tensors"] == len(stacked.stored) and facts["roles"]["experts"]["tensors"] == 4
    assert facts["bytes"] == inspect(plain.path)["bytes"]
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(stacked.path / "config.json", bare)
    assert inspect(bare)["tensors"] == facts["tensors"] and inspect(bare)["bytes"] == facts["bytes"]
    assert family_of(json.loads((bare / "config.json").read_text())).read is not MIXTRAL.read


def test_a_stack_of_another_shape_is_refused(pair, tmp_path):
    _, stacked = pair
    tensors = tensors_of(stacked)
    name = next(name for name in tensors if name.endswith("down_proj"))
    tensors[name] = tensors[name][:-1].contiguous()
    shutil.copytree(stacked.path, tmp_path / "less")
    save_file(tensors, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="down_proj is BF16"):
        Checkpoint.open(tmp_path / "less")
