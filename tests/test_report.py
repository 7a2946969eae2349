"""report/: the page holds what was measured and nothing else, loads nothing, and a browser opens it without complaint."""

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import changed, noisy, text_rows

from moesaic.artifact import write_json
from moesaic.checkpoint import Checkpoint
from moesaic.data.corpus import Corpus
from moesaic.errors import InputError
from moesaic.evaluate import Conditions, Reading, Score, Scores, evaluate
from moesaic.plan import Plan
from moesaic.recipes.prune import Cuts, Pruning, Ranking, preview_cuts, prune
from moesaic.recipes.quantize import Quantizing, quantize
from moesaic.report import Facts, gather, grids, mosaic, page, picture, report, words
from moesaic.report.blocks import Section
from moesaic.report.facts import places
from moesaic.report.page import environment
from moesaic.report.sections import PARTS, done, experts, frontier, limits, provenance, served

DAY = datetime(2026, 11, 20, tzinfo=UTC)


@pytest.fixture(scope="module")
def run(m3: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as the stages leave it, of a tiny model of which every second expert is said to be dropped."""
    folder = tmp_path_factory.mktemp("report") / "run"
    folder.mkdir()
    a, tokens = m3.architecture, text_rows(m3)
    export = changed(m3.path, folder / "model", noisy)
    source = {"model": str(m3.path), "family": a.family, "container": "mxfp8", "identity": m3.identity}
    source |= {"experts": a.experts, "bytes": sum(t.bytes for t in m3.inventory), "command": "moesaic compress A B"}
    write_json(folder / "source.json", "source", source, {})
    kept = {layer: tuple(range(0, a.experts, 2)) for layer in a.moe_layers}
    formats = {unit: "mxfp4" if unit.endswith("experts") else "source" for unit in a.units}
    Plan("compressed_tensors", kept, formats).save(folder / "plan.json", {})
    scores_LE = np.random.default_rng(0).random((len(a.moe_layers), a.experts))
    selection = {
        "criterion": "reap", "reference": "https://arxiv.org/abs/2510.13999", "policy": "pooled",
        "calibration_tokens": tokens.tokens,
        "kept": {str(layer): list(ids) for layer, ids in kept.items()}, "margins": {str(layer): 0.01 * layer for layer in kept},
        "jaccard": {str(layer): 0.9 for layer in kept}, "protected": [[1, 2]], "warnings": ["a warning of the selection"],
        "scores": scores_LE.tolist(), "tokens": dict(tokens.facts),
    }  # fmt: skip
    write_json(folder / "selection.json", "selection", selection, {})
    errors = {str(layer): [0.11 + 0.001 * e for e in range(len(ids))] for layer, ids in kept.items()}
    verify = {"holds": True, "compared": {"structure": 123, "codes": 456}, "findings": [], "expert_errors": errors}
    write_json(folder / "verify.json", "verify", verify, {})
    evaluate(m3, export, [Reading.of(tokens)], folder, Conditions(device="cpu"), quiet=True)
    return folder


@pytest.fixture(scope="module")
def facts(run: Path) -> Facts:
    return gather(run)


@pytest.fixture(scope="module")
def whole(everything: Facts) -> str:
    return page(everything, DAY)


class Parts(HTMLParser):
    """Tags, ids and everything that a browser might fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href", "data", "poster", "srcset") and tag != "a":
                self.fetched.append(value or "")


def test_one_file_that_loads_nothing(whole: str) -> None:
    text = whole
    parts = Parts(text)
    assert len(text.encode()) < 2e6
    assert not {"script", "iframe", "object", "embed"} & set(parts.tags)
    assert all(f.startswith(("data:", "#")) for f in parts.fetched), parts.fetched
    assert (
        all(u.startswith(("#", "data:")) for u in re.findall(r"url\(['\"]?([^)'\"]+)", text)) and "@import" not in text
    )
    assert not [i for i, count in parts.ids.items() if count > 1]
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))


