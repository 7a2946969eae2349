"""Reopen an export and believe nothing: structure, counts, bytes, kept rows, values.

Tensors are read by the safetensors library, not by the code that wrote them. Without the source,
everything that a folder can say about itself is checked; with it, every tensor is compared with what
the plan says it is: copied bytes, sliced rows, or codes that rounding again gives again. Leaves out
quality (evaluate) and engines (tests/engines).
"""

import filecmp
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint import Checkpoint
from .containers import siblings
from .errors import InputError, MoesaicError
from .export import NOTE, carried
from .families import Linear, expert_counts
from .plan import Plan
from .progress import Meter, progress
from .rounding import ROUNDINGS
from .shards import INDEX
from .target import Target, keeps_bytes

RMS_RATIO = (0.5, 2.0)  # decoded over source; rounding moves it by per cents, a wrong scale by powers


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which check, where, what."""

    check: str  # "structure", "counts", "index", "files", "finite", "magnitude", "bytes", "rows", "codes"
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where} {self.what}"


@dataclass
class Verdict:
    """What was found, and how much was looked at: a check that looked at nothing proves nothing."""

    findings: list[Finding] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)  # tensors by check

    @property
    def holds(self) -> bool:
        return not self.findings

    def add(self, check: str, where: str, what: str) -> None:
        self.findings.append(Finding(check, where, what))


class Reader:
    """Tensors of a folder, by the safetensors library, each file opened once."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self.checkpoint = checkpoint
        self.files: dict[str, Any] = {}
        self.stack = stack

    def tensor(self, name: str) -> Tensor:
        file = self.checkpoint.where(name).file
        if file not in self.files:
            self.files[file] = self.stack.enter_context(safe_open(self.checkpoint.path / file, "pt"))
        return self.files[file].get_tensor(name)

    def parts(self, linear: Linear) -> dict[str, Tensor]:
        packing = self.checkpoint.container.packing(self.checkpoint.formats[linear.name])
        return {key: self.tensor(f"{linear.name}.{p.suffix}") for key, p in packing.parts(linear.shape).items()}


def verify(out: Path, source: Checkpoint | None = None, quiet: bool = False) -> Verdict:
    """Check the model folder `out`, against its source if that is at hand.

    Reads every byte of the export (and of the source's matching tensors) once; memory is a few
    matrices. Raises only where there is nothing to check; all else is a `Finding`.
    """
    verdict = Verdict()
    try:
        export = Checkpoint.open(out, whole=False)
    except MoesaicError as error:
        verdict.add("structure", str(out), str(error))
        return verdict
    if not export.has_weights:
        raise InputError(f"{out} holds no weights; name the folder of an export")
    bad = export.differences()
    for name, what in bad.items():
        verdict.add("structure", name, what)
    verdict.compared["structure"] = len(export.inventory)
    check_folder(export, verdict)
    target = target_of(export, source, verdict) if source is not None else None
    with (
        ExitStack() as stack,
        progress("verify", sum(s.info.bytes for s in export.stored.values()), "B", quiet) as meter,
    ):
        reader = Reader(export, stack)
        theirs = Reader(source, stack) if source is not None else None
        check_small(reader, theirs, target, bad, verdict, meter)
        check_linears(reader, theirs, target, bad, verdict, meter)
    check_coverage(export, target, bad, verdict)
    return verdict


def check_folder(export: Checkpoint, verdict: Verdict) -> None:
    """What the folder's small files say: one expert count everywhere, a true index, nothing half-written."""
    experts = export.architecture.experts
    for where, count in expert_counts(export.config):
        verdict.compared["counts"] += 1
        if count != experts:
            verdict.add("counts", f"config.json {where}", f"is {count}, and the layers hold {experts} experts")
    if export.architecture.top_k > experts:
        verdict.add("counts", "config.json num_experts_per_tok", f"is {export.architecture.top_k} of {experts} experts")
    for leftover in sorted(export.path.glob(".*.partial")):
        verdict.add("files", leftover.name, "is half-written; run the export again")
    index, payload = export.path / INDEX, sum(s.info.bytes for s in export.stored.values())
    if index.exists():
        verdict.compared["index"] += 1
        total = json.loads(index.read_text()).get("metadata", {}).get("total_size")
        if total != payload and (export.path / NOTE).exists():  # released files lie here; exports must not
            verdict.add("index", INDEX, f"says total_size {total:,}, and the shards hold {payload:,} bytes")
    elif len({s.file for s in export.stored.values()}) > 1:
        verdict.add("index", INDEX, "is missing, and the model has several shards")


def target_of(export: Checkpoint, source: Checkpoint, verdict: Verdict) -> Target | None:
    """What the export should be, by the plan that travels in it."""
    note = export.path / NOTE
    if not note.exists():
        raise InputError(f"{export.path} has no {NOTE}, so what it should be is unknown; verify it without a source")
    target = Target.of(source, Plan.load(note, {"source": source.identity}))
    if target.config != export.config:
        keys = sorted(k for k in {*target.config, *export.config} if target.config.get(k) != export.config.get(k))
        verdict.add("counts", f"config.json {', '.join(keys)}", "is not what the plan makes of the source's")
    for file in carried(source.path):
        verdict.compared["files"] += 1
        if not (export.path / file).exists():
            verdict.add("files", str(file), "was not carried along from the source")
        elif not filecmp.cmp(source.path / file, export.path / file, shallow=False):
            verdict.add("files", str(file), "differs from the source's")
    return target


