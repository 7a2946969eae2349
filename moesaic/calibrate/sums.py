"""What one MoE layer's observer adds up while text streams through it.

Sums are kept by domain and by half (every second row), so that experts can be ranked again for other
domains, and the ranking of one half held against that of the other. Only selected experts run, with
exact gates. What is as wide as a token is summed where the layer is, and comes from there once. Leaves out scores
(criteria) and inputs of attention (rounding asks for those itself).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..stream import BlockPass, ExpertPass, Observer, Routing

SUMS = ("tokens", "gate", "gate2", "norm", "norm2", "gated", "gated2", "gnorm2", "turned")  # see criteria/base.py


def only(seen: ExpertPass, mask_n: Tensor) -> ExpertPass:
    """The same of fewer tokens."""
    return ExpertPass(
        layer=seen.layer,
        expert=seen.expert,
        tokens_n=seen.tokens_n[mask_n],
        gates_n=seen.gates_n[mask_n],
        x_nD=seen.x_nD[mask_n],
        inner_nI=seen.inner_nI[mask_n],
        f_nD=seen.f_nD[mask_n],
    )


@dataclass
class LayerSums:
    """What one MoE layer's observer adds up, in F64, and squares of inputs in F32; G groups are domain × half, E experts.

    Memory on the device of the layer: 4 · E · (D + I) bytes.
    """

    group_T: Tensor
    groups: int
    experts: int
    sums: dict[str, Tensor] = field(default_factory=dict)  # name -> [G, E]
    inputs_ED: Tensor | None = None  # Σ x², for what weighs errors of gate and up by their inputs
    inner_EI: Tensor | None = None  # Σ inner², for the down projection
    together_EE: Tensor | None = None  # tokens that selected both
    weighted: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # expert, tokens, g‖f‖

    def __post_init__(self) -> None:
        for name in (*SUMS, "peak", "nonfinite"):
            self.sums[name] = torch.zeros(self.groups, self.experts, dtype=torch.float64)

    @property
    def observer(self) -> Observer:
        return Observer(self.route, self.expert, self.block)

    def route(self, seen: Routing) -> None:
        ids, count = seen.experts_Tk, self.experts
        pairs = ids[:, :, None] * count + ids[:, None, :]
        self.together_EE = pairs.flatten().bincount(minlength=count * count).reshape(count, count).cpu()

    def expert(self, seen: ExpertPass) -> None:
        norm_n = seen.f_nD.float().norm(dim=1).double()
        group_n, gate_n = self.group_T[seen.tokens_n], seen.gates_n.double()
        finite = norm_n.isfinite() & gate_n.isfinite()
        self.add("nonfinite", seen.expert, group_n[~finite], torch.ones_like(norm_n[~finite]))
        if not finite.all():
            group_n, gate_n, norm_n, seen = group_n[finite], gate_n[finite], norm_n[finite], only(seen, finite)
        for name, values in (
            ("tokens", torch.ones_like(norm_n)), ("gate", gate_n), ("gate2", gate_n**2), ("norm", norm_n), ("norm2", norm_n**2),
            ("gated", gate_n * norm_n), ("gated2", (gate_n * norm_n) ** 2), ("gnorm2", gate_n * norm_n**2),
        ):  # fmt: skip
            self.add(name, seen.expert, group_n, values)
        if len(norm_n):
            peak_n = seen.f_nD.abs().amax(1).double().cpu()
            peak_G = self.sums["peak"][:, seen.expert]
            self.sums["peak"][:, seen.expert] = peak_G.scatter_reduce(0, group_n.cpu(), peak_n, "amax")
        self.weighted.append((seen.expert, seen.tokens_n, gate_n * norm_n))
        self.moments(seen)

    def add(self, name: str, expert: int, group_n: Tensor, values_n: Tensor) -> None:
        self.sums[name][:, expert] += group_n.bincount(values_n, minlength=self.groups).double().cpu()

    def moments(self, seen: ExpertPass) -> None:
        if self.inputs_ED is None or self.inner_EI is None:
            self.inputs_ED = torch.zeros(self.experts, seen.x_nD.shape[1], device=seen.x_nD.device)
            self.inner_EI = torch.zeros(self.experts, seen.inner_nI.shape[1], device=seen.x_nD.device)
        self.inputs_ED[seen.expert] += seen.x_nD.float().square().sum(0)
        self.inner_EI[seen.expert] += seen.inner_nI.float().square().sum(0)

    def block(self, seen: BlockPass) -> None:
        """EASY-EP's term: how far the routed experts turned each token's residual stream."""
        turn_T = (1 - torch.cosine_similarity(seen.h_TD, seen.h_TD + seen.routed_TD, dim=1)).clamp(min=0).double()
        for expert, tokens_n, gated_n in self.weighted:
            self.add("turned", expert, self.group_T[tokens_n], (gated_n * turn_T[tokens_n]).nan_to_num(0.0))
        self.weighted.clear()

    def tensors(self) -> dict[str, Tensor]:
        found = dict(self.sums)
        for name in ("inputs_ED", "inner_EI", "together_EE"):
            if (tensor := getattr(self, name)) is not None:
                found[name] = tensor.cpu()
        return found
