"""Rendering: each layer calibrated on the rounded ones before it, resumable, complete, and what export then writes.

Truths: the stream run on the finished export, transformers' full model for what goes into each matrix, and an
uninterrupted rendering. Leaves out how well each rounding rounds (test_rounding.py).
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from children import contents
from forward import final
from reference import Reference
from safetensors.torch import load_file
from torch import Tensor

import moesaic.export.sequential.experts as experts_module
import moesaic.export.sequential.layer as work_module
from moesaic.checkpoint import Checkpoint
from moesaic.data.tokens import TokenSet, sha256_of
from moesaic.errors import InputError, PlanError, StaleError
from moesaic.export import export
from moesaic.export.sequential import round_on_text
from moesaic.export.sequential.experts import POOL
from moesaic.plan import Plan, overlay
from moesaic.rounding import Inputs
from moesaic.rounding import autoround as autoround_module
from moesaic.stream import LayerRun, LinearPass, Observer, Routing, State
from moesaic.verify import verify


def some_tokens(source: Checkpoint, rows: int = 4, length: int = 48, seed: int = 0) -> TokenSet:
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, source.architecture.vocab, (rows, length), generator=generator)
    return TokenSet(ids_BT, torch.zeros(rows, dtype=torch.int64), ("noise",), {"ids_sha256": sha256_of(ids_BT)})


def a_plan(source: Checkpoint, experts: str = "int4_g32", rest: str = "source", rounding: str = "gptq") -> Plan:
    units = {u: experts if m[0].role == "experts" else rest for u, m in source.architecture.units.items()}
    return Plan("compressed_tensors", formats=units, rounding=rounding)


def ready(plan: Plan, folder: Path) -> Plan:
    """The plan with what was rendered into `folder`."""
    return dataclasses.replace(plan, overlays={folder.name: overlay.listing(folder)["items"]})


@torch.no_grad()
def hidden_after(checkpoint: Checkpoint, tokens: TokenSet) -> dict[int, Tensor]:
    run = LayerRun(checkpoint, "cpu")
    found: dict[int, Tensor] = {}
    start = [State(run.embed(tokens.ids_BT))]
    final(run, start, done=lambda at: found.update({at.done - 1: at.states["0"].hidden_BTD.clone()}))
    return found


def test_every_layer_is_calibrated_on_what_the_export_makes_of_the_text(source, tmp_path, monkeypatch) -> None:
    """Hidden states saved while rendering are those of the finished model: every linear rounded, all errors fed forward."""
    plan, tokens, seen = a_plan(source, rest="int4_g32"), some_tokens(source), {}
    advance = work_module.SequentialRounding.advance

    def watched(work: work_module.SequentialRounding, layer: int, state: State) -> State:
        after = advance(work, layer, state)
        seen[layer] = after.hidden_BTD.clone()
        return after

    monkeypatch.setattr(work_module.SequentialRounding, "advance", watched)
    round_on_text(source, plan, tokens, tmp_path / "rounded", quiet=True)
    result = export(source, ready(plan, tmp_path / "rounded"), tmp_path / "out", quiet=True, overlays=tmp_path)
    wanted = hidden_after(result, tokens)
    assert seen.keys() == wanted.keys() == set(range(source.architecture.layers))
    assert all(torch.allclose(seen[layer], wanted[layer], rtol=1e-4, atol=1e-5) for layer in wanted)
    assert not torch.allclose(seen[1], hidden_after(source, tokens)[1], rtol=1e-2)
    assert len(result.architecture.linears) == len(list((tmp_path / "rounded").glob("*.safetensors")))
    assert verify(tmp_path / "out", source, quiet=True).holds


def test_what_matrices_are_seen_to_multiply_is_what_the_full_model_gives_them(source) -> None:
    """Sums of x xᵀ outside the routed experts, in small spans, against hooks on transformers' own modules."""
    tokens, sums, truth = some_tokens(source), {}, {}
    run = LayerRun(source, "cpu", block_bytes=1 << 16)

    def see(seen: LinearPass) -> None:
        for linear in seen.linears:
            sums.setdefault(linear.name, Inputs.empty(linear.shape[1])).add(seen.x_nI)

    final(run, [State(run.embed(tokens.ids_BT), observer=Observer(linear=see))])
    full = Reference(source.path).model
    for layer in range(source.architecture.layers):
        for name, disk in source.family.wiring.parameters(source.architecture, layer).items():
            if all(d.removesuffix(".weight") in source.architecture.by_name for d in disk):
                into = Inputs.empty(full.layers[layer].get_parameter(name).shape[1])
                module = full.layers[layer].get_submodule(name.removesuffix(".weight"))
                module.register_forward_pre_hook(lambda _, x, into=into: into.add(x[0].flatten(0, -2)))
                truth |= {d.removesuffix(".weight"): into for d in disk}
    with torch.no_grad():
        full(input_ids=tokens.ids_BT, use_cache=False)
    assert sums.keys() == truth.keys() == {n.name for n in source.architecture.linears if n.expert is None}
    for name, inputs in truth.items():
        assert sums[name].vectors == inputs.vectors == tokens.tokens
        assert torch.allclose(
            sums[name].outer_II, inputs.outer_II, rtol=1e-3, atol=1e-3 * float(inputs.outer_II.abs().max())
        )


