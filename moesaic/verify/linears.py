"""A matrix of an export held to what the plan says it is: copied, recoded, rounded again, or taken from an overlay.

Leaves out finding which tensors there are and everything that is no matrix.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import PLAUSIBLE_RMS
from ..checkpoint.containers import Packing
from ..checkpoint.damage import not_finite
from ..checkpoint.digests import NOTE as DIGESTS
from ..checkpoint.digests import Digests
from ..checkpoint.safetensors_reader import SafetensorsReader
from ..errors import MoesaicError
from ..export import in_kernels, recoded, requantized, round_together
from ..families import Linear
from ..formats import Scales
from ..plan import overlay
from ..plan.blueprint import Blueprint, is_made_of_source, keeps_bytes, keeps_values
from ..progress import Meter
from ..rounding import ROUNDINGS, round_siblings, rounding_named
from .verdict import Verdict

RMS_RATIO = (0.5, 2.0)  # decoded over source; rounding moves it by per cents, a wrong scale by powers
FAR = 4.0  # times the error of rounding to nearest: GPTQ at 2 bits stays below it
CLOSE = 0.7  # error over weight, root mean squares: two bits stay below it, scales twice too large do not

Tensors = Mapping[str, Mapping[str, Tensor]]  # linear -> its tensors by meaning


@dataclass(frozen=True)
class Sides:
    """The export, and beside it the source and what the plan makes of it, if they are known."""

    export: SafetensorsReader
    source: SafetensorsReader | None
    blueprint: Blueprint | None
    bad: Mapping[str, str]  # tensors whose header entry already has a finding
    outdated: frozenset[str]  # formats that the export was rounded to by another version of today's arithmetic
    digests: Digests  # of every tensor as it was written; empty where the export has none


def check_linears(sides: Sides, group: tuple[Linear, ...], by_reference: bool, meter: Meter) -> Verdict:
    """Matrices that share a second level of scale: finite, of a weight's magnitude, and what the plan says they are."""
    verdict, blueprint = Verdict(), sides.blueprint
    whole = [n for n in group if not any(name in sides.bad for name in sides.export.names(n))]
    stored = {linear.name: sides.export.parts(linear) for linear in whole}
    proven = len(whole) == len(group) and not by_reference and made_again(sides, group, stored, verdict)
    sound = [] if proven else [check_values(n, sides.export.packing(n), stored[n.name], verdict) for n in whole]
    if not proven and sides.source is not None and blueprint is not None:
        for linear in whole:
            if keeps_bytes(blueprint, linear):
                wanted = sides.source.parts(blueprint.origin[linear.name])
                verdict.compared["bytes"] += len(stored[linear.name])
                for key in differing_parts(stored[linear.name], wanted):
                    verdict.add("bytes", f"{linear.name} ({key})", "differs from the source's")
                if is_not_finite(verdict, linear) and not differing_parts(stored[linear.name], wanted):
                    file = sides.source.checkpoint.located(blueprint.origin[linear.name])["codes"].file
                    verdict.add("finite", linear.name, f"is so in the source too: fetch its {file} again")
        if len(whole) == len(group) and all(sound) and not any(keeps_bytes(blueprint, n) for n in group):
            if group[0].name in blueprint.plan.overlaid:
                check_taken(sides.source, blueprint, group[0], stored[group[0].name], verdict)
            elif keeps_values(blueprint, group[0]):
                check_recoded(sides.source, blueprint, group, stored, verdict)
            else:
                check_rounded(sides, blueprint, group, stored, by_reference, verdict)
    for linear in whole if sides.digests else ():
        check_written(sides, linear, stored[linear.name], verdict)
    meter.advance(sum(t.nbytes for parts in stored.values() for t in parts.values()))
    return verdict


def check_written(sides: Sides, linear: Linear, stored: Mapping[str, Tensor], verdict: Verdict) -> None:
    """A matrix's tensors, or its rows of stacked ones, by the digests taken when they were written."""
    checkpoint = sides.export.checkpoint
    place = checkpoint.container.place(checkpoint.architecture, linear)
    for key, part in sides.export.packing(linear).parts(linear.shape).items():
        name = place.tensor(part).name
        wanted, where = sides.digests.get(name), name
        if place.row is not None:
            wanted = wanted[place.row] if isinstance(wanted, list) and len(wanted) == place.rows else None
            where = f"{name} [{place.row}]"
        check_digest(wanted, overlay.digest([stored[key]]), where, verdict)


