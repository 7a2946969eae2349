"""Routing rules: by hand, against transformers' own routers, against a model that lacks the dropped experts, and by autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

from moesaic.errors import FamilyError, PlanError
from moesaic.families import FAMILIES, Router
from moesaic.stream.router import RULES, LayerRouter, route

D, E, K = 12, 16, 4
COMMON: dict[str, Any] = dict(hidden_size=D, num_experts_per_tok=K)
# name -> rule, transformers' router, in how many groups experts are and in how many of them a token's are
THEIRS: dict[str, tuple[str, nn.Module, tuple[int, int]]] = {
    "minimax_m3": ("sigmoid", MiniMaxM3VLTopKRouter(MiniMaxM3VLTextConfig(num_local_experts=E, **COMMON)), (1, 1)),
    "deepseek_v3": (
        "sigmoid_guarded",
        DeepseekV3TopkRouter(DeepseekV3Config(n_routed_experts=E, n_group=4, topk_group=2, routed_scaling_factor=1.0, **COMMON)),
        (4, 2),
    ),
    "kimi_k2": (
        "sigmoid_guarded",
        DeepseekV3TopkRouter(DeepseekV3Config(n_routed_experts=E, n_group=1, topk_group=1, routed_scaling_factor=1.0, **COMMON)),
        (1, 1),
    ),
    "mixtral": ("softmax_of_chosen", MixtralTopKRouter(MixtralConfig(num_local_experts=E, **COMMON)), (1, 1)),
    "qwen3_moe": (
        "softmax_of_chosen", Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=E, norm_topk_prob=True, **COMMON)), (1, 1),
    ),
    "olmoe": ("softmax", OlmoeTopKRouter(OlmoeConfig(num_experts=E, norm_topk_prob=False, **COMMON)), (1, 1)),
    "gpt_oss": ("softmax_of_chosen", GptOssTopKRouter(GptOssConfig(num_local_experts=E, **COMMON)), (1, 1)),
}  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_router(
    rule: str, weight_ED: Tensor, correction_E: Tensor | None = None, bias_E: Tensor | None = None,
    groups: tuple[int, int] = (1, 1), top_k: int = K, layer: int = 0,
) -> LayerRouter:  # fmt: skip
    facts = Router("weight", rule, groups=groups[0], kept_groups=groups[1])
    return LayerRouter(layer, facts, weight_ED, correction_E, bias_E, top_k)


def filled(name: str) -> tuple[LayerRouter, nn.Module]:
    """One of transformers' routers with random values, and ours with the same."""
    rule, theirs, groups = THEIRS[name]
    values = {
        key: noise(*t.shape, seed=len(key)) * (0.3 if t.dim() == 1 else 1.0) for key, t in theirs.state_dict().items()
    }
    theirs.load_state_dict(values)
    correction_E = values.get("e_score_correction_bias")
    return a_router(rule, values["weight"], correction_E, values.get("bias"), groups), theirs


def pruned(router: LayerRouter, kept: list[int]) -> LayerRouter:
    """The router of a model that has these experts and no others."""
    rows = [None if t is None else t[kept] for t in (router.weight_ED, router.correction_E, router.bias_E)]
    return LayerRouter(router.layer, router.facts, rows[0], rows[1], rows[2], router.top_k)  # type: ignore[arg-type]


def by_expert(ids_Tk: Tensor, gates_Tk: Tensor) -> Tensor:
    return torch.zeros(len(ids_Tk), E).scatter(1, ids_Tk, gates_Tk)


@pytest.mark.parametrize("name", THEIRS)
def test_rules_are_those_of_transformers(name):
    ours, theirs = filled(name)
    x_TD = noise(500, D, seed=7)
    found = route(ours, x_TD)
    with torch.no_grad():
        _, gates_Tk, ids_Tk = theirs(x_TD)
    assert torch.equal(found.experts_Tk.sort(1).values, ids_Tk.sort(1).values)
    assert torch.allclose(by_expert(found.experts_Tk, found.gates_Tk), by_expert(ids_Tk, gates_Tk), atol=1e-6)
    assert found.affinity_TE.shape == (500, E) and len(found.experts_Tk.unique()) == E


@pytest.mark.parametrize("name", THEIRS)
def test_dropping_is_what_a_pruned_model_computes(name):
    """Affinities too, for criteria and divergence see them. Of each group equally many stay."""
    ours, _ = filled(name)
    gone = [1, 6, 11, 12]
    kept = [e for e in range(E) if e not in gone]
    x_TD = noise(500, D, seed=7)
    masked, small = route(ours, x_TD, gone), route(pruned(ours, kept), x_TD)
    assert torch.equal(masked.experts_Tk, torch.tensor(kept)[small.experts_Tk])
    assert torch.allclose(masked.gates_Tk, small.gates_Tk, atol=1e-6)
    assert torch.allclose(masked.affinity_TE[:, kept], small.affinity_TE, atol=1e-6)
    assert not torch.allclose(route(ours, x_TD).gates_Tk, masked.gates_Tk, atol=1e-3)


