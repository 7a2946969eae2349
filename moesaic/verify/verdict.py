"""What a verification found, and how much it looked at. Leaves out the looking (verify)."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import CheckError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which check, where, what."""

    check: str  # "structure", "plan", "counts", "index", "files", "finite", "magnitude", "bytes", "rows", "overlay", …
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where} {self.what}"


@dataclass
class Verdict:
    """What was found, and how much was looked at: a check that looked at nothing proves nothing."""

    findings: list[Finding] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)  # tensors by check
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # rounded linear -> Σ(value − w)², Σw²
    notes: list[str] = field(default_factory=list)  # what could be checked only in part, and why

    @property
    def holds(self) -> bool:
        return not self.findings

    def require(self, out: Path, then: str) -> None:
        """Raises `CheckError` unless every check holds; `then` says what becomes of `out`, or should."""
        if not self.holds:
            raise CheckError(f"{out} does not verify: {self.findings[0]} ({len(self.findings)} findings); {then}")

    def add(self, check: str, where: str, what: str) -> None:
        self.findings.append(Finding(check, where, what))

    def take(self, other: "Verdict") -> None:
        self.findings += other.findings
        self.compared += other.compared
        self.errors |= other.errors
        self.notes += other.notes


def expert_errors(export: Checkpoint, verdict: Verdict) -> dict[str, list[float]]:
    """Relative weight error ‖value − w‖ / ‖w‖ of each rounded expert's matrices together: MoE layer -> one an expert."""
    found: dict[str, list[float]] = {}
    for (layer, _), matrices in sorted(export.architecture.experts_of.items()):
        pairs = [verdict.errors[n.name] for n in matrices.values() if n.name in verdict.errors]
        if pairs:
            off, whole = (sum(p[i] for p in pairs) for i in (0, 1))
            found.setdefault(str(layer), []).append((off / whole) ** 0.5 if whole else 0.0)
    return found
