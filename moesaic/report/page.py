"""The page: facts in, one HTML text out. What is there gets its section; what is not is named as not measured.

Each section is a file of sections/, the look is in style.html, the drawings in plots, curves, grids and mosaic.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from . import mosaic, words
from .facts import Facts
from .sections import PARTS

HERE = Path(__file__).parent
HEADLINE = ("kl_mean", "ppl_ratio", "top1_agreement")


def page(facts: Facts, made: datetime | None = None) -> str:
    """The whole report as HTML: no script, nothing loaded from elsewhere, light and dark, fit to print."""
    made = made or datetime.now(UTC)
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title(facts),
            made=made.strftime("%-d %B %Y"),
            version=__version__,
            light=mosaic.variables("light"),
            dark=mosaic.variables("dark"),
            hero=hero(facts),
            headline=headline(facts),
            summary=summary(facts),
            sections=[found for part in PARTS.values() if (found := part.section(facts)) is not None],
        )
    )


def environment() -> Environment:
    """The templates of this folder, where text is escaped and a name that nobody gave is an error."""
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def title(facts: Facts) -> str:
    name = words.model_name(facts.source["model"])
    kept = int(facts.kept_LE.sum(1).max()) if facts.kept_LE.size else facts.experts
    if kept < facts.experts:
        return f"{name}, {kept} of {facts.experts} experts"
    formats = sorted(set(facts.plan.formats.values()) - {"source"}) if facts.plan else []
    return f"{name}, {formats[0].upper()}" if len(formats) == 1 else name


def summary(facts: Facts) -> Markup:
    """One sentence that would do if there were no other."""
    if facts.after is None:
        return Markup("Nothing has been exported in this run yet.")
    before, after = words.decimal(facts.source["bytes"]), words.decimal(facts.after["bytes"])
    text = Markup("A model of {} now takes <strong>{}</strong>.").format(before, after)
    kl = words.figure(facts.scores.find("kl_mean")) if facts.scores is not None else None
    if kl is None or not kl["unit"]:
        return text + " What that cost has not been measured."
    moved = Markup("<strong>{} {} nats</strong>").format(kl["value"], kl["error"])
    return text + Markup(" For that its predictions moved by {} per token from what they were.").format(moved)


def source_format(facts: Facts) -> str:
    return words.one_format(facts.before, "experts") if facts.before else str(facts.source["container"]).upper()


def hero(facts: Facts) -> dict[str, Any] | None:
    fate_LE = facts.fate_LE
    if not fate_LE.size:
        return None
    legend = [
        {
            "color": mosaic.color(f, facts.palette),
            "label": words.fate(f, source_format(facts)),
            "count": int((fate_LE == f).sum()),
        }
        for f in mosaic.order(fate_LE)
    ]
    return {
        "svg": mosaic.mosaic(fate_LE, facts.score_LE, facts.palette),
        "legend": legend,
        "toned": facts.score_LE is not None,
        "layers": fate_LE.shape[0],
        "experts": fate_LE.shape[1],
    }


def headline(facts: Facts) -> list[dict[str, str]]:
    """The few figures that stand at the top, each with what it means."""
    cards = []
    if facts.after is not None:
        before, after = facts.source["bytes"], facts.after["bytes"]
        became = f"{words.decimal(before)} became {words.decimal(after)} ({words.binary(before)} became {words.binary(after)})"
        saved = {"value": f"{1 - after / before:.1%}", "error": "", "unit": ""}
        cards.append(saved | {"label": "smaller on disk", "meaning": became})
    if facts.scores is None:
        return cards
    kl, ratio, top = (facts.scores.find(name) for name in HEADLINE)
    if kl is not None and kl.value is not None:
        likely = f"on average the export gives {np.exp(-kl.value):.1%} of the probability that the source gives (geometric mean)"
        cards.append(words.figure(kl) | {"label": "KL(source ‖ export) per token", "meaning": likely})
    if ratio is not None and ratio.value is not None:
        source, export = (words.figure(facts.scores.find(name)) for name in ("ppl_source", "ppl_export"))
        meaning = f"{source['value']} became {export['value']} on the same tokens"
        value = {"value": f"×{words.figure(ratio)['value']}", "label": "perplexity", "meaning": meaning}
        cards.append(words.figure(ratio) | value)
    if top is not None and top.value is not None:
        meaning = "of positions where both models put the same token first"
        cards.append(words.figure(top) | {"label": "top-1 agreement", "meaning": meaning})
    return cards