def check_small(
    reader: Reader, theirs: Reader | None, target: Target | None, bad: dict[str, str], verdict: Verdict, meter: Meter
) -> None:
    """Norms, embeddings, routers, vision: finite, and the source's own bytes or rows."""
    export = reader.checkpoint
    rows = (
        {n: target.plan.kept[layer] for layer, ns in export.architecture.routers.items() for n in ns}
        if target and target.plan.kept
        else {}
    )
    for info in export.architecture.tensors:
        if info.name in bad:
            continue
        tensor = reader.tensor(info.name)
        meter.advance(info.bytes)
        verdict.compared["finite"] += 1
        if not torch.isfinite(tensor).all():
            verdict.add(
                "finite", info.name, f"holds {int((~torch.isfinite(tensor)).sum()):,} values that are no numbers"
            )
        if theirs is None or target is None:
            continue
        wanted = theirs.tensor(info.name)
        check = "rows" if info.name in rows else "bytes"
        wanted = wanted[list(rows[info.name])] if check == "rows" else wanted
        verdict.compared[check] += 1
        if not same_bytes(tensor, wanted):
            verdict.add(check, info.name, "differs from the source's" + (" kept rows" if check == "rows" else ""))


def check_linears(
    reader: Reader, theirs: Reader | None, target: Target | None, bad: dict[str, str], verdict: Verdict, meter: Meter
) -> None:
    """Matrices: finite, of a weight's magnitude, and what the plan says they are."""
    export = reader.checkpoint
    for group in siblings(export.architecture.linears):
        whole = [n for n in group if not any(t.name in bad for t in packed(export, n))]
        for linear in whole:
            stored = reader.parts(linear)
            meter.advance(sum(t.nbytes for t in stored.values()))
            check_values(export, linear, stored, verdict)
            if theirs is not None and target is not None and keeps_bytes(target, linear):
                verdict.compared["bytes"] += len(stored)
                for key, tensor in theirs.parts(target.origin[linear.name]).items():
                    if not same_bytes(stored[key], tensor):
                        verdict.add("bytes", f"{linear.name} ({key})", "differs from the source's")
            elif theirs is not None and target is not None and len(whole) == len(group) and linear is group[-1]:
                check_codes(reader, theirs, target, group, verdict)


def check_values(export: Checkpoint, linear: Linear, stored: dict[str, Tensor], verdict: Verdict) -> None:
    """Decoded weights are finite, and neither all zero nor of an impossible size."""
    w_OI = export.container.packing(export.formats[linear.name]).decode(stored, linear.shape)
    verdict.compared["finite"] += len(stored)
    if not torch.isfinite(w_OI).all():
        verdict.add(
            "finite", linear.name, f"decodes to {int((~torch.isfinite(w_OI)).sum()):,} values that are no numbers"
        )
        return
    rms = float(w_OI.square().mean(dtype=torch.float64).sqrt())
    if not 1e-7 < rms < 1e3:
        verdict.add("magnitude", linear.name, f"decodes to a root mean square of {rms:.3g}; no weight matrix has that")


def check_codes(reader: Reader, theirs: Reader, target: Target, group: tuple[Linear, ...], verdict: Verdict) -> None:
    """Round the source again and compare codes and scales: exact for a rounding that needs no data."""
    packings = [target.container.packing(target.formats[n.name]) for n in group]
    weights = [
        target.source.container.packing(target.source.formats[o.name]).decode(theirs.parts(o), o.shape)
        for o in (target.origin[n.name] for n in group)
    ]
    amax = torch.stack([w.abs().max() for w in weights]).max()
    rounding = ROUNDINGS[target.plan.rounding]
    for linear, packing, w_OI in zip(group, packings, weights):
        format = packing.number_format
        mine = packing.decode(reader.parts(linear), linear.shape)
        ratio = float(mine.square().mean().sqrt() / w_OI.square().mean().sqrt().clamp(min=1e-30))
        if not RMS_RATIO[0] < ratio < RMS_RATIO[1] and float(w_OI.abs().max()):
            verdict.add("magnitude", linear.name, f"is {ratio:.3g} times as large as the source's")
        if rounding.needs:
            continue
        wanted = format.decode(*rounding.round(w_OI, format, format.share(amax) if format.share else None, {}))
        verdict.compared["codes"] += len(packing.parts(linear.shape))
        if not torch.equal(mine, wanted):
            wrong = int((mine != wanted).sum())
            verdict.add(
                "codes",
                linear.name,
                f"has {wrong:,} of {mine.numel():,} weights that rounding the source does not give",
            )


def check_coverage(export: Checkpoint, target: Target | None, bad: dict[str, str], verdict: Verdict) -> None:
    """Every tensor was looked at, or has a finding that says why not."""
    looked = verdict.compared["finite"]
    if looked + len(bad) < len(export.inventory):
        verdict.add(
            "structure", str(export.path), f"has {len(export.inventory):,} tensors and only {looked:,} were checked"
        )
    if target is not None and not ROUNDINGS[target.plan.rounding].needs:
        compared = verdict.compared["bytes"] + verdict.compared["rows"] + verdict.compared["codes"]
        if compared + len(bad) < len(export.inventory) and not bad:
            verdict.add(
                "structure",
                str(export.path),
                f"has {len(export.inventory):,} tensors and {compared:,} were compared with the source",
            )


def packed(checkpoint: Checkpoint, linear: Linear) -> list[Any]:
    return checkpoint.container.packing(checkpoint.formats[linear.name]).tensors(linear.name, linear.shape)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )
