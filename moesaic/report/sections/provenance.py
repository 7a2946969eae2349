"""Provenance: everything needed to make the same again, or to know that it was not the same."""

from typing import Any

from ..blocks import Block, Heading, Pairs, Section
from ..facts import Facts
from .base import Part

ASIDE = (
    "Identities are hashes of config, headers and samples of each file. The numbers behind this page stand beside it: "
    "scores.json, scores.csv, and each token's values in scores.safetensors."
)


def section(facts: Facts) -> Section:
    blocks: list[Block] = []
    for name, rows in groups(facts):
        blocks += [Heading(name), Pairs(rows)]
    return Section("Provenance", [ASIDE], blocks)


def groups(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    named = [(key, str(facts.source[key])) for key in ("model", "family", "container", "identity") if facts.source[key]]
    found = [("Source", named)]
    if facts.after is not None:
        after = facts.after
        export = [("folder", after["model"]), ("container", after["container"]), ("identity", after["identity"])]
        found.append(("Export", export))
    if facts.selection is not None:
        text = facts.selection.get("tokens", {})
        found.append(("Calibration", of_tokens(text, facts.selection["calibration_tokens"])))
    if facts.candidates is not None:
        found.append(("Choice among candidates", of_tokens(facts.candidates["text"], facts.candidates["tokens"])))
    if facts.scores is not None:
        of = facts.scores.facts
        for reading in of["readings"]:
            found.append((f"Evaluation: {reading['name']}", of_tokens(reading["facts"], reading["tokens_read"])))
        told = {"activations": "; ".join(facts.ways.values()), "bootstrap seed": of.get("seed")}
        told |= {key: of.get(key) for key in ("arithmetic", "device", "noise", "routing")}
        if tasks := of.get("tasks"):
            told["tasks"] = tasks["harness"]
        found.append(("Measurement", [(key, str(value)) for key, value in told.items() if value not in (None, "")]))
        found.append(("Versions", list(of.get("versions", {}).items())))
    return found


def of_tokens(tokens: Any, count: int) -> list[tuple[str, str]]:
    rows = [("tokens", f"{count:,}")]
    for key in ("origin", "convention", "length", "seed", "bos"):
        if tokens.get(key) not in (None, ""):
            rows.append((key.replace("bos", "BOS"), str(tokens[key])))
    if "rows_by_domain" in tokens:
        rows.append(("rows", ", ".join(f"{domain} {n}" for domain, n in tokens["rows_by_domain"].items())))
    for domain, part in tokens.get("parts", {}).items():
        rows.append(
            (f"of {domain}", f"{part['calibration']:,} characters to calibrate on, {part['evaluation']:,} to judge by")
        )
    hashes = {f"text {d}": h for d, h in tokens.get("text_sha256", {}).items()}
    hashes |= {key: tokens[f"{key}_sha256"] for key in ("tokenizer", "ids") if f"{key}_sha256" in tokens}
    return rows + [(f"{name}, sha256", value[:16]) for name, value in hashes.items()]


PART = Part(name="provenance", place=170, section=section)