def test_figures_are_those_of_the_scores_file(run: Path, facts: Facts, whole: str) -> None:
    text = whole
    scores = {(s["name"], s["part"]): s for s in json.loads((run / "scores.json").read_text())["scores"]}
    kl = scores["kl_mean", ""]
    places = words.digits(kl["value"], kl["error"])
    assert f"{kl['value']:.{places}f} nats" in text and f"± {kl['error']:.{places}f}" in text
    assert f"{kl['low']:.{places}f} to {kl['high']:.{places}f}" in text
    assert f"{np.exp(-kl['value']):.1%} of the probability" in text
    assert "20 November 2026" in text and "moesaic compress A B" in text and "A warning of the selection." in text
    assert "tensors present, of the right shape and type" in text and ">123<" in text and ">456<" in text
    for identity in (
        gather(run).source["identity"],
        gather(run).scores.facts["readings"][0]["facts"]["ids_sha256"][:16],
    ):  # type: ignore[union-attr]
        assert identity in text


SECTIONS = {
    "scores": ("cost", "What it cost", "KL divergence, perplexity and agreement"),
    "selection": ("experts", "Which experts stayed", "the choice of experts"),
    "verify": ("checks", "What was checked", "verification of the export"),
    "after": ("sizes", "Where the bytes went", "an export"),
    "expert_errors": ("errors", "How experts were rounded", ""),
    "stored": ("bits", "Bits by layer", ""),
    "preview": ("preview", "What cuts would cost", ""),
    "frontier": ("frontier", "What the bytes could buy", ""),
    "memory": ("memory", "What one device holds", ""),
}


def titles(facts: Facts, *, of: str) -> list[str]:
    """The section of that title, if it is there: by itself, since drawings take their time."""
    found = [PARTS[of].section(facts)]
    return [section.title for section in found if section is not None]


@pytest.mark.parametrize("what", SECTIONS)
def test_what_is_not_there_has_no_section_and_is_named(everything: Facts, whole: str, what: str) -> None:
    name, title, absence = SECTIONS[what]
    less = replace(everything, **{what: {"expert_errors": {}, "stored": ()}.get(what)})  # type: ignore[arg-type]
    assert f"<h2>{title}</h2>" in whole and not titles(less, of=name)
    if absence:
        assert not [m for m in limits.missing(everything) if m.startswith(absence)]
        assert [m for m in limits.missing(less) if m.startswith(absence)]


@pytest.fixture(scope="module")
def everything(facts: Facts, run: Path, budget: dict[str, dict[str, object]]) -> Facts:
    """The run, with what it would hold had it been asked for a size, previewed, and made for two devices."""
    return replace(gather(run, "2x95GiB"), **budget)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def budget() -> dict[str, dict[str, object]]:
    """frontier.json, candidates.json, rule.json and preview.json as their stages write them."""
    estimate = {"value": 0.1, "error": 0.01, "low": 0.08, "high": 0.13}
    frontier = {
        "points": 3, "experts": [4, 6, 8], "bytes": [1_000_000, 2_000_000, 3_000_000], "harm_nats": [0.3, 0.1, 0.0],
        "predicted_nats": [0.3, 0.1, 0.0], "knee": {"experts": 6, "bytes": 2_000_000, "predicted_nats": 0.1},
        "budget_bytes": 2_100_000, "budget_bits": 4.0, "bounds": {"6": 0.09}, "rule": {"error": 0.2}, "harm": "measured",
    }  # fmt: skip
    plans = [
        ("6 experts", 6, 0.1, 0.1234, 0.0056),
        ("4 experts", 4, 0.2, 0.2345, 0.0067),
        ("lost", 8, 0.1, float("inf"), None),
    ]
    candidates = {
        "budget_bytes": 2_100_000, "tokens": 4096, "text": {"ids_sha256": "f" * 64}, "rule_error": 0.2, "ships": 0,
        "candidates": [
            {"name": n, "experts": k, "bytes": 2_050_000, "harm_nats": p, "predicted_nats": p, "measured_nats": m, "error": e}
            for n, k, p, m, e in plans
        ],
    }  # fmt: skip
    measured = [{"experts": 6, "rounding": 0.1 * i, "dropping": 0.05, "nats": 0.1 * i, "error": 0.01} for i in range(4)]
    rule = {"a": 0.0, "b": 1.0, "weight": 1.0, "error": 0.2, "plans": 4, "measured": measured}
    outlook = {"criterion": "reap", "experts": 4, "tokens": 960, "nonfinite": 0}
    outlook |= {name: estimate for name in ("kl_nats", "delta_ln_ppl", "top1", "overlap")}
    preview = {"candidates": [outlook, outlook | {"criterion": "mass"}], "seed": 0, "text": {}}
    return {"frontier": frontier, "candidates": candidates, "rule": rule, "preview": preview}


