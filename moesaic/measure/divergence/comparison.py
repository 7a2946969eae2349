"""Two next-token distributions held against each other, token by token: exact, in float64, over the whole vocabulary.

KL is KL(source ‖ export) in nats. Positions where either model is not finite are left out of every
figure of both, and counted. Leaves out errors (bootstrap.py) and where logits come from (lockstep.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

FIELDS = (
    "kl_nats",  # Σ p (ln p − ln q)
    "nll_source",  # −ln p of the token that follows, nats
    "nll_export",
    "confidence",  # the source's largest probability
    "delta_p",  # q − p of the token that follows
    "same_top1",  # 1 where both put the same token first
    "shared_top5",  # share of the source's first five that are among the export's
    "greedy_source",  # 1 where the token that follows is the first choice
    "greedy_export",
)
FLAGS = ("finite_source", "finite_export")


@dataclass(frozen=True)
class Comparison:
    """Two distributions over one vocabulary for N tokens, from logits that arrive in blocks of the vocabulary.

    KL = Σ e^a (a − b) / Z_p − ln Z_p + ln Z_q, with sums that are rescaled when a larger logit arrives,
    so that nothing of size [N, V] need ever exist and the head is read once for all tokens.
    """

    next_N: Tensor
    source: "Side"
    export: "Side"
    cross_N: Tensor  # Σ e^(a − max a) (a − b) so far

    @staticmethod
    def of(next_N: Tensor) -> "Comparison":
        cross_N = torch.zeros(next_N.shape, dtype=torch.float64, device=next_N.device)
        return Comparison(next_N, Side.of(next_N), Side.of(next_N), cross_N)

    def add(self, at: slice, first: int, source_nv: Tensor, export_nv: Tensor) -> None:
        """Logits of tokens `at` for the ids `first`, `first` + 1, …; needs about six float64 [n, v]."""
        a_nv, b_nv = source_nv.double(), export_nv.double()
        next_n = self.next_N[at] - first
        weight_nv, shrink_n = self.source.add(at, first, a_nv, next_n)
        self.export.add(at, first, b_nv, next_n)
        self.cross_N[at] = self.cross_N[at] * shrink_n + a_nv.sub_(b_nv).mul_(weight_nv).sum(-1)

    def finish(self) -> dict[str, Tensor]:
        """Each of `FIELDS` [N], float32, and `finite_source`, `finite_export` [N].

        A position of which either model is not finite has NaN in every field.
        """
        p, q = self.source, self.export
        log_p_N, log_q_N = p.next_N - p.log_z_N, q.next_N - q.log_z_N
        kl_N = self.cross_N / p.sum_N - p.log_z_N + q.log_z_N
        found = {
            "kl_nats": kl_N.clamp_min(0.0),  # below 0 only by rounding
            "nll_source": -log_p_N,
            "nll_export": -log_q_N,
            "confidence": (p.max_N - p.log_z_N).exp(),
            "delta_p": log_q_N.exp() - log_p_N.exp(),
            "same_top1": (p.ids_N5[:, 0] == q.ids_N5[:, 0]).double(),
            "shared_top5": (p.ids_N5[:, :, None] == q.ids_N5[:, None, :]).any(-1).double().mean(-1),
            "greedy_source": (p.ids_N5[:, 0] == self.next_N).double(),
            "greedy_export": (q.ids_N5[:, 0] == self.next_N).double(),
        }
        both_N = p.finite_N & q.finite_N
        values = {name: x_N.where(both_N, torch.nan).float() for name, x_N in found.items()}
        return values | {"finite_source": p.finite_N, "finite_export": q.finite_N}


@dataclass(frozen=True)
class Side:
    """What one of the two distributions has shown so far: largest logit, sum, first five ids, the next token's logit."""

    max_N: Tensor
    sum_N: Tensor  # Σ e^(a − max)
    next_N: Tensor
    best_N5: Tensor
    ids_N5: Tensor
    finite_N: Tensor

    @staticmethod
    def of(next_N: Tensor) -> "Side":
        zero_N = torch.zeros(next_N.shape, dtype=torch.float64, device=next_N.device)
        low_N5 = torch.full((len(next_N), 5), -torch.inf, dtype=torch.float64, device=next_N.device)
        finite_N = torch.ones_like(next_N, dtype=torch.bool)
        return Side(
            zero_N - torch.inf, zero_N.clone(), zero_N.clone(), low_N5, torch.zeros_like(low_N5).long(), finite_N
        )

    @property
    def log_z_N(self) -> Tensor:
        return self.max_N + self.sum_N.log()

    def add(self, at: slice, first: int, a_nv: Tensor, next_n: Tensor) -> tuple[Tensor, Tensor]:
        """Take in logits; returns e^(a − max) and the factor by which older sums shrank."""
        self.finite_N[at] &= a_nv.isfinite().all(-1)
        held = (next_n >= 0) & (next_n < a_nv.shape[-1])
        value_n = a_nv.gather(-1, next_n.clamp(0, a_nv.shape[-1] - 1)[:, None])[:, 0]
        self.next_N[at] = value_n.where(held, self.next_N[at])
        best_n5, index_n5 = a_nv.topk(min(5, a_nv.shape[-1]), -1)
        best_n = torch.cat([self.best_N5[at], best_n5], -1)
        order_n5 = best_n.sort(dim=-1, descending=True, stable=True).indices[:, :5]
        self.ids_N5[at] = torch.cat([self.ids_N5[at], index_n5 + first], -1).gather(-1, order_n5)
        self.best_N5[at] = best_n.gather(-1, order_n5)
        max_n = self.best_N5[at][:, 0]
        shrink_n = (self.max_N[at] - max_n).exp()
        weight_nv = (a_nv - max_n[:, None]).exp_()
        self.sum_N[at] = self.sum_N[at] * shrink_n + weight_nv.sum(-1)
        self.max_N[at] = max_n
        return weight_nv, shrink_n


@dataclass(frozen=True)
class Divergence:
    """Per-token values of rows that two models have read. Row r, position t: the prediction of token t + 1."""

    scored_BS: Tensor  # bool, S = T − 1: which predictions count
    values: Mapping[str, Tensor]  # `FIELDS` (and what else is known) float32, `FLAGS` bool, [B, S], CPU; NaN: unknown

    @staticmethod
    def of(scored_BS: Tensor, found: Mapping[str, Tensor]) -> "Divergence":
        """From `Comparison.finish` of the scored positions, in row-major order."""
        values = {}
        for name, x_N in found.items():
            empty = torch.nan if x_N.is_floating_point() else False
            values[name] = torch.full(scored_BS.shape, empty, dtype=x_N.dtype)
            values[name][scored_BS] = x_N.cpu()
        return Divergence(scored_BS, values)

    @cached_property
    def counted_BS(self) -> np.ndarray:
        """Positions that every figure rests on: scored, and finite in both models."""
        return np.asarray((self.scored_BS & self.values["finite_source"] & self.values["finite_export"]).numpy())

    @property
    def tokens(self) -> int:
        return int(self.counted_BS.sum())

    @property
    def nonfinite(self) -> dict[str, int]:
        """Scored positions at which a model was not finite, by model."""
        return {m: int((self.scored_BS & ~self.values[f"finite_{m}"]).sum()) for m in ("source", "export")}

    def __getitem__(self, name: str) -> np.ndarray:
        """A field [B, S] in float64, 0 where nothing is counted."""
        return np.where(self.counted_BS, self.values[name].numpy(), 0.0).astype(np.float64)
