"""Overlays of planted tensors: any tensor of a blueprint, through export and verify, damaged, moved, killed and continued.

Nothing here is rounded on text or fitted: export and verify must not know who made an overlay. Leaves out the makers
(test_sequential.py, test_repair.py).
"""

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import child, contents, dying
from test_repair import flip
from torch import Tensor

from moesaic.artifact import write_json
from moesaic.checkpoint import Checkpoint
from moesaic.errors import InputError, PlanError, StaleError
from moesaic.export import export
from moesaic.plan import Plan, overlay
from moesaic.plan.blueprint import Blueprint, bound
from moesaic.recipes.convert import export_run
from moesaic.verify import verify

KEPT = {1: (0, 2, 3, 6), 2: (1, 4, 5, 7)}


def small_of(source: Checkpoint) -> tuple[str, str]:
    """A router and a norm."""
    a = source.architecture
    return a.routers[2].tensors[0], next(t.name for t in a.tensors if t.role == "norm")


def plant(source: Checkpoint, plan: Plan, folder: Path, items: dict[str, Callable[[], list[Tensor]]]) -> Plan:
    """Write an overlay of what `items` give, and the plan that names it."""
    blueprint, inputs = Blueprint.of(source, plan), bound(source, plan)
    digests = {
        item: overlay.put(folder, item, dict(zip((t.name for t in blueprint.item(item)), make())), inputs)
        for item, make in items.items()
    }
    overlay.finish(folder, digests, inputs, {})
    return replace(plan, overlays={**plan.overlays, folder.name: digests})


def tuned(source: Checkpoint, plan: Plan) -> dict[str, Callable[[], list[Tensor]]]:
    """A router [kept, D] in F32, a norm in BF16, and a packed matrix, each unlike the source's."""
    blueprint = Blueprint.of(source, plan)
    router, norm = small_of(source)
    down = next(n for n in blueprint.architecture.linears if n.role == "shared" and n.projection == "down")
    w_OI = source.decode(down.name) * 0.75
    format = blueprint.packing(down).number_format

    def packed() -> list[Tensor]:
        scales = format.scales(w_OI)
        return list(blueprint.pack(down, format.encode(w_OI, scales), scales).values())

    kept = list(plan.kept[2]) if plan.kept else slice(None)
    return {
        router: lambda: [source.read(router)[kept] + 0.5],
        norm: lambda: [source.read(norm) * 2],
        down.name: packed,
    }


@pytest.fixture
def planted(m3: Checkpoint, tmp_path: Path) -> Plan:
    plan = Plan("mxfp8", KEPT)
    return plant(m3, plan, tmp_path / "healed", tuned(m3, plan))


def test_any_tensor_goes_through_export_and_verify(m3, planted, tmp_path):
    result = export(m3, planted, tmp_path / "out", quiet=True, overlays=tmp_path)
    router, norm = small_of(m3)
    assert torch.equal(result.read(router), m3.read(router)[list(KEPT[2])] + 0.5)
    assert result.read(router).dtype == torch.float32 and result.read(norm).dtype == torch.bfloat16
    assert torch.equal(result.read(norm), m3.read(norm) * 2)
    down = next(n.name for n in result.architecture.linears if n.role == "shared" and n.projection == "down")
    assert torch.allclose(result.decode(down), 0.75 * m3.decode(down), rtol=0.07, atol=1e-3)
    verdict = verify(tmp_path / "out", m3, quiet=True)
    assert verdict.holds and verdict.compared["overlay"] == 2 + len(Blueprint.of(m3, planted).item(down))
    plain = export(m3, replace(planted, overlays={}), tmp_path / "plain", quiet=True)
    changed = {n for n in plain.stored if not torch.equal(*(x.read(n).view(torch.uint8) for x in (plain, result)))}
    assert {n.removesuffix("_scale_inv").removesuffix(".weight") for n in changed} == {
        n.removesuffix(".weight") for n in (router, norm, down)
    }


def test_an_overlay_stands_in_for_a_rounding(m2, tmp_path):
    """Some of a unit's matrices from an overlay, the others rounded, in a container that stacks experts."""
    plan = Plan("mlx", formats={unit: "affine4_g64" for unit in m2.architecture.units})
    blueprint = Blueprint.of(m2, plan)
    up = blueprint.architecture.experts_of[1, 3]["up"]
    format, w_OI = blueprint.packing(up).number_format, m2.decode(up.name) * 0.9

    def packed() -> list[Tensor]:
        scales = format.scales(w_OI)
        return list(blueprint.pack(up, format.encode(w_OI, scales), scales).values())

    made = plant(m2, plan, tmp_path / "mine", {up.name: packed})
    result = export(m2, made, tmp_path / "out", quiet=True, overlays=tmp_path)
    assert float((result.decode(up.name) - w_OI).norm() / w_OI.norm()) < 0.1
    verdict = verify(tmp_path / "out", m2, quiet=True)
    assert verdict.holds and verdict.compared["overlay"] == 3 and verdict.compared["codes"] > 0


def test_a_flipped_bit_is_found_by_verify_and_by_export(m3, planted, tmp_path):
    export(m3, planted, tmp_path / "out", quiet=True, overlays=tmp_path)
    for item in planted.overlaid:
        broken = Path(shutil.copytree(tmp_path / "out", tmp_path / "broken", dirs_exist_ok=True))
        flip(broken, Blueprint.of(m3, planted).item(item)[0].name)
        found = [(f.check, f.where) for f in verify(broken, m3, quiet=True).findings if f.check != "digest"]
        assert found == [("overlay", item)]
        bad = Path(shutil.copytree(tmp_path / "healed", tmp_path / "again" / "healed", dirs_exist_ok=True))
        file = overlay.path_of(bad, item)
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        with pytest.raises(StaleError, match="does not hold the tensors that the plan has the digest of"):
            export(m3, planted, tmp_path / f"out-{len(item)}", quiet=True, overlays=tmp_path / "again")


