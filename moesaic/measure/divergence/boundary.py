"""What models show on their way through the layers, and what is kept of a source for later.

Leaves out how the models get from one layer to the next (lockstep.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...artifact import read_tensors, write_tensors
from .comparison import Divergence
from .routing import Route

KNOWN = "known_source"
Routes = Mapping[int, Sequence[Route]]  # MoE layer -> of each block of rows


@dataclass(frozen=True)
class Mark:
    """What one model shows after one layer. None: not compared, or no MoE layer."""

    layer: int
    relative_error: float | None = None  # ‖h − h_source‖ / ‖h_source‖
    router_agreement: float | None = None  # share of the source's experts that were selected too
    pruned_mass: float | None = None  # the source's gates on experts that are gone


@dataclass(frozen=True)
class Known:
    """What a source gave on certain rows: all that another model has to be held against, without the source's sweep.

    The final hidden states stand for the logits and are smaller by vocabulary over width.
    """

    final: Sequence[Tensor]  # before the last norm, [B, T, D] of each block of rows
    routes: Routes
    nonfinite: Sequence[Mapping[int, int]]  # of each block: layer -> tokens
    floor: Sequence[Divergence]  # of the source against itself with noise; empty: not measured

    def save(self, path: Path, inputs: Mapping[str, str]) -> None:
        tensors = {f"final.{i}": h_BTD.cpu() for i, h_BTD in enumerate(self.final)} | route_tensors(self.routes)
        for i, divergence in enumerate(self.floor):
            tensors |= {f"floor.{i}.{name}": x_BS for name, x_BS in divergence.values.items()}
            tensors[f"floor.{i}.scored"] = divergence.scored_BS
        body = {"nonfinite": [dict(counts) for counts in self.nonfinite], "floor": len(self.floor)}
        write_tensors(path, KNOWN, tensors, inputs, body)

    @staticmethod
    def load(path: Path, inputs: Mapping[str, str]) -> "Known":
        tensors, body = read_tensors(path, KNOWN, inputs)
        bad = [{int(layer): n for layer, n in counts.items()} for counts in body["nonfinite"]]
        floor = []
        for i in range(body["floor"]):
            values = {n.split(".", 2)[2]: x for n, x in tensors.items() if n.startswith(f"floor.{i}.")}
            floor.append(Divergence(values.pop("scored"), values))
        return Known([tensors[f"final.{i}"] for i in range(len(bad))], routes_of(tensors), bad, floor)


def route_tensors(routes: Routes) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for layer, blocks in routes.items():
        for i, route in enumerate(blocks):
            found |= {f"route.{layer}.{i}.experts": route.experts_Tk, f"route.{layer}.{i}.gates": route.gates_Tk}
    return found


def routes_of(tensors: Mapping[str, Tensor]) -> dict[int, list[Route]]:
    places = sorted(tuple(map(int, n.split(".")[1:3])) for n in tensors if n.startswith("route.") and "gates" in n)
    found: dict[int, list[Route]] = {}
    for layer, i in places:
        at = f"route.{layer}.{i}"
        found.setdefault(layer, []).append(Route(tensors[f"{at}.experts"], tensors[f"{at}.gates"]))
    return found