def check_digest(wanted: Any, found: str, name: str, verdict: Verdict) -> None:
    verdict.compared["digest"] += 1
    if wanted is None:
        verdict.add("digest", name, f"has none in {DIGESTS}; export the model again")
    elif found != wanted:
        verdict.add("digest", name, "is not what was written: a bit or more has changed since")


def is_not_finite(verdict: Verdict, linear: Linear) -> bool:
    return any(found.check == "finite" and found.where == linear.name for found in verdict.findings)


def made_again(sides: Sides, group: tuple[Linear, ...], stored: Tensors, verdict: Verdict) -> bool:
    """Whether kernels make these very bytes of the source, close to its weights: then no value has to be looked at."""
    source, blueprint = sides.source, sides.blueprint
    if source is None or blueprint is None or any(keeps_values(blueprint, n) for n in group):
        return False
    rounding, (low, high) = rounding_named(blueprint.plan.rounding), PLAUSIBLE_RMS
    is_known = rounding.kernel and blueprint.formats[group[0].name] not in sides.outdated
    if not (is_known and is_made_of_source(blueprint, group[0]) and in_kernels(blueprint, group)):
        return False
    again = list(requantized(blueprint, group, rounding.kernel == "searched", source.parts, measure=True))
    squares = {n.name: (made.squared_error or 0.0, made.squared_weight or 0.0) for n, (_, made) in zip(group, again)}
    for linear, (wanted, _) in zip(group, again):
        error, weight = squares[linear.name]
        near = error <= CLOSE**2 * weight and low < (weight / linear.elements) ** 0.5 < high
        if not near or differing_parts(stored[linear.name], wanted):
            return False
    verdict.errors |= squares
    count = sum(len(wanted) for wanted, _ in again)
    verdict.compared.update(finite=count, codes=count)
    return True


def check_values(linear: Linear, packing: Packing, stored: Mapping[str, Tensor], verdict: Verdict) -> bool:
    """Decoded weights are finite, and neither too small nor of an impossible size. False where nothing decodes."""
    verdict.compared["finite"] += len(stored)
    try:
        w_OI = packing.decode(stored, linear.shape)
    except MoesaicError as error:
        verdict.add("structure", linear.name, f"does not decode: {error}")
        return False
    rms, (low, high) = root_mean_square(w_OI), PLAUSIBLE_RMS
    if bad := not_finite(w_OI):
        verdict.add("finite", linear.name, f"decodes to {bad:,} NaN or infinite values")
    elif not low < rms < high and bool(w_OI.any()):
        verdict.add("magnitude", linear.name, f"decodes to a root mean square of {rms:.3g}; no weight matrix has that")
    return True


def check_recoded(
    source: SafetensorsReader, blueprint: Blueprint, group: tuple[Linear, ...], stored: Tensors, verdict: Verdict
) -> None:
    """The very values of the source under other codes: both sides decoded, and recoding done again."""
    made = iter(recoded(blueprint, group))
    for linear in group:
        packing, parts, origin = blueprint.packing(linear), stored[linear.name], blueprint.origin[linear.name]
        wanted = {key: next(made) for key in packing.parts(linear.shape)}
        w_OI = source.packing(origin).decode(source.parts(origin), origin.shape)
        verdict.compared["values"] += 1
        verdict.compared["codes"] += len(parts)
        if wrong := int((packing.decode(parts, linear.shape) != w_OI).sum()):
            verdict.add("values", linear.name, f"has {wrong:,} of {w_OI.numel():,} weights that are not the source's")
        elif keys := differing_parts(parts, wanted):
            verdict.add("codes", linear.name, f"means the source's weights by other {', '.join(keys)}")