def test_overlays_that_do_not_fit_the_plan_are_refused(m3, m2, planted, tmp_path):
    router, norm = small_of(m3)

    def refused(error: type[Exception], match: str, plan: Plan, folder: Path) -> None:
        with pytest.raises(error, match=match) as caught:
            export(m3, plan, tmp_path / "out", quiet=True, overlays=folder)
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    refused(InputError, "cannot be read as a overlay file", planted, tmp_path / "elsewhere")
    copy = Path(shutil.copytree(tmp_path / "healed", tmp_path / "lost" / "healed"))
    overlay.path_of(copy, norm).unlink()
    refused(InputError, f"lacks {norm}", planted, tmp_path / "lost")
    copy = Path(shutil.copytree(tmp_path / "healed", tmp_path / "torn" / "healed"))
    overlay.path_of(copy, norm).write_bytes(overlay.path_of(copy, norm).read_bytes()[:-5])
    refused(InputError, "cannot be read", planted, tmp_path / "torn")
    copy = Path(shutil.copytree(tmp_path / "healed", tmp_path / "swapped" / "healed"))
    overlay.path_of(copy, norm).replace(overlay.path_of(copy, router))
    shutil.copy(overlay.path_of(tmp_path / "healed", router), overlay.path_of(copy, norm))
    refused(StaleError, "wanted model|wanted language_model", planted, tmp_path / "swapped")
    other = Plan("mxfp8", {1: (0, 1, 2, 3), 2: (0, 1, 2, 3)})
    foreign = plant(m3, other, tmp_path / "foreign" / "healed", tuned(m3, other))
    refused(StaleError, "was made from plan", replace(planted, overlays=foreign.overlays), tmp_path / "foreign")
    same = plant(m3, Plan("mxfp8", KEPT), tmp_path / "same" / "healed", {norm: lambda: [m3.read(norm) * 3]})
    refused(StaleError, "is not the overlay that the plan names", planted, tmp_path / "same")
    wide = plant(m3, Plan("mxfp8", KEPT), tmp_path / "wide" / "healed", {norm: lambda: [m3.read(norm).float()]})
    refused(InputError, f"{norm} of an overlay is torch.float32", wide, tmp_path / "wide")
    assert same.overlays != planted.overlays and m2.identity != m3.identity


def test_plans_whose_overlays_cannot_be_are_refused(m3, m2, planted):
    (items,) = planted.overlays.values()
    with pytest.raises(PlanError, match="two overlays of the plan hold"):
        replace(planted, overlays={"one": items, "two": dict(list(items.items())[:1])})
    with pytest.raises(PlanError, match="wanted the plain name of a folder"):
        replace(planted, overlays={"../healed": items})
    with pytest.raises(PlanError, match="which the model does not have"):
        Blueprint.of(m3, replace(planted, overlays={"healed": {"model.layers.77.norm": "0"}}))
    gate = m2.architecture.experts_of[0, 0]["gate"].name
    shares = Plan("compressed_tensors", formats={"layers.0.experts": "nvfp4"}, overlays={"mine": {gate: "0"}})
    with pytest.raises(PlanError, match="which share a scale; put all of them into it"):
        Blueprint.of(m2, shares)


def test_a_killed_export_with_overlays_continues(m3, planted, tmp_path):
    def work(out: str) -> Callable[[], Any]:
        return lambda: export(m3, planted, tmp_path / out, quiet=True, overlays=tmp_path)

    work("whole")()
    for at in (3, 8, 14):
        assert child(dying(work("parts"), at, signal.SIGKILL)) == -signal.SIGKILL
    assert child(work("parts")) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    overlay.drop(tmp_path / "healed")
    assert overlay.is_dropped(tmp_path / "healed")
    work("whole")()  # whole: nothing is read
    with pytest.raises(InputError, match="an export took them in and they were removed"):
        work("third")()


def test_an_old_plan_with_repaired_matrices_is_read(m3, tmp_path):
    text = (
        '{"kind": "plan", "schema": 1, "maker": "moesaic 0.1.0", "inputs": {}, "container": "mxfp8", "kept": {}, '
        '"formats": {}, "rounding": "rtn", "activations": {}, "repaired": {"a.down_proj": "00ff"}}'
    )
    (tmp_path / "plan.json").write_text(text)
    assert Plan.load(tmp_path / "plan.json") == Plan("mxfp8", overlays={"repaired": {"a.down_proj": "00ff"}})


def test_a_run_folder_that_moved_is_exported_with_its_overlays(m3, planted, tmp_path):
    (run := tmp_path / "run").mkdir()
    shutil.move(tmp_path / "healed", run / "healed")
    write_json(run / "source.json", "source", {"model": str(m3.path)}, {})
    planted.save(run / "plan.json", {"source": m3.identity})
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    assert export_run(moved, None, None, quiet=True)["verified"]["overlay"] == 4
    model = Path(shutil.move(moved / "model", tmp_path / "model"))
    assert verify(model, m3, quiet=True).holds, "alone too: the plan that travels in it has the digests"
