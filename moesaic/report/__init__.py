"""Reports of a run: the page, one HTML file that loads nothing; the model card; and both beside the export on the Hub."""

from pathlib import Path

from ..artifact import atomic
from . import mosaic, words
from .card import Naming, card, write_card
from .facts import Facts, gather, places
from .page import page, source_format, title
from .push import Upload, push, uploads


def report(run: str | Path, devices: str = "", context: int | None = None) -> Path:
    """Write report.html beside what the run holds; returns its path. Raises `InputError` where there is no run.

    devices, context  how many of which cards are to hold the export (`2x95GiB`): then the page shows their memory
    """
    facts = gather(run, devices, context)
    out = places(Path(run))[0] / "report.html"
    text = page(facts)
    with atomic(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return out


def picture(run: str | Path, out: Path) -> Path:
    """Write a run's mosaic to `out` as one SVG, light and dark, for a README."""
    facts = gather(run)
    labels = [words.fate(f, source_format(facts)) for f in mosaic.order(facts.fate_LE)]
    caption = f"{facts.fate_LE.shape[0]} layers × {facts.fate_LE.shape[1]} experts"
    with atomic(out) as partial:
        partial.write_text(mosaic.picture(facts.fate_LE, facts.score_LE, labels, caption), encoding="utf-8")
    return out


__all__ = [
    "Facts", "Naming", "Upload", "card", "gather", "page", "picture", "push", "report", "title", "uploads", "write_card",
]  # fmt: skip
