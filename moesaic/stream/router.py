"""Routing: which experts a token goes to, and with which gates; a few named rules, all in F32.

A family names its rule and its tensors (`families.Router`). transformers' routers are not used because some keep
the correction bias in BF16, which routes other tokens. Leaves out the experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FamilyError, PlanError
from ..families import Router
from .state import Routing

EPSILON = 1e-20  # in the sum of gates that may all be next to nothing, as DeepSeek's code has it


@dataclass(frozen=True)
class Rule:
    """affinity_TE scores every expert, selection is affinity plus the correction, and gates weigh those selected.

    score  logits [T, E], those of dropped experts −inf where `over_kept` -> affinities [T, E]
    gates  affinities of the selected [T, k] -> gates [T, k]; differentiable, as `score` is
    """

    score: Callable[[Tensor], Tensor]
    gates: Callable[[Tensor], Tensor]
    over_kept: bool = False  # whether an expert's affinity depends on which others there are
    relative: bool = True  # whether gates are the same for affinities that are all larger by one factor


def softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1)


def over_sum(affinity_Tk: Tensor) -> Tensor:
    return affinity_Tk / affinity_Tk.sum(-1, keepdim=True)


def over_guarded_sum(affinity_Tk: Tensor) -> Tensor:
    return affinity_Tk / (affinity_Tk.sum(-1, keepdim=True) + EPSILON)


def as_they_are(affinity_Tk: Tensor) -> Tensor:
    return affinity_Tk


RULES: Mapping[str, Rule] = {
    "sigmoid": Rule(torch.sigmoid, over_sum),  # MiniMax
    "sigmoid_guarded": Rule(
        torch.sigmoid, over_guarded_sum
    ),  # DeepSeek-V3, Kimi, GLM; with groups where they have some
    "softmax": Rule(softmax, as_they_are, over_kept=True, relative=False),  # OLMoE
    # Softmax over all, divided by the sum of the selected, is softmax over the logits of the selected alone, so one rule
    # is Qwen3's (the first), Mixtral's (the first in code, the second on paper) and gpt-oss's (the second).
    "softmax_of_chosen": Rule(softmax, over_sum, over_kept=True),
}


@dataclass(frozen=True)
class LayerRouter:
    """The router of one layer, its tensors in F32 on the device."""

    layer: int
    facts: Router
    weight_ED: Tensor
    correction_E: Tensor | None
    bias_E: Tensor | None
    top_k: int

    def __post_init__(self) -> None:
        if self.facts.rule not in RULES:
            raise FamilyError(f"no routing rule {self.facts.rule!r}; there are {', '.join(RULES)}")

    @property
    def is_local(self) -> bool:
        """Whether dropping an expert changes nothing for tokens that do not select it."""
        rule = RULES[self.facts.rule]
        return self.facts.groups == 1 and (rule.relative or not rule.over_kept)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight_ED, self.correction_E, self.bias_E) if t is not None]


def route(router: LayerRouter, x_TD: Tensor, dropped: Sequence[int] = ()) -> Routing:
    """Where tokens go. Correction biases and groups take part in the choice and not in the gates.

    `dropped` experts are never selected, and the rest is as the model without them would have it: their selection
    scores are −inf before groups are scored, and a softmax is over the others alone. Ties go to the lower id (a stable
    sort), on every device. Raises `PlanError` when `dropped` leaves fewer experts than a token needs.
    """
    experts, gone = router.weight_ED.shape[0], list(dropped)
    if experts - len(set(gone)) < router.top_k:
        raise PlanError(
            f"layer {router.layer} has {experts} experts and {len(set(gone))} of them are dropped; "
            f"a token needs {router.top_k}, so keep at least as many"
        )
    rule = RULES[router.facts.rule]
    logits_TE = F.linear(x_TD.float(), router.weight_ED, router.bias_E)
    if rule.over_kept and gone:
        logits_TE = logits_TE.index_fill(1, torch.tensor(gone, device=x_TD.device), -torch.inf)
    affinity_TE = rule.score(logits_TE)
    with torch.no_grad():
        selection_TE = affinity_TE.clone() if router.correction_E is None else affinity_TE + router.correction_E
        selection_TE[:, gone] = -torch.inf
        if router.facts.groups > 1:
            selection_TE = within_groups(selection_TE, router.facts.groups, router.facts.kept_groups)
        best = selection_TE.sort(dim=-1, descending=True, stable=True)
        experts_Tk = best.indices[:, : router.top_k]
        if router.facts.groups > 1 and bool(best.values[:, : router.top_k].isneginf().any()):
            raise PlanError(
                f"layer {router.layer} selects within {router.facts.groups} groups of experts, and dropping {len(gone)} leaves "
                f"too few in some; keep equally many in each, two at least"
            )
    return Routing(router.layer, affinity_TE, experts_Tk, rule.gates(affinity_TE.gather(1, experts_Tk)), x_TD)


def within_groups(selection_TE: Tensor, groups: int, kept: int) -> Tensor:
    """−inf but for the `kept` groups whose two best experts have the largest sum (DeepSeek-V3, arXiv:2412.19437, §2.1.2)."""
    grouped_TGe = selection_TE.unflatten(1, (groups, -1))
    score_TG = grouped_TGe.topk(2, dim=-1).values.sum(-1)
    best_Tg = score_TG.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    closed_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter_(1, best_Tg, False)
    return grouped_TGe.masked_fill(closed_TG[..., None], -torch.inf).flatten(1)