@pytest.mark.parametrize("dropped", ([], [2, 5, 9, 14]))
@pytest.mark.parametrize("name", THEIRS)
def test_slopes_pass_through_any_rule(name, dropped):
    """Against gates written out for the selection as it is: choices are held, gates move."""
    ours, _ = filled(name)
    x_TD, slope_Tk = noise(40, D, seed=3), noise(40, K, seed=4)

    def ours_of(x_TD: Tensor) -> Tensor:
        return (route(ours, x_TD, dropped).gates_Tk * slope_Tk).sum()

    held_Tk, kept = route(ours, x_TD, dropped).experts_Tk, [e for e in range(E) if e not in dropped]

    def slow(x_TD: Tensor) -> Tensor:
        total = torch.zeros(())
        for x_D, ids_k, slope_k in zip(x_TD, held_Tk, slope_Tk):
            logits_E = ours.weight_ED @ x_D + (0 if ours.bias_E is None else ours.bias_E)
            score_E = (
                logits_E.sigmoid() if "sigmoid" in ours.facts.rule else logits_E.exp() / logits_E[kept].exp().sum()
            )
            gates_k = score_E[ids_k] / (1 if ours.facts.rule == "softmax" else score_E[ids_k].sum())
            total = total + (gates_k * slope_k).sum()
        return total

    found, wanted = (torch.autograd.functional.jacobian(f, x_TD) for f in (ours_of, slow))
    assert wanted.abs().max() > 1e-3 and torch.allclose(found, wanted, atol=1e-5)


def test_every_family_names_a_rule_and_every_rule_is_tested():
    assert {rule for rule, _, _ in THEIRS.values()} == set(RULES)
    with pytest.raises(FamilyError, match="no routing rule 'magic'"):
        a_router("magic", noise(E, D))
    assert FAMILIES


def test_weights_of_a_router_may_be_bf16_on_disk_and_route_in_f32():
    weight_ED, x_TD = noise(E, D).bfloat16(), noise(9, D).bfloat16()
    found = route(a_router("softmax_of_chosen", weight_ED.float()), x_TD)
    wanted_TE = F.linear(x_TD.float(), weight_ED.float()).softmax(-1)
    assert torch.equal(found.affinity_TE, wanted_TE) and found.gates_Tk.dtype == torch.float32


def test_equal_scores_go_to_the_lower_expert():
    """All affinities are 1/2, so the bias decides: experts 2 and 5 lead, then 0, 1, 3, 4 and 6 tie."""
    x_TD, bias_E = torch.randn(50, 4), torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.5, 0.0])
    router = a_router("sigmoid", torch.zeros(7, 4), bias_E)
    routing = route(router, x_TD)
    assert routing.experts_Tk.unique(dim=0).tolist() == [[2, 5, 0, 1]]
    assert torch.equal(routing.gates_Tk, torch.full((50, 4), 0.25))
    assert route(router, x_TD, dropped=(5, 0)).experts_Tk.unique(dim=0).tolist() == [[2, 1, 3, 4]]


def test_the_bias_chooses_and_does_not_weigh():
    """Affinities σ(0), σ(1), σ(2) and a bias that lifts the two lower ones: gates are 0.5 and σ(1) over their sum."""
    router_ED, bias_E = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([2.0, 1.0, 0.0])
    routing = route(a_router("sigmoid", router_ED, bias_E, top_k=2, layer=3), torch.ones(1, 1))
    assert routing.layer == 3 and routing.experts_Tk.tolist() == [[0, 1]]
    low, high = 0.5, 1 / (1 + 2.718281828459045**-1)
    assert routing.gates_Tk[0].tolist() == pytest.approx([low / (low + high), high / (low + high)])


def test_too_few_experts_left():
    router = a_router("sigmoid", torch.zeros(7, 4), torch.zeros(7), layer=5)
    with pytest.raises(PlanError, match="layer 5 has 7 experts and 4 of them are dropped; a token needs 4"):
        route(router, torch.randn(3, 4), dropped=(0, 1, 2, 2, 6))


def test_too_few_experts_left_in_groups():
    """5 of 16 stay, 2 of them in one group and 1 in each other: no two groups have the 4 that a token needs."""
    ours, _ = filled("deepseek_v3")
    with pytest.raises(PlanError, match="equally many in each"):
        route(ours, noise(50, D), dropped=(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13))