def check_rounded(
    sides: Sides, blueprint: Blueprint, group: tuple[Linear, ...], stored: Tensors, by_reference: bool, verdict: Verdict
) -> None:
    """Round the source again and compare codes and scales: exact for a rounding that needs no data.

    Where that cannot be had here, the error is at most `FAR` times what rounding to nearest gives.
    """
    source = sides.source
    assert source is not None
    weights = [source.packing(o).decode(source.parts(o), o.shape) for o in (blueprint.origin[n.name] for n in group)]
    is_near = bool(rounding_named(blueprint.plan.rounding).needs) or blueprint.formats[group[0].name] in sides.outdated
    again = nearest(blueprint, group, weights) if is_near else rounded_again(blueprint, group, weights, by_reference)
    for i, (linear, w_OI) in enumerate(zip(group, weights)):
        packing, parts = blueprint.packing(linear), stored[linear.name]
        mine = packing.decode(parts, linear.shape)
        compare(linear, mine, w_OI, verdict)
        wanted = again[i]
        if is_near:
            verdict.compared["near"] += len(parts)
            least = sum_of_squares(packing.decode(wanted, linear.shape) - w_OI)
            if (off := verdict.errors[linear.name][0]) > FAR**2 * least:
                far = (off / max(least, 1e-300)) ** 0.5
                verdict.add("near", linear.name, f"is {far:.3g} times as far from the source as rounding to nearest is")
            continue
        verdict.compared["codes"] += len(parts)
        if wrong := differing_parts(parts, wanted):
            count = int((mine != packing.decode(wanted, linear.shape)).sum())
            what = f"has {', '.join(wrong)} and {count:,} of {mine.numel():,} weights that rounding the source does not give"
            verdict.add("codes", linear.name, what)


def compare(linear: Linear, mine_OI: Tensor, w_OI: Tensor, verdict: Verdict) -> None:
    """Values beside the source's: their error is noted, and they are about as large."""
    ratio = root_mean_square(mine_OI) / max(root_mean_square(w_OI), 1e-30)
    if not RMS_RATIO[0] < ratio < RMS_RATIO[1] and bool(w_OI.any()):
        verdict.add("magnitude", linear.name, f"is {ratio:.3g} times as large as the source's")
    verdict.errors[linear.name] = sum_of_squares(mine_OI - w_OI), sum_of_squares(w_OI)


def check_taken(
    source: SafetensorsReader, blueprint: Blueprint, linear: Linear, stored: Mapping[str, Tensor], verdict: Verdict
) -> None:
    """A matrix of an overlay: what the plan has the digest of, and where it was rounded, about as large as the source's."""
    packing = blueprint.packing(linear)
    tensors = [stored[key] for key in packing.parts(linear.shape)]
    check_overlaid(linear.name, tensors, len(tensors), blueprint.plan.overlaid[linear.name], verdict)
    if linear.unit not in blueprint.keeping:
        origin = blueprint.origin[linear.name]
        w_OI = source.packing(origin).decode(source.parts(origin), origin.shape)
        compare(linear, packing.decode(stored, linear.shape), w_OI, verdict)


def check_overlaid(name: str, tensors: Iterable[Tensor], count: int, wanted: str, verdict: Verdict) -> None:
    verdict.compared["overlay"] += count
    if overlay.digest(tensors) != wanted:
        verdict.add("overlay", name, "is not what the plan's overlay held")


def rounded_again(
    blueprint: Blueprint, group: tuple[Linear, ...], weights: list[Tensor], by_reference: bool
) -> list[dict[str, Tensor]]:
    """The tensors that rounding the source gives, by kernels where there are some."""
    rounding, packings = rounding_named(blueprint.plan.rounding), [blueprint.packing(n) for n in group]
    if by_reference:
        return packed(blueprint, group, round_siblings(rounding, weights, packings[0].number_format))
    made = iter(round_together(blueprint, group, rounding))
    return [{key: next(made) for key in packing.parts(n.shape)} for n, packing in zip(group, packings)]


def nearest(blueprint: Blueprint, group: tuple[Linear, ...], weights: list[Tensor]) -> list[dict[str, Tensor]]:
    """The tensors that rounding to nearest gives."""
    return packed(
        blueprint, group, round_siblings(ROUNDINGS["rtn"], weights, blueprint.packing(group[0]).number_format)
    )


def packed(
    blueprint: Blueprint, group: tuple[Linear, ...], pairs: Sequence[tuple[Tensor, Scales]]
) -> list[dict[str, Tensor]]:
    return [blueprint.pack(n, *pair) for n, pair in zip(group, pairs)]


def differing_parts(mine: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [key for key in mine if key not in wanted or not same_bytes(mine[key], wanted[key])]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Headers are compared elsewhere; to containers, the same bytes may be of another dtype and shape."""
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    found: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return found


def root_mean_square(w: Tensor) -> float:
    return (sum_of_squares(w) / max(1, w.numel())) ** 0.5


def sum_of_squares(w: Tensor) -> float:
    """Piece by piece: over 20 million F32 at once torch's sum comes out .2 % too small."""
    return sum(float(torch.linalg.vector_norm(piece)) ** 2 for piece in w.reshape(-1).split(1 << 16))
