"""The page: facts in, one HTML text out. What is there gets its section; what is not is named as not measured.

Sentences are in prose.py and page.html, the look in style.html, the drawings in plots.py and mosaic.py.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..evaluate import Scores
from . import mosaic, plots, prose, words
from .facts import Facts

HERE = Path(__file__).parent
HEADLINE = ("kl_mean", "ppl_ratio", "top1_agreement")
TABLE = (
    "kl_mean", "kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999", "kl_max", "kl_above_1_nat", "ppl_source", "ppl_export",
    "delta_ln_ppl", "top1_agreement", "top5_overlap", "delta_p_mean", "delta_p_rms", "nll_correlation",
)  # fmt: skip


def page(facts: Facts, made: datetime | None = None) -> str:
    """The whole report as HTML: no script, nothing loaded from elsewhere, light and dark, fit to print."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made = made or datetime.now(UTC)
    return environment.get_template("page.html").render(
        title=title(facts),
        made=made.strftime("%-d %B %Y"),
        version=__version__,
        light=Markup(mosaic.variables("light")),
        dark=Markup(mosaic.variables("dark")),
        facts=facts,
        hero=hero(facts),
        headline=headline(facts),
        summary=prose.summary(facts),
        done=prose.done(facts),
        sizes=sizes(facts),
        quality=quality(facts),
        experts=experts(facts),
        checks=checks(facts),
        provenance=provenance(facts),
        limits=prose.limits(facts),
        missing=prose.missing(facts),
    )


def title(facts: Facts) -> str:
    name = Path(facts.source["model"]).resolve().name
    kept = int(facts.kept_LE.sum(1).max()) if facts.kept_LE.size else facts.experts
    return f"{name}, {kept} of {facts.experts} experts" if kept < facts.experts else name


def source_format(facts: Facts) -> str:
    return words.one_format(facts.before, "experts") if facts.before else str(facts.source["container"]).upper()


