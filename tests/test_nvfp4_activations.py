"""Activations that servers round: how large they get, held to transformers' own forward pass; and the exports that say so."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from folders import write_twin
from torch import Tensor, nn
from transformers import MiniMaxM2ForCausalLM

import moesaic.export.activations as activations
import moesaic.stream.sweep as sweep_module
from moesaic.checkpoint import Checkpoint
from moesaic.checkpoint.containers.compressed_tensors import COMPRESSED_TENSORS
from moesaic.data.corpus import Corpus
from moesaic.data.tokens import TokenSet
from moesaic.errors import InputError, PlanError
from moesaic.export import export
from moesaic.export.activations import calibrated, observe
from moesaic.formats import FORMATS, NAMES, PAIRS, activations_of, weights_of
from moesaic.measure.divergence.activations import told
from moesaic.plan import Plan
from moesaic.recipes.compress import Recipe, compress
from moesaic.verify import verify


@pytest.fixture(scope="module")
def tokens(m2: Checkpoint) -> TokenSet:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    return TokenSet(ids, torch.zeros(2, dtype=torch.int64), ("all",), {"ids_sha256": "of this test"})


def plan_of(source: Checkpoint, experts: str, rest: str = "source", **more: object) -> Plan:
    units = source.architecture.units.items()
    return Plan(
        "compressed_tensors", formats={u: experts if m[0].role == "experts" else rest for u, m in units}, **more
    )


def seen_by_transformers(source: Checkpoint, tokens: TokenSet, folder: Path) -> dict[str, float]:
    """The same numbers from hooks on the full model; of experts, from the arguments that their module gets."""
    write_twin(source, {n.name: source.decode(n.name) for n in source.architecture.linears}, folder, torch.float32)
    model = MiniMaxM2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, float] = {}

    def take(name: str, x: Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float(x.abs().max()))

    def experts(name: str, module: nn.Module, x_TD: Tensor, chosen_Tk: Tensor) -> None:
        take(f"{name}.gate_up", x_TD)
        for expert in chosen_Tk.unique().tolist():
            mine_nD = x_TD.flatten(0, -2)[(chosen_Tk.flatten(0, -2) == expert).any(-1)]
            gate_nI, up_nI = (mine_nD @ module.gate_up_proj[expert].T).chunk(2, -1)
            take(f"{name}.down", nn.functional.silu(gate_nI) * up_nI)

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, o, i=i: take(f"layers.{i}.qkv.qkv", a[0]))
        layer.self_attn.o_proj.register_forward_hook(lambda m, a, o, i=i: take(f"layers.{i}.o.o", a[0]))
        hook = lambda m, a, o, i=i: experts(f"layers.{i}.experts", m, a[0], a[1])  # noqa: E731
        layer.mlp.experts.register_forward_hook(hook)
    with torch.no_grad():
        model(tokens.ids_BT)
    return found


def test_what_is_observed_is_what_transformers_multiplies(m2: Checkpoint, tokens: TokenSet, tmp_path: Path) -> None:
    ours = observe(m2, {}, tokens, tmp_path / "activations", quiet=True)
    theirs = seen_by_transformers(m2, tokens, tmp_path / "twin")
    assert ours.keys() == theirs.keys() and len(ours) == 4 * m2.architecture.layers
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4), name


def test_it_continues_where_it_was_stopped(m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    tokens = TokenSet(ids, torch.zeros(2, dtype=torch.int64), ("all",), {"ids_sha256": "of this test"})
    whole = observe(m3, {}, tokens, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(sweep_module, "SAVE_SECONDS", 0.0)

    class Stop(Exception):
        pass

    def stopping(*a: object, **k: object) -> None:
        write(*a, **k)
        raise Stop

    write = sweep_module.save
    monkeypatch.setattr(sweep_module, "save", stopping)
    stops = 0
    while not (tmp_path / "parts" / activations.DONE).exists():
        try:
            parts = observe(m3, {}, tokens, tmp_path / "parts", quiet=True)
        except Stop:
            stops += 1
    assert stops == m3.architecture.layers and parts == whole


def test_dropped_experts_are_not_seen(m2: Checkpoint, tokens: TokenSet, tmp_path: Path) -> None:
    """Largest inputs of a cut are those of the pruned model, as transformers multiplies them."""
    kept = {layer: (0, 3) for layer in m2.architecture.moe_layers}
    whole, ours = (observe(m2, k, tokens, tmp_path / str(len(k)), quiet=True) for k in ({}, kept))
    pruned = export(m2, Plan(m2.container.name, kept), tmp_path / "pruned", quiet=True)
    theirs = seen_by_transformers(pruned, tokens, tmp_path / "twin")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4), name
    assert ours["layers.0.experts.gate_up"] == whole["layers.0.experts.gate_up"]  # what comes before the first router
    assert any(ours[name] != value for name, value in whole.items() if name.endswith("experts.down"))


# Exports ----------------------------------------------------------------------------------------------------------


def test_the_divisor_is_written_beside_each_matrix(m2: Checkpoint, tokens: TokenSet, tmp_path: Path) -> None:
    plan = calibrated(m2, plan_of(m2, "nvfp4_a4", "nvfp4_a4"), tokens, tmp_path / "activations", quiet=True)
    out = export(m2, plan, tmp_path / "out", quiet=True)
    for linear in m2.architecture.linears:
        name = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(
            linear.projection, linear.projection
        )
        divisor = out.read(f"{linear.name}.input_global_scale")
        assert divisor.shape == (1,) and divisor.dtype == torch.float32
        assert float(divisor) == pytest.approx(448 * 6 / plan.activations[f"{linear.unit}.{name}"], rel=1e-6)
    group = QuantizationConfig.model_validate(out.config["quantization_config"]).config_groups["group_0"]
    assert group.input_activations.dynamic == "local" and group.input_activations.num_bits == 4
    verdict = verify(out.path, m2, quiet=True)
    assert verdict.holds, verdict.findings
    assert set(Checkpoint.open(out.path).formats.values()) == {"nvfp4_a4"}


def test_weights_are_those_of_nvfp4(m2: Checkpoint, tokens: TokenSet, tmp_path: Path) -> None:
    plan = calibrated(m2, plan_of(m2, "nvfp4_a4"), tokens, tmp_path / "activations", quiet=True)
    both = export(m2, plan, tmp_path / "both", quiet=True)
    alone = export(m2, plan_of(m2, "nvfp4"), tmp_path / "alone", quiet=True)
    assert {n for n in both.stored if not n.endswith("input_global_scale")} == set(alone.stored)
    for name in alone.stored:
        assert torch.equal(both.read(name).view(torch.uint8), alone.read(name).view(torch.uint8)), name


def test_verify_sees_another_divisor(m2: Checkpoint, tokens: TokenSet, tmp_path: Path) -> None:
    plan = calibrated(m2, plan_of(m2, "nvfp4_a4"), tokens, tmp_path / "activations", quiet=True)
    out = export(m2, plan, tmp_path / "out", quiet=True)
    for value, check in ((1.0, "codes"), (float("nan"), "structure")):
        stored = out.where("model.layers.1.block_sparse_moe.experts.3.w2.input_global_scale")
        with open(out.path / stored.file, "r+b") as file:
            file.seek(stored.offset)
            file.write(np.float32(value).tobytes())
        assert {f.check for f in verify(out.path, m2, quiet=True).findings} >= {check}


def test_compress_calibrates_what_it_rounds(m2: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "all.txt").write_text("\n".join(f"line {i} of the sum of {i * i} parts" for i in range(400)))
    recipe = Recipe(format="nvfp4_a4", evaluation_tokens=128)
    facts = compress(m2.path, tmp_path / "run", recipe, Corpus(text, None, 256, 32, 0), quiet=True)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert set(plan.activations) == {f"layers.{i}.experts.{p}" for i in (0, 1) for p in ("gate_up", "down")}
    assert facts["verified"]["codes"]
    assert "experts to nvfp4_a4" in told(Checkpoint.open(tmp_path / "run" / "model"), "engine")  # as it was scored


def test_without_text_it_is_refused(m2: Checkpoint, m3: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"does not know how large layers\.0\.experts\.down.* get; compress measures"):
        export(m2, plan_of(m2, "nvfp4_a4"), tmp_path / "out", quiet=True)
    with pytest.raises(PlanError, match="holds an indexer"):
        export(m3, plan_of(m3, "mxfp4", "nvfp4_a4"), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    largest = activations.Largest(m2.architecture)
    with pytest.raises(InputError, match=r"q has NaN or infinite inputs"):
        largest.take("q", torch.tensor([[1.0, float("nan")]]))


def test_its_weights_are_nvfp4_and_it_is_no_number_format() -> None:
    assert "nvfp4_a4" in NAMES and "nvfp4_a4" not in FORMATS
    assert weights_of("nvfp4_a4") is activations_of("nvfp4_a4") is FORMATS["nvfp4"]
    packing = COMPRESSED_TENSORS.packing("nvfp4_a4")
    assert (packing.number_format, packing.activations) == (FORMATS["nvfp4"], "nvfp4")
    assert {name for name, p in COMPRESSED_TENSORS.packings.items() if p.activations} == {"nvfp4_a4"} == set(PAIRS)
