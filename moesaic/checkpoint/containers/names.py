"""Names of modules as engines know them, and regular expressions for many of them at once.

vLLM, the disk and transformers each call a module otherwise, and config.json has to be understood by all. Leaves out
what is said of the modules.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import CheckpointError
from ...families import FAMILIES, Architecture, Linear


def firsts(members: Sequence[Linear]) -> list[Linear]:
    """A unit's matrices, of routed experts the first alone: engines ask for its name, and mean all of them."""
    return [linear for linear in members if not linear.expert]


@dataclass(frozen=True)
class Modules:
    """Modules of equal names in several layers, which one regular expression matches."""

    above: tuple[str, ...]  # what may stand before "layers", in any order: engines nest it in orders of their own
    layers: tuple[int, ...]
    parent: str  # "self_attn", "mlp.experts"
    leaves: tuple[str, ...]
    routed: bool  # an expert's number follows the parent

    def pattern(self, whole: bool = False) -> str:
        """As `(model\\.)+layers\\.(0|1)\\.mlp\\.(gate_proj|up_proj)$`; with `whole` also what holds a layer's experts.

        What stands above is spelled out, since a vision tower may have layers and projections of the same names.
        """
        above = "|".join(rf"{re.escape(word)}\." for word in self.above)
        leaf = rf"\.({'|'.join(self.leaves)})"
        if self.routed:
            leaf = rf"(\.\d+{leaf})?" if whole else rf"\.\d+{leaf}"
        return rf"({above})+layers\.({'|'.join(map(str, self.layers))})\.{re.escape(self.parent)}{leaf}$"


def modules(architecture: Architecture, units: Iterable[str]) -> list[Modules]:
    """The modules of `units` under every name by which vLLM, the disk or transformers knows them."""
    family = FAMILIES[architecture.family]
    theirs = {
        tensor.removesuffix(".weight"): parameter.removesuffix(".weight")
        for layer in range(architecture.layers)
        for parameter, tensors in family.wiring.parameters(architecture, layer).items()
        for tensor in tensors
    }
    layers: dict[tuple[str, str, bool], dict[int, None]] = {}  # (parent, leaf, routed) -> layers
    for linear in (n for unit in units for n in firsts(architecture.units[unit])):
        for name in (family.engine.name_of(linear.name), linear.name, theirs.get(linear.name, linear.name)):
            parent, leaf = name.split(f"layers.{linear.layer}.")[-1].rsplit(".", 1)
            routed = linear.expert is not None
            key = parent.rpartition(".")[0] if routed else parent, leaf, routed
            layers.setdefault(key, {})[linear.layer] = None
    leaves: dict[tuple[str, bool, tuple[int, ...]], list[str]] = {}
    for (parent, leaf, routed), found in layers.items():
        leaves.setdefault((parent, routed, tuple(found)), []).append(leaf)
    above = tuple(architecture.layer_prefix.split(".")[:-2])
    return [Modules(above, where, parent, tuple(names), routed) for (parent, routed, where), names in leaves.items()]


def small_modules(architecture: Architecture) -> list[str]:
    """Regular expressions for the matrices that are no linears: embedding, head, routers, vision."""
    found: dict[str, None] = {}
    for tensor in architecture.tensors:
        words = tensor.name.removesuffix(".weight").split(".")
        if tensor.role == "mtp" and len(tensor.shape) < 2:
            continue
        if tensor.role == "vision":
            found[rf"(.*\.)?{re.escape(words[0])}\..*"] = None
        elif tensor.role in ("embedding", "head", "router", "mtp"):
            found[rf"(.*\.)?{re.escape(words[-1])}$"] = None
    return list(found)


def expression(pattern: str) -> re.Pattern[str]:
    """A regular expression of config.json, compiled. Raises `CheckpointError`."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"config.json has the pattern {pattern!r:.80}, which is not a valid regular expression: {error}"
        ) from error