def hero(facts: Facts) -> dict[str, Any] | None:
    fate_LE = facts.fate_LE
    if not fate_LE.size:
        return None
    fates = mosaic.order(fate_LE)
    legend = [
        {
            "color": mosaic.color(f, fates),
            "label": words.fate(f, source_format(facts)),
            "count": int((fate_LE == f).sum()),
        }
        for f in fates
    ]
    return {
        "svg": Markup(mosaic.mosaic(fate_LE, facts.score_LE)),
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
        meaning = f"{words.decimal(before)} became {words.decimal(after)} ({words.binary(before)} became {words.binary(after)})"
        cards.append(
            {
                "value": f"{1 - after / before:.1%}",
                "error": "",
                "unit": "",
                "label": "smaller on disk",
                "meaning": meaning,
            }
        )
    if facts.scores is None:
        return cards
    kl, ratio, top = (facts.scores.find(name) for name in HEADLINE)
    if kl is not None and kl.value is not None:
        likely = f"on average the export gives {np.exp(-kl.value):.1%} of the probability that the source gives (geometric mean)"
        cards.append(words.figure(kl) | {"label": "KL(source ‖ export) per token", "meaning": likely})
    if ratio is not None and ratio.value is not None:
        source, export = (words.figure(facts.scores.find(name)) for name in ("ppl_source", "ppl_export"))
        meaning = f"{source['value']} became {export['value']} on the same tokens"
        cards.append(
            words.figure(ratio)
            | {"value": f"×{words.figure(ratio)['value']}", "label": "perplexity", "meaning": meaning}
        )
    if top is not None and top.value is not None:
        meaning = "of positions where both models put the same token first"
        cards.append(words.figure(top) | {"label": "top-1 agreement", "meaning": meaning})
    return cards


def sizes(facts: Facts) -> dict[str, Any] | None:
    """Bytes by class of module, before and after."""
    if facts.after is None:
        return None
    largest = max(r["bytes"] for r in (facts.before or facts.after)["roles"].values())
    rows = []
    for role, name in words.ROLES.items():
        before, after = ((f or {"roles": {}})["roles"].get(role) for f in (facts.before, facts.after))
        if before is None and after is None:
            continue
        b, a = (x["bytes"] if x else None for x in (before, after))
        rows.append(
            {
                "name": name,
                "formats": formats_moved(facts, role),
                "before": "" if b is None else words.decimal(b),
                "after": "" if a is None else words.decimal(a),
                "before_binary": "" if b is None else words.binary(b),
                "binary": "" if a is None else words.binary(a),
                "was": 0 if b is None else 100 * b / largest,
                "is": 0 if a is None else 100 * a / largest,
            }
        )
    before_bytes, after_bytes = facts.source["bytes"], facts.after["bytes"]
    total = {
        "before": words.decimal(before_bytes),
        "before_binary": words.binary(before_bytes),
        "after": words.decimal(after_bytes),
        "binary": words.binary(after_bytes),
    }
    bits = 8 * facts.after["bytes"] / facts.after["parameters"]
    return {"rows": rows, "total": total, "bits": f"{bits:.2f}", "saved": words.decimal(before_bytes - after_bytes)}


def formats_moved(facts: Facts, role: str) -> str:
    after = words.one_format(facts.after, role)
    before = words.one_format(facts.before, role) if facts.before else after
    return after if before == after else f"{before} → {after}"


def quality(facts: Facts) -> dict[str, Any] | None:
    """Scores and their plots, for the first reading; further readings get a table each."""
    if facts.scores is None:
        return None
    readings = []
    for reading in facts.scores.facts["readings"]:
        name = reading["name"]
        first = facts.scores.scores[0].activations
        mine = tuple(s for s in facts.scores.scores if s.reading == name and s.activations == first)
        of_it = Scores(mine, facts.scores.facts)
        table = [{"name": words.NAMES[n], **words.figure(of_it.find(n))} for n in TABLE if of_it.find(n) is not None]
        readings.append(reading | {"table": table, "plots": score_plots(facts, of_it, name)})
    errors = [layer["relative_error"] for layer in facts.scores.facts["layers"]]
    layers = [layer["layer"] for layer in facts.scores.facts["layers"]]
    drift = None
    if errors and None not in errors:
        drift = Markup(plots.by_layer("drift", "Relative error of the hidden states after each layer", layers, errors))
    return {"readings": readings, "drift": drift, "facts": facts.scores.facts}


def score_plots(facts: Facts, of_it: Scores, name: str) -> dict[str, Markup]:
    found: dict[str, Markup] = {}
    kl_N = facts.kl_nats.get(name)
    if kl_N is not None and len(kl_N) and kl_N.max() > 0:
        marks = {
            label: of_it.find(n) for label, n in (("median", "kl_median"), ("mean", "kl_mean"), ("95 %", "kl_p95"))
        }
        known = {label: s.value for label, s in marks.items() if s is not None and s.value is not None}
        found["histogram"] = Markup(plots.kl_histogram(kl_N, known))
    parts = [s for s in of_it.scores if s.name == "kl_mean" and s.part and s.value is not None]
    for plot, chosen in (
        ("domains", [s for s in parts if not s.part.startswith("confidence ")]),
        ("confidence", [s for s in parts if s.part.startswith("confidence ")]),
    ):
        rows = [(words.bucket(s.part), s.value or 0.0, s.low, s.high) for s in chosen]
        if rows:
            found[plot] = Markup(plots.whiskers(plot, f"KL divergence by {plot}", rows, "mean KL, nats per token"))
    return found


def experts(facts: Facts) -> dict[str, Any] | None:
    """What calibration saw and where the line was drawn."""
    if facts.selection is None:
        return None
    s, layers = facts.selection, facts.moe_layers
    margins = [s["margins"][str(layer)] for layer in layers]
    found: dict[str, Any] = {
        "selection": s,
        "criterion": words.term(s["criterion"]),
        "link": s["reference"].startswith("https://"),
        "margins": Markup(
            plots.by_layer("margins", "Margin of the cut in each layer", layers, margins, mark_least=True)
        ),
        "stability": float(np.mean(list(s["jaccard"].values()))) if s.get("jaccard") else None,
        "saliency": None,
    }
    if facts.score_LE is not None:
        found["saliency"] = Markup(plots.saliency(facts.score_LE, facts.kept_LE, layers))
    return found


def checks(facts: Facts) -> dict[str, Any] | None:
    if facts.verify is None:
        return None
    rows = [
        {"count": f"{n:,}", "what": words.CHECKS.get(check, check)} for check, n in facts.verify["compared"].items()
    ]
    return {"holds": facts.verify["holds"], "rows": rows, "findings": facts.verify["findings"]}


def provenance(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (what, which): everything needed to make the same again, or to know that it was not the same."""
    source = [
        ("model", str(facts.source["model"])),
        ("family", facts.source["family"]),
        ("container", facts.source["container"]),
    ]
    groups = [("Source", [*source, ("identity", facts.source["identity"])])]
    if facts.after is not None:
        export = [
            ("folder", f"{facts.run}/model"),
            ("container", facts.after["container"]),
            ("identity", facts.after["identity"]),
        ]
        groups.append(("Export", export))
    if facts.selection is not None:
        groups.append(("Calibration", of_tokens(facts.selection["tokens"], facts.selection["calibration_tokens"])))
    if facts.scores is not None:
        of = facts.scores.facts
        for reading in of["readings"]:
            groups.append((f"Evaluation: {reading['name']}", of_tokens(reading["facts"], reading["tokens_read"])))
        arithmetic = [
            ("arithmetic", of["arithmetic"]),
            ("activations", "; ".join(of["activations"].values())),
            ("device", of["device"]),
        ]
        groups.append(("Measurement", [*arithmetic, ("bootstrap seed", str(of["seed"]))]))
        groups.append(("Versions", list(of["versions"].items())))
    return groups


def of_tokens(tokens: Any, count: int) -> list[tuple[str, str]]:
    rows = [("tokens", f"{count:,}")]
    for key in ("origin", "convention", "length", "seed", "bos"):
        if tokens.get(key) not in (None, ""):
            rows.append((key.replace("bos", "BOS"), str(tokens[key])))
    if "rows_by_domain" in tokens:
        rows.append(("rows", ", ".join(f"{domain} {n}" for domain, n in tokens["rows_by_domain"].items())))
    hashes = {
        **{f"text {d}": h for d, h in tokens["text_sha256"].items()},
        "tokenizer": tokens["tokenizer_sha256"],
        "ids": tokens["ids_sha256"],
    }
    return rows + [(f"{name}, sha256", value[:16]) for name, value in hashes.items()]