def test_a_budget_shows_prediction_and_measurement(whole: str) -> None:
    text = whole
    for shown in (
        "2.10 MB",
        "0.1234",
        "± 0.0056",
        "0.2345",
        "not measured",
        "a factor of 1.22",
        "6 experts in 2.00 MB",
    ):
        assert shown in text, shown
    assert re.search(r'<tr class="chosen">\s*<td class="left">6 experts', text)


@pytest.fixture(scope="module")
def questioned(everything: Facts) -> Facts:
    """The run with needles, tasks and texts, under the names that docs/SCORES.md gives them."""
    assert everything.scores is not None
    like, of = everything.scores.scores[0], everything.scores.facts
    found = list(everything.scores.scores)

    def add(reading: str, name: str, value: float, part: str = "", unit: str = "share") -> None:
        spread = {"error": 0.05, "low": value - 0.1, "high": value + 0.1}
        found.append(replace(like, reading=reading, name=name, part=part, value=value, unit=unit, rows=20, **spread))  # type: ignore[arg-type]

    readings = list(of["readings"])
    for n, length in enumerate((4096, 16384, 65536)):
        name = f"needle {length}"
        readings.append(
            readings[0]
            | {"name": name, "kind": "needle", "facts": {**readings[0]["facts"], "length": length, "samples": 4}}
        )
        for model, share in (("source", 1.0), ("export", 1.0 - 0.3 * n)):
            for part in ("", "depth 0%", "depth 50%", "depth 100%", "control"):
                add(name, f"needle_found_{model}", share if part != "depth 50%" else share / 2, part)
        add(name, "needle_delta_log_p", -0.1 * n, unit="nats")
    readings.append(readings[0] | {"name": "tasks to 64", "kind": "tasks"})
    for task, before, after in (("arc", 0.625, 0.575), ("wino", 0.5, 0.525)):
        for which, value in (("source", before), ("export", after), ("delta", after - before), ("flips", 0.125)):
            add(task, f"task_acc_{which}", value)
        add(task, "task_acc_mcnemar_p", 0.0625, unit="probability")
    for who, share in (("source", 0.9), ("export", 0.8)):
        add("samples", f"sample_right_{who}", share)
    said = {"text": "It is <3901>.", "right": True, "looped": 0.0, "endless": False}
    looping = {"text": "and so on " * 200, "right": False, "looped": 0.9, "endless": True}
    samples = [
        {"prompt": "What is 47 × 83?", "name": "arithmetic", "temperature": 0.7, "source": said, "export": looping}
    ]
    told = {**of, "readings": readings, "samples": {"samples": samples}, "tasks": {"harness": "lm-eval 0.4.13"}}
    return replace(everything, scores=Scores(tuple(found), told))


def test_needles_tasks_and_texts_have_sections(questioned: Facts) -> None:
    parts = [PARTS[name].section(questioned) for name in ("needle", "tasks", "samples")]
    text = sections_as_html([part for part in parts if part is not None])
    for title in ("In long contexts", "At tasks", "Samples"):
        assert f"<h2>{title}</h2>" in text
    for shown in (
        "<b>100%</b>",
        "<b>40%</b>",
        "<b>20%</b>",
        "65,536",
        "62.5 %",
        "−5.0 %",
        "12.5 %",
        "0.0625",
        "20 documents",
    ):
        assert shown in text, shown
    assert "It is &lt;3901&gt;." in text and "source: right" in text and "export: not right, loops without end" in text
    assert "(temperature 0.7)" in text and "800 more characters" in text
    assert not [m for m in limits.missing(questioned) if m.startswith(("long context", "tasks", "texts"))]
    assert not any("how good either is at a task" in limit for limit in limits.limits(questioned))


def sections_as_html(found: list[Section]) -> str:
    nothing = dict(title="", made="", version="", light="", dark="", hero=None, headline=[], summary="")
    return environment().get_template("page.html").render(**nothing, sections=found)


