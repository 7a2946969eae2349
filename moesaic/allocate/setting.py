"""What finding a plan is asked and may spend: four parts, each built where the command is read and passed on whole.

Leaves out how experts are ranked (calibrate) and every step of the search (choice).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..calibrate.selection import REAP, Ranking
from ..checkpoint import Checkpoint
from ..checkpoint.containers import CONTAINERS, Container
from ..data.tokens import TokenSet
from ..errors import PlanError
from ..fit import Layout, servable
from ..formats import FORMATS, heaviest_first
from ..measure import ANCHORED, MEASURED, SURROGATE, TRACE, Branch, Measured, Trial, default_counts, measure, offers
from ..plan import DROP, SOURCE, Plan
from ..rounding import ROUNDINGS
from .solver.menu import Menu

FORMATS_OFFERED = (SOURCE, *heaviest_first(f for f in FORMATS.values() if f.offered))
STAND_IN = "rtn"  # for roundings that look at data, until the export is written: search ranks formats no better
HARMS = (MEASURED, ANCHORED, SURROGATE, TRACE)


@dataclass(frozen=True)
class Limit:
    """How large the result may be: bytes on disk, of the whole folder, or stored bits per weight of the source.

    Of both the lesser holds.
    """

    budget_bytes: int | None = None
    bits: float | None = None

    def __bool__(self) -> bool:
        return self.budget_bytes is not None or self.bits is not None

    def bytes(self, menu: Menu) -> int | None:
        """`budget_bytes` with `bits` counted in; None where nothing is asked for."""
        both = (self.budget_bytes, None if self.bits is None else menu.budget_bytes(self.bits))
        return min((n for n in both if n is not None), default=None)


@dataclass(frozen=True)
class Offer:
    """What a plan may be made of.

    experts    the count that every layer keeps; None: all, or with a `Limit` any from half of them up
    formats    what units may be written in
    container  that carries them
    layout     how the model will be served: what an engine would not load so is refused, or not on offer
    """

    experts: int | None = None
    formats: tuple[str, ...] = FORMATS_OFFERED
    container: str = "compressed_tensors"
    layout: Layout | None = None

    def units(self, source: Checkpoint) -> dict[str, tuple[str, ...]]:
        """Formats for each unit that engines load. Raises `PlanError`."""
        container = container_named(self.container)
        found = offers(source, container, self.formats)
        return found if self.layout is None else servable(source, container, found, self.layout)

    def kept(self, source: Checkpoint) -> list[int]:
        """Counts on offer, ascending."""
        a = source.architecture
        least = min([*default_counts(a), a.experts])
        return [count for count in a.counts if count >= least] if self.experts is None else [self.experts]


@dataclass(frozen=True)
class Pricing:
    """How options get their prices, and what may be spent on it.

    harm          "measured" runs each option, "surrogate" takes one sweep backward for all, "anchored" that and runs a
                  few; "trace" is PrismaQuant's, to compare with (which drops by "dropout")
    tokens        of the calibration text, that every option is priced on
    seconds       for that, about: fewer tokens if they would take longer; None: as long as it takes
    memory_bytes  for hidden states; None: half of what is free
    rule_plans    plans measured whole to learn how prices compose
    candidates    plans measured on text of their own, one of which is chosen
    """

    harm: str = MEASURED
    tokens: int = 8_192
    seconds: float | None = None
    memory_bytes: int | None = None
    rule_plans: int = 24
    candidates: int = 6


@dataclass(frozen=True)
class Setting:
    """What every step has to know: the source, the run folder, and what is asked."""

    source: Checkpoint
    run: Path
    ranking: Ranking = REAP
    offer: Offer = field(default_factory=Offer)
    limit: Limit = field(default_factory=Limit)
    pricing: Pricing = field(default_factory=Pricing)
    rounding: str = "rtn"
    quiet: bool = False

    @property
    def sized(self) -> Checkpoint:
        """The source as far as plans take from it: without a layer for multi-token prediction that they drop."""
        a = self.source.architecture
        if self.ranking.mtp != DROP or not a.has_mtp:
            return self.source
        gone = {n.name for n in a.linears if n.role == "mtp"} | {t.name for t in a.tensors if t.role == "mtp"}
        return replace(self.source, architecture=a.without(gone))

    @property
    def container(self) -> Container:
        return container_named(self.offer.container)

    @property
    def kept(self) -> list[int]:
        return self.offer.kept(self.source)

    @property
    def reads_text(self) -> bool:
        """Whether the plan's rounding does, so that its matrices come from an overlay."""
        return self.rounding in ROUNDINGS and bool(ROUNDINGS[self.rounding].needs)

    def trial(self, text: TokenSet) -> Trial:
        """How options and plans are tried: with the plan's own rounding, unless that looks at data."""
        return Trial(
            tokens=text,
            rounding=STAND_IN if self.reads_text else self.rounding,
            memory_bytes=self.pricing.memory_bytes,
            quiet=self.quiet,
        )

    def measure(self, plans: Sequence[Plan], text: TokenSet, title: str) -> list[Measured]:
        return measure(self.source, [Branch.of(plan) for plan in plans], self.trial(text), self.run / title, title)


def container_named(name: str) -> Container:
    if name not in CONTAINERS:
        raise PlanError(f"unknown container {name!r}; choose from {', '.join(CONTAINERS)}")
    return CONTAINERS[name]
