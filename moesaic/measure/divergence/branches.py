"""Branches of one model against its own undisturbed run: masked experts, altered weights, any number at once.

The head passes by twice for all of them together: once for the distributions' sums, once for how much
of them overlaps. Leaves out how the branches came to differ.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...stream import LayerRun
from ...stream.memory import spans
from .comparison import Comparison, Divergence

COPIES = 8  # float64 tensors [tokens, ids] at the worst moment


@torch.no_grad()
def against(run: LayerRun, source_BTD: Tensor, branches: Sequence[Tensor], tokens_BT: Tensor) -> list[Divergence]:
    """Every prediction of each branch [B, T, D] against the source's, with `overlap` among the values.

    overlap is Σ min(p, q) over the vocabulary: the share of tokens drawn from the branch that a
    speculative sampler for the source would accept (EvoESAP, arXiv 2603.06003), one less total variation.
    """
    norm = run.norm()
    states = [run.in_spans(norm, h[:, :-1].flatten(0, 1), 4) for h in (source_BTD, *branches)]
    next_N = tokens_BT[:, 1:].flatten().to(run.device)
    comparisons = [Comparison.of(next_N) for _ in branches]
    for block in run.vocabulary_spans():
        head_vD = run.rows(run.architecture.head, block)
        for n in spans(len(next_N), 8 * COPIES * len(head_vD), run.block_bytes):
            source_nv = F.linear(states[0][n], head_vD)
            for comparison, x_ND in zip(comparisons, states[1:]):
                comparison.add(n, block.start, source_nv, F.linear(x_ND[n], head_vD))
    overlap = overlaps(run, states, comparisons)
    scored_BS = torch.ones(tokens_BT.shape[0], tokens_BT.shape[1] - 1, dtype=torch.bool)
    found = [c.finish() | {"overlap": o_N.float()} for c, o_N in zip(comparisons, overlap)]
    return [Divergence.of(scored_BS, values) for values in found]


def overlaps(run: LayerRun, states: Sequence[Tensor], comparisons: Sequence[Comparison]) -> list[Tensor]:
    """Σ min(p, q) of each branch, [N] float64, once the sums of all distributions are known."""
    found = [torch.zeros(len(states[0]), dtype=torch.float64, device=run.device) for _ in comparisons]
    for block in run.vocabulary_spans():
        head_vD = run.rows(run.architecture.head, block)
        for n in spans(len(states[0]), 8 * COPIES * len(head_vD), run.block_bytes):
            source_nv = F.linear(states[0][n], head_vD).double()
            for i, (comparison, x_ND) in enumerate(zip(comparisons, states[1:])):
                p_nv = (source_nv - comparison.source.log_z_N[n, None]).exp_()
                q_nv = (F.linear(x_ND[n], head_vD).double() - comparison.export.log_z_N[n, None]).exp_()
                found[i][n] += torch.minimum(p_nv, q_nv).sum(-1)
    return found