def test_what_was_served_stands_beside_what_was_swept(facts: Facts) -> None:
    swept = facts.scores.find("ppl_export") if facts.scores is not None else None
    assert swept is not None
    told = Scores(
        (replace(swept, name="ppl_served", value=1234.5, error=1.0),), {"server": "http://s/v1", "model": "m"}
    )
    found = served.section(replace(facts, served=told))
    assert found is not None and "http://s/v1" in found.aside[0]
    (row,) = found.blocks[0].rows  # type: ignore[union-attr]
    assert row[1] == "1,234.5 ± 1.0" and row[2] == f"{words.figure(swept)['value']} {words.figure(swept)['error']}"


def test_a_frontier_without_a_budget_and_a_cut_without_text(everything: Facts) -> None:
    assert everything.frontier is not None and everything.selection is not None
    open_ended = {k: v for k, v in everything.frontier.items() if not k.startswith("budget")}
    found = frontier.section(replace(everything, frontier=open_ended, candidates=None, rule=None))
    assert found is not None and len(found.blocks) == 1 and "budget" not in found.aside[0]
    blind = {k: v for k, v in everything.selection.items() if k != "tokens"} | {"calibration_tokens": 0}
    without = replace(everything, selection=blind)
    assert "Read the weights alone" in done.steps(without)[0] and "without any text" in experts.aside(without)[0]
    assert provenance.section(without) is not None


def test_whatever_left_a_run_has_a_page(m2: Checkpoint, tmp_path: Path) -> None:
    few = Corpus(tokens=512, length=64)
    quantize(m2.path, tmp_path / "q", Quantizing("mxfp4"), quiet=True, command="moesaic quantize this")
    prune(m2.path, tmp_path / "p", Pruning(4), corpus=few, quiet=True)
    preview_cuts(m2.path, tmp_path / "v", Cuts([4], Ranking()), few, quiet=True)
    tokens = text_rows(m2)
    evaluate(
        m2, Checkpoint.open(tmp_path / "p"), [Reading.of(tokens)], tmp_path / "e", Conditions(device="cpu"), quiet=True
    )
    says = {
        "q": ("moesaic quantize this", "How experts were rounded", "Every check holds", "Bits by layer"),
        "q/moesaic": ("How experts were rounded",),
        "p": ("Which experts stayed", "8 dropped", "4 of 8 experts"),
        "v": ("What cuts would cost", "Nothing has been exported"),
        "e": ("What it cost", "Where the bytes went"),
    }
    for where, wanted in says.items():
        out = report(tmp_path / where)
        assert out.parent == tmp_path / where / ("" if where in ("e", "q/moesaic") else "moesaic")
        text = out.read_text()
        assert not [w for w in wanted if w not in text], where
    with pytest.raises(InputError, match="holds no run"):
        report(tmp_path)


def test_devices_that_a_run_was_made_for_are_those_of_its_page(run: Path, facts: Facts, tmp_path: Path) -> None:
    assert facts.memory is None and places(run / "model") == places(run) == (run, run / "model")
    shutil.copytree(run, tmp_path / "run")
    source = json.loads((run / "source.json").read_text()) | {"recipe": {"devices": "2xH200", "context": 1024}}
    (tmp_path / "run" / "source.json").write_text(json.dumps(source))
    found = gather(tmp_path / "run").memory
    assert found is not None and (found["machine"]["name"], found["context"]) == ("2 × H200", 1024)
    asked = gather(tmp_path / "run", "2x95GiB", 2048).memory
    assert asked is not None and (asked["machine"]["name"], asked["context"]) == ("2 × 95 GiB", 2048)


def test_a_bare_run_has_a_page_too(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "source.json", tmp_path)
    text = report(tmp_path).read_text()
    assert "Nothing has been exported" in text and all(f"<li>{absence}" in text for _, _, absence in SECTIONS.values())
    with pytest.raises(InputError, match="holds no run"):
        report(tmp_path / "nowhere")


def test_names_are_text_and_not_markup(run: Path, facts: Facts) -> None:
    evil = "<script>alert('x')</script>"
    source = {**facts.source, "model": f"/m/{evil}", "command": evil, "family": evil}
    text = page(Facts(str(run), source, after=facts.after, verify=facts.verify), DAY)
    assert "<script" not in text and html.escape(evil) in text.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")


