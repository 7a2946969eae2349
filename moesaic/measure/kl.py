"""KL of many branches from one source, in F32 without cancellation: what differences of logits come to.

With d = the branch's logits − the source's = W (x − x₀), KL(p‖q) = ln Σ p eᵈ − Σ p d = ln(1 + u + m) − m, where
u = Σ p (eᵈ − 1 − d) and m = Σ p d: u is a sum of terms ≥ 0, so that a KL of 1e-7 keeps its digits (the second
sum's rounding enters squared). A branch costs one product with the head and one exponential. Leaves out all
figures but KL, and overlap: see divergence.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..stream import LayerRun
from ..stream.memory import spans
from ..stream.state import ignore

COPIES = 5  # F32 tensors [tokens, ids] at the worst moment


@torch.no_grad()
def kl_to_source(
    run: LayerRun, source_BTD: Tensor, branches: Sequence[Tensor], advance: Callable[[int], None] = ignore
) -> list[Tensor]:
    """KL(source ‖ branch) in nats of every next-token distribution but each row's last, [B, T − 1] float64, CPU.

    source_BTD and branches are hidden states [B, T, D] after the last layer. NaN where either is not finite, or
    where a branch lifts a logit by more than 80 nats above the source: no F32 holds what follows. The head is
    read twice for all branches together; `advance` is told how many of the branches' logits are done.
    """
    norm, shape = run.norm(), source_BTD[:, :-1].shape[:2]
    x_ND = run.in_spans(norm, source_BTD[:, :-1].flatten(0, 1), 4)
    apart = [run.in_spans(norm, h_BTD[:, :-1].flatten(0, 1), 4) - x_ND for h_BTD in branches]
    log_z_N = torch.full((len(x_ND),), -torch.inf, dtype=torch.float64, device=run.device)
    for block in run.vocabulary_spans():
        head_vD = run.rows(run.architecture.head, block)
        for n in spans(len(x_ND), 4 * COPIES * len(head_vD), run.block_bytes):
            found_n = F.linear(x_ND[n], head_vD).float().logsumexp(-1)
            log_z_N[n] = torch.logaddexp(log_z_N[n], found_n.double())
    u, m = (torch.zeros(len(branches), len(x_ND), dtype=torch.float64, device=run.device) for _ in "um")
    for block in run.vocabulary_spans():
        head_vD = run.rows(run.architecture.head, block)
        for n in spans(len(x_ND), 4 * COPIES * len(head_vD), run.block_bytes):
            p_nv = (F.linear(x_ND[n], head_vD).float() - log_z_N[n, None].float()).exp_()
            for i, off_ND in enumerate(apart):
                d_nv = F.linear(off_ND[n], head_vD).float()
                m[i, n] += torch.linalg.vecdot(p_nv, d_nv)
                u[i, n] += torch.linalg.vecdot(p_nv, torch.expm1(d_nv).sub_(d_nv))
                advance(d_nv.numel())
    return [kl_N.view(shape).cpu() for kl_N in ((u + m).log1p() - m).clamp_min(0.0).where(u.isfinite(), torch.nan)]
