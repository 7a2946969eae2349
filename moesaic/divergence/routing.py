"""Where tokens go: the experts that the source selects, against those that another model selects for the same tokens.

Another model may lack experts and number the rest anew, so it is compared in the source's numbering.
Leaves out what the experts do with the tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, InputError
from ..stream import Observer, Routing

SAME_ROW = 0.999  # cosine; rows of different experts are far below, rows rounded to BF16 far above
Kept = Mapping[int, Sequence[int]]  # MoE layer -> ids in the source, by id in the other


@dataclass(frozen=True)
class Route:
    """The choice of one MoE layer for some tokens, small enough to keep: ids int16, gates float16, on the CPU."""

    experts_Tk: Tensor
    gates_Tk: Tensor

    @staticmethod
    def of(routing: Routing) -> "Route":
        return Route(routing.experts_Tk.to(torch.int16).cpu(), routing.gates_Tk.half().cpu())


def into(kept: list[Route]) -> Observer:
    """An observer that adds the choice of each MoE layer to `kept`."""
    return Observer(route=lambda routing: kept.append(Route.of(routing)))


def agreement(source: Route, other: Route, kept_E: Sequence[int], experts: int) -> tuple[Tensor, Tensor]:
    """Of each token [T]: the share of the source's experts that are selected, and the source's gates on those that are gone."""
    ids_Tk, kept_of = source.experts_Tk.long(), torch.tensor(kept_E)
    there_E = torch.zeros(experts, dtype=torch.bool)
    there_E[kept_of] = True
    chosen_TE = torch.zeros(len(ids_Tk), experts, dtype=torch.bool)
    chosen_TE.scatter_(1, kept_of[other.experts_Tk.long()], True)
    agreed_T = chosen_TE.gather(1, ids_Tk).float().mean(1)
    gone_T = source.gates_Tk.float().where(~there_E[ids_Tk], 0.0).sum(1)
    return agreed_T, gone_T


def kept_of(pruned: Checkpoint, base: Checkpoint) -> dict[int, list[int]]:
    """Which of the base's experts a pruned model kept, found by its router rows: no calibration, no note needed.

    Raises `CheckpointError` when a row resembles none of the base's: then it is no relative of it.
    """
    a, b = pruned.architecture, base.architecture
    if (a.family, a.moe_layers, a.hidden) != (b.family, b.moe_layers, b.hidden):
        raise InputError(
            f"{pruned.path} and {base.path} have different families, layers or widths; name the base it was made from"
        )
    found = {}
    for layer in a.moe_layers:
        mine, theirs = (
            torch.nn.functional.normalize(c.read(c.architecture.routers[layer].weight).double(), dim=1)
            for c in (pruned, base)
        )
        cosine, ids = (mine @ theirs.T).max(1)
        if float(cosine.min()) < SAME_ROW or len(set(ids.tolist())) != len(ids):
            worst = int(cosine.argmin())
            raise CheckpointError(
                f"router row {worst} of layer {layer} in {pruned.path} resembles none of {base.path} "
                f"(cosine {float(cosine[worst]):.3f}); it was not made from that model"
            )
        found[layer] = ids.tolist()
    return found