def with_reading(facts: Facts, changes: dict[str, object]) -> Facts:
    assert facts.scores is not None
    reading = facts.scores.facts["readings"][0] | changes
    return replace(facts, scores=replace(facts.scores, facts={**facts.scores.facts, "readings": [reading]}))


def test_limits_are_stated(facts: Facts, whole: str) -> None:
    text = whole
    assert "activations were not rounded" in text and "more than 47 tokens of context" in text
    assert "not held out" not in text and "not finite" not in text
    assert facts.scores is not None
    of_python = facts.scores.facts["readings"][0]["facts"] | {"trying_out": True}
    assert limits.PYTHON_TEXT in limits.limits(with_reading(facts, {"facts": of_python}))
    bad = limits.limits(with_reading(facts, {"nonfinite": {"source": 0, "export": 17}}))
    assert any("17 predictions of the export were not finite" in limit for limit in bad)


def test_a_check_that_fails_is_said_and_named(run: Path, facts: Facts) -> None:
    finding = {"check": "codes", "where": "w1", "what": "differs"}
    failed = {"holds": False, "compared": {"codes": 5}, "findings": [finding]}
    broken = page(Facts(str(run), facts.source, verify=failed), DAY)
    assert "Every check holds" not in broken and "1 checks do not hold" in broken and "codes: w1 differs" in broken


def test_nothing_measured_is_no_zero(facts: Facts) -> None:
    assert facts.scores is not None
    empty = tuple(replace(s, value=None, error=None, low=None, high=None) for s in facts.scores.scores)
    nothing = Scores(empty, facts.scores.facts)
    text = page(Facts(facts.run, facts.source, after=facts.after, scores=nothing, kl_nats={"text": np.array([])}), DAY)
    assert "not measured" in text and "has not been measured" in text and "nats</strong>" not in text


def test_every_tile_once_in_its_colour() -> None:
    rng = np.random.default_rng(0)
    fate_LE = rng.choice(np.array(["dropped", "source", "mxfp4", "nvfp4"], object), (9, 40))
    for score_LE in (None, rng.random((9, 40))):
        svg = ET.fromstring(mosaic.mosaic(fate_LE, score_LE))
        drawn: Counter[str] = Counter()
        for path in svg.iter("path"):
            drawn[path.attrib["style"]] += path.attrib["d"].count("M")
        fates = mosaic.order(fate_LE)
        assert fates == ["source", "mxfp4", "nvfp4", "dropped"]
        assert drawn == {f"fill:{mosaic.color(f, fates)}": int((fate_LE == f).sum()) for f in fates}
        assert len(set(drawn)) == 4


