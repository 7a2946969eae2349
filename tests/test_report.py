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
from moesaic.errors import InputError
from moesaic.evaluate import Reading, Score, Scores, evaluate
from moesaic.plan import Plan
from moesaic.report import Facts, gather, mosaic, page, picture, report, words

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
    verify = {"holds": True, "compared": {"structure": 123, "codes": 456}, "findings": []}
    write_json(folder / "verify.json", "verify", verify, {})
    evaluate(m3, export, [Reading.of(tokens)], folder, device="cpu", quiet=True)
    return folder


@pytest.fixture(scope="module")
def facts(run: Path) -> Facts:
    return gather(run)


@pytest.fixture(scope="module")
def whole(facts: Facts) -> str:
    return page(facts, DAY)


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


def test_one_file_that_loads_nothing(run: Path) -> None:
    out = report(run)
    text = out.read_text()
    parts = Parts(text)
    assert out == run / "report.html" and len(text.encode()) < 2e6
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
    assert "20 November 2026" in text and "moesaic compress A B" in text and "a warning of the selection" in text
    assert "tensors present, of the right shape and type" in text and ">123<" in text and ">456<" in text
    for identity in (
        gather(run).source["identity"],
        gather(run).scores.facts["readings"][0]["facts"]["ids_sha256"][:16],
    ):  # type: ignore[union-attr]
        assert identity in text
    assert page(facts, DAY) == text


SECTIONS = {
    "scores": ("What it cost", "KL divergence, perplexity and agreement"),
    "selection": ("Which experts stayed", "the choice of experts"),
    "verify": ("What was checked", "verification of the export"),
    "after": ("Where the bytes went", "an export"),
}


@pytest.mark.parametrize("what", SECTIONS)
def test_what_is_not_there_has_no_section_and_is_named(facts: Facts, whole: str, what: str) -> None:
    section, absence = SECTIONS[what]
    less = page(replace(facts, **{what: None}), DAY)
    assert f"<h2>{section}</h2>" in whole and f"<li>{absence}" not in whole
    assert f"<h2>{section}</h2>" not in less and f"<li>{absence}" in less


def test_a_bare_run_has_a_page_too(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "source.json", tmp_path)
    text = report(tmp_path).read_text()
    assert "Nothing has been exported" in text and all(f"<li>{absence}" in text for _, absence in SECTIONS.values())
    with pytest.raises(InputError, match=r"source\.json cannot be read"):
        report(tmp_path / "nowhere")


def test_names_are_text_and_not_markup(facts: Facts) -> None:
    evil = "<script>alert('x')</script>"
    text = page(replace(facts, source={**facts.source, "model": f"/m/{evil}", "command": evil, "family": evil}), DAY)
    assert "<script" not in text and html.escape(evil) in text.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")


def with_reading(facts: Facts, changes: dict[str, object]) -> Facts:
    assert facts.scores is not None
    reading = facts.scores.facts["readings"][0] | changes
    return replace(facts, scores=replace(facts.scores, facts={**facts.scores.facts, "readings": [reading]}))


def test_limits_are_stated(facts: Facts, whole: str) -> None:
    text = whole
    assert "activations were not rounded" in text and "more than 47 tokens of context" in text
    assert "not held out" not in text and "not finite" not in text
    python = page(
        with_reading(facts, {"facts": facts.scores.facts["readings"][0]["facts"] | {"origin": "Python 3.11.7: …"}}), DAY
    )  # type: ignore[union-attr]
    assert "it is not held out" in python
    assert "17 predictions of the export were not finite" in page(
        with_reading(facts, {"nonfinite": {"source": 0, "export": 17}}), DAY
    )
    failed = {
        "holds": False,
        "compared": {"codes": 5},
        "findings": [{"check": "codes", "where": "w1", "what": "differs"}],
    }
    broken = page(replace(facts, verify=failed), DAY)
    assert "Every check holds" not in broken and "1 checks do not hold" in broken and "codes: w1 differs" in broken


def test_nothing_measured_is_no_zero(facts: Facts) -> None:
    assert facts.scores is not None
    empty = tuple(replace(s, value=None, error=None, low=None, high=None) for s in facts.scores.scores)
    text = page(replace(facts, scores=Scores(empty, facts.scores.facts), kl_nats={"text": np.array([])}), DAY)
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
    )


def test_the_largest_model_fits_in_two_megabytes(facts: Facts) -> None:
    text = page(large(facts, 62, 256), DAY)
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

    seen = opened(report(run))
    assert seen.returncode == 0 and "What it cost" in seen.stdout and "CONSOLE" not in seen.stderr
    broken = tmp_path / "broken.html"  # the check itself can fail
    broken.write_text((run / "report.html").read_text().replace("</body>", "<script>nowhere()</script></body>"))
    assert "CONSOLE" in opened(broken).stderr
