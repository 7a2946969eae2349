"""The page that says what was done and what it cost: one HTML file, nothing loaded from elsewhere, no script."""

from pathlib import Path

from ..artifact import atomic
from . import mosaic, words
from .facts import Facts, gather
from .page import page, source_format, title


def report(run: str | Path) -> Path:
    """Write RUN/report.html from what the run folder holds; returns its path. Raises `InputError` where there is no run."""
    out = Path(run) / "report.html"
    text = page(gather(run))
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


__all__ = ["Facts", "gather", "page", "picture", "report", "title"]
