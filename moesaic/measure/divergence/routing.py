"""Where tokens go: the experts that the source selects, against those that another model selects for the same tokens.

Another model may lack experts and number the rest anew, so it is compared in the source's numbering.
Leaves out what the experts do with the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...stream import Observer, Routing


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