def test_an_experts_hessians_are_those_of_its_tokens(m2, tmp_path, monkeypatch) -> None:
    """By a slow loop over tokens: gate and up see x, down what rounded gate and up make of it, by the gate squared."""
    found, tokens, plan = [], some_tokens(m2), a_plan(m2, "int3_g32")
    original = work_module.round_members
    monkeypatch.setattr(
        "moesaic.export.sequential.experts.round_members",
        lambda rounding, batch, rows, format: found.append(batch) or original(rounding, batch, rows, format),
    )
    round_on_text(m2, plan, tokens, tmp_path / "rounded", quiet=True)
    result = export(m2, ready(plan, tmp_path / "rounded"), tmp_path / "out", quiet=True, overlays=tmp_path)

    run, routed = LayerRun(m2, "cpu"), []
    run.advance(0, [State(run.embed(tokens.ids_BT), observer=Observer(route=routed.append))])
    seen: Routing = routed[0]
    for e, linears in ((e, result.architecture.experts_of[0, e]) for e in range(result.architecture.experts)):
        gate, up = (result.decode(linears[p].name) for p in ("gate", "up"))
        assert found[0].name(e) == f"{linears['gate'].name} and {linears['up'].name}"
        first, second, total = torch.zeros(256, 256), torch.zeros(128, 128), 0.0
        for t in range(tokens.tokens):
            for k in range(result.architecture.top_k):
                if seen.experts_Tk[t, k] == e:
                    x, g = seen.x_TD[t], float(seen.gates_Tk[t, k]) ** 2
                    inner = torch.nn.functional.silu(gate @ x) * (up @ x)
                    first, second, total = (
                        first + g * torch.outer(x, x),
                        second + g * torch.outer(inner, inner),
                        total + g,
                    )
        assert torch.allclose(found[0].hessian_EII[e], first / max(total, 1e-30), rtol=1e-3, atol=1e-4)
        assert torch.allclose(found[1].hessian_EII[e], second / max(total, 1e-30), rtol=1e-3, atol=1e-6)
        x_mD = seen.x_TD[:: max(1, tokens.tokens // (POOL * 128))]
        inner_mI = torch.nn.functional.silu(x_mD @ gate.T) * (x_mD @ up.T)
        assert torch.allclose(found[1].pool_EII[e], inner_mI.T @ inner_mI / len(x_mD), rtol=1e-3, atol=1e-6)


def test_error_fed_forward_and_data_beat_rounding_to_nearest(m2, tmp_path) -> None:
    tokens = some_tokens(m2, 8, 64)
    wanted = hidden_after(m2, tokens)[m2.architecture.layers - 1]
    off = {}
    for way in ("rtn", "gptq", "descent"):
        plan = a_plan(m2, "int2_g32", rounding=way)
        if way != "rtn":
            round_on_text(m2, plan, tokens, tmp_path / way, quiet=True)
            plan = ready(plan, tmp_path / way)
        result = export(m2, plan, tmp_path / f"out-{way}", quiet=True, overlays=tmp_path)
        off[way] = float((hidden_after(result, tokens)[m2.architecture.layers - 1] - wanted).square().sum())
    assert off["descent"] < off["gptq"] < 0.5 * off["rtn"]


@pytest.mark.parametrize("after", [0, 18])
def test_interrupted_anywhere_the_same_call_ends_in_the_same_bytes(m3, tmp_path, monkeypatch, after) -> None:
    plan, tokens = a_plan(m3, "nvfp4", "int4_g32"), some_tokens(m3)
    plan = dataclasses.replace(plan, formats=plan.formats | {u: "source" for u in plan.formats if u.endswith("qkv")})
    whole = round_on_text(m3, plan, tokens, tmp_path / "whole", quiet=True)
    write, calls = work_module.write_group, []

    def dying(*arguments) -> dict[str, object]:
        calls.append(arguments[2])
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(work_module, "write_group", dying)
    with pytest.raises(KeyboardInterrupt):
        round_on_text(m3, plan, tokens, tmp_path / "parts", quiet=True)
    early = dataclasses.replace(plan, overlays={"parts": overlay.listing(tmp_path / "whole")["items"]})
    with pytest.raises(InputError, match="run the stage that writes it"):
        export(m3, early, tmp_path / "early", quiet=True, overlays=tmp_path)
    assert round_on_text(m3, plan, tokens, tmp_path / "parts", quiet=True) == whole
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert len(calls) == whole["groups"] + 1  # only the one that died was made twice
    assert round_on_text(m3, plan, tokens, tmp_path / "parts", quiet=True) == whole
    assert len(calls) == whole["groups"] + 1


def test_other_text_or_another_plan_is_refused(m2, tmp_path) -> None:
    plan, tokens = a_plan(m2), some_tokens(m2)
    round_on_text(m2, plan, tokens, tmp_path / "rounded", quiet=True)
    with pytest.raises(StaleError, match="was made from tokens"):
        round_on_text(m2, plan, some_tokens(m2, seed=1), tmp_path / "rounded", quiet=True)
    other = a_plan(m2, "int8_g32")
    with pytest.raises(StaleError, match="was made from plan"):
        export(m2, ready(other, tmp_path / "rounded"), tmp_path / "out", quiet=True, overlays=tmp_path)
    with pytest.raises(PlanError, match="rounding gptq needs hessian_EII: round the plan on text first"):
        export(m2, plan, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlanError, match="unknown rounding 'magic'; choose from"):
        round_on_text(m2, dataclasses.replace(plan, rounding="magic"), tokens, tmp_path / "none", quiet=True)


def test_experts_that_no_token_reached_are_counted_and_named(m2, tmp_path) -> None:
    tokens, routed = some_tokens(m2, 1, 3), []
    run = LayerRun(m2, "cpu")
    run.advance(0, [State(run.embed(tokens.ids_BT), observer=Observer(route=routed.append))])
    reached = set(routed[0].experts_Tk.flatten().tolist())
    facts = round_on_text(m2, a_plan(m2), tokens, tmp_path / "rounded", quiet=True)
    first = [name for name in facts["unreached"] if name.startswith("layer 0 ")]
    missing = [e for e in range(m2.architecture.experts) if e not in reached]
    assert missing and first == [f"layer 0 expert {e}" for e in missing]
    assert set(facts["unreached"]) <= set(facts["mostly_pooled"])
    pooled = {(g["layer"], g["expert"], g["tokens"]): g["pooled"] for g in facts["by_group"]}
    assert {pooled[0, e, 0] for e in missing} == {1.0}
    assert overlay.listing(tmp_path / "rounded")["unreached"] == facts["unreached"]


def test_one_expert_at_a_time_gives_what_all_at_once_do(m3, tmp_path, monkeypatch) -> None:
    plan, tokens = a_plan(m3, "int4_g32"), some_tokens(m3)
    for name, blocks in (("all", experts_module.SIDE_BY_SIDE), ("one", 0)):
        monkeypatch.setattr(experts_module, "SIDE_BY_SIDE", blocks)
        round_on_text(m3, plan, tokens, tmp_path / name, quiet=True)
    codes = [
        (load_file(file)[name], load_file(tmp_path / "one" / file.name)[name])
        for file in (tmp_path / "all").glob("*.safetensors")
        for name in load_file(file)
        if name.endswith("packed")
    ]
    assert codes and sum(int((a != b).sum()) for a, b in codes) < 0.01 * sum(a.numel() for a, _ in codes)


def test_a_pruned_models_tokens_go_to_the_experts_that_stay(source, tmp_path) -> None:
    kept = {layer: (1, 2, 4, 7) for layer in source.architecture.moe_layers}
    plan, tokens = dataclasses.replace(a_plan(source, "mxfp4"), kept=kept), some_tokens(source)
    facts = round_on_text(source, plan, tokens, tmp_path / "rounded", quiet=True)
    result = export(source, ready(plan, tmp_path / "rounded"), tmp_path / "out", quiet=True, overlays=tmp_path)
    assert verify(tmp_path / "out", source, quiet=True).holds
    last = source.architecture.moe_layers[-1]
    run, seen = LayerRun(result, "cpu"), []
    final(run, [State(run.embed(tokens.ids_BT), observer=Observer(route=seen.append))])
    counts = seen[-1].experts_Tk.flatten().bincount(minlength=4).tolist()
    mine = [g for g in facts["by_group"] if f".layers.{last}." in g["group"] and g["expert"] is not None]
    by_expert = {g["expert"]: g["tokens"] for g in mine}
    assert len(mine) == 2 * 4 and [by_expert[e] for e in range(4)] == counts


def test_autoround_tunes_experts_by_their_output(m3, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(autoround_module, "STEPS", 10)
    plan, tokens = a_plan(m3, "int2_g32", "int4_g32", rounding="autoround"), some_tokens(m3)
    facts = round_on_text(m3, plan, tokens, tmp_path / "rounded", quiet=True)
    export(m3, ready(plan, tmp_path / "rounded"), tmp_path / "out", quiet=True, overlays=tmp_path)
    assert verify(tmp_path / "out", m3, quiet=True).holds
    assert facts["groups"] == len({g["group"] for g in facts["by_group"]})


def test_gate_and_up_share_their_second_scale(m2, tmp_path) -> None:
    plan = a_plan(m2, "nvfp4")
    round_on_text(m2, plan, some_tokens(m2), tmp_path / "rounded", quiet=True)
    export(m2, ready(plan, tmp_path / "rounded"), tmp_path / "out", quiet=True, overlays=tmp_path)
    found = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    pairs = [(n, n.replace(".w1.", ".w3.")) for n in found if n.endswith(".w1.weight_global_scale")]
    assert len(pairs) == 2 * m2.architecture.experts
    assert all(found[gate].equal(found[up]) for gate, up in pairs)