def test_a_strip_paints_each_tile_once() -> None:
    rng = np.random.default_rng(0)
    for count in (3, 40, 256):
        line = [None if i == 0 else grids.Paint(f"var(--fate-{i % 3})", i) for i in rng.integers(0, 4, count).tolist()]
        svg = ET.fromstring(str(grids.strip(line)))
        painted: list[str | None] = [None] * count
        for path in svg.iter("path"):
            for x, width in re.findall(r"M(\d+) 5h(\d+)", path.attrib["d"]):
                for i in range(int(x) // 10, (int(x) + int(width)) // 10):
                    assert painted[i] is None
                    painted[i] = path.attrib["style"]
        assert painted == [None if p is None else f"stroke:{p.color}" for p in line]
        tile, grout = map(float, svg.attrib["stroke-dasharray"].split())
        assert tile + grout == pytest.approx(10, abs=1e-3) and 0 < grout <= 1.25


def test_tones_are_quarters_of_what_is_kept() -> None:
    kept_LE = np.array([[True] * 8 + [False] * 4])
    score_LE = np.array([[5.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 9.0, 9.0, 9.0, 9.0]])  # dropped ones do not count
    assert mosaic.tone_of(score_LE, kept_LE)[0, :8].tolist() == [2, 0, 3, 0, 3, 1, 2, 1]


def large(facts: Facts, layers: int, experts: int) -> Facts:
    """The same run, as if of a model as large as the released ones."""
    rng = np.random.default_rng(0)
    kept = {layer: tuple(sorted(rng.permutation(experts)[: experts // 2].tolist())) for layer in range(layers)}
    formats = {f"layers.{layer}.experts": ("source", "mxfp4", "nvfp4")[layer % 3] for layer in range(layers)}
    assert facts.selection is not None and facts.scores is not None
    selection = {
        **facts.selection,
        "kept": {str(k): list(v) for k, v in kept.items()},
        "scores": rng.random((layers, experts)).tolist(),
    }
    selection |= {key: {str(layer): 0.02 for layer in range(layers)} for key in ("margins", "jaccard")}
    source = {**facts.source, "experts": experts}
    kl_N = rng.lognormal(-3, 2, 262_144)
    return replace(
        facts,
        source=source,
        selection=selection,
        plan=Plan("compressed_tensors", kept, formats),
        kl_nats={"text": kl_N},
        expert_errors={str(layer): rng.normal(0.11, 0.001, experts // 2).tolist() for layer in range(layers)},
    )


def test_the_largest_model_fits_in_two_megabytes(questioned: Facts) -> None:
    text = page(large(questioned, 62, 256), DAY)
    assert len(text.encode()) < 2e6 and "7,936 dropped" in text


def test_the_picture_stands_alone(run: Path, tmp_path: Path) -> None:
    svg = ET.parse(picture(run, tmp_path / "mosaic.svg")).getroot()
    text = (tmp_path / "mosaic.svg").read_text()
    assert "prefers-color-scheme" in text and "kept, rounded to MXFP4" in text and "dropped" in text
    used, known = set(re.findall(r"var\((--[\w-]+)\)", text)), set(re.findall(r"(--[\w-]+):", text))
    assert used <= known and svg.attrib["viewBox"].split()[2] == svg.attrib["width"]


def test_every_colour_of_the_page_has_a_value(whole: str) -> None:
    assert set(re.findall(r"var\((--[\w-]+)\)", whole)) <= set(re.findall(r"(--[\w-]+):", whole))


@pytest.mark.parametrize(
    ("count", "decimal", "binary"),
    [
        (230_121_630_720, "230.1 GB", "214.3 GiB"),
        (443_742_085_120, "443.7 GB", "413.3 GiB"),
        (21_102_784, "21.10 MB", "20.13 MiB"),
        (999, "999 B", "999 B"),
        (1000, "1.00 kB", "1,000 B"),
        (0, "0 B", "0 B"),
    ],
)
def test_sizes_in_both_units(count: int, decimal: str, binary: str) -> None:
    assert (words.decimal(count), words.binary(count)) == (decimal, binary)


@pytest.mark.parametrize(
    ("name", "unit", "value", "error", "shown"),
    [
        ("kl_mean", "nats", 0.174321, 0.00412, ("0.1743", "± 0.0041", "nats")),
        ("top1_agreement", "share", 0.858, 0.0046, ("85.80", "± 0.46", "%")),
        ("delta_ln_ppl", "nats", 0.0134, 0.0071, ("+0.0134", "± 0.0071", "nats")),
        ("delta_ln_ppl", "nats", -0.0134, 0.071, ("−0.013", "± 0.071", "nats")),
        ("ppl_export", "perplexity", 43.4193, 3.47, ("43.4", "± 3.5", "")),
        ("kl_max", "nats", 3.8612, None, ("3.86", "", "nats")),
        ("kl_mean", "nats", 0.0, 0.0, ("0.00", "", "nats")),
        ("kl_mean", "nats", None, None, ("not measured", "", "")),
    ],
)  # fmt: skip
def test_no_more_digits_than_the_error_allows(
    name: str, unit: str, value: float, error: float, shown: tuple[str, str, str]
) -> None:
    figure = words.figure(Score("text", name, "", value, error, None, None, unit, 10, 10))
    assert (figure["value"], figure["error"], figure["unit"]) == shown


def test_a_browser_opens_it_without_complaint(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ]
    flags += [
        "--disable-component-update",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
    ]

    def opened(file: Path) -> subprocess.CompletedProcess[str]:
        command = [browser, *flags, "--window-size=420,900", "--dump-dom", file.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    seen = opened(report(run, "2x95GiB"))
    assert (
        seen.returncode == 0
        and "What it cost" in seen.stdout
        and "What one device holds" in seen.stdout
        and "CONSOLE" not in seen.stderr
    )
    broken = tmp_path / "broken.html"  # the check itself can fail
    broken.write_text((run / "report.html").read_text().replace("</body>", "<script>nowhere()</script></body>"))
    assert "CONSOLE" in opened(broken).stderr
