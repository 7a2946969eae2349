"""Names that come from files, folders and plans are text on the page, in its drawings and on the card, whatever they spell."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_card import NAMING, export, facts, source  # noqa: F401  (fixtures)
from test_report import DAY

from moesaic.report import Facts, card, mosaic, page
from moesaic.report.blocks import Drawing, Heading, Items, Pairs, Table, Words, two_lines
from moesaic.report.card import block, code, plain
from moesaic.report.grids import Paint, Row, grid
from moesaic.report.page import environment
from moesaic.report.plots import Mark, by_layer, kl_histogram, whiskers

NAMES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a\\1b\\g<2>c\\",
    "'; drop & <b>",
    "</svg><script>x</script>",
    "]](javascript:alert(1))",
    "`code` **bold** | cell",
    "$x^2$ and \\frac{1}{2}",
    "{{ 7 * 7 }}{% raw %}",
    "line\nbreak\ttab",
    "\u202egnp.exe \u0000 \u001b[31m",
    "]]><!--",
    "&lt;script&gt;",
]


def made_of(html: str) -> set[tuple[str, ...]]:
    """Every kind of tag with the names of its attributes: what a name must not change."""
    found: set[tuple[str, ...]] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.add((tag, *(key for key, _ in attrs)))  # type: ignore[method-assign]
    parser.handle_comment = lambda text: found.add(("comment", text))  # type: ignore[method-assign]
    parser.feed(html)
    return found


def drawings(name: str) -> list[str]:
    fate_LE = np.array([["source", name], ["dropped", name]], dtype=object)
    return [
        mosaic.picture(fate_LE, None, ["source", name, "dropped"], name),
        mosaic.mosaic(fate_LE, None),
        grid(name, [Row(name, [Paint("var(--ink)")], [name], name)], [name], name),
        kl_histogram(name, np.linspace(0.01, 1, 50), {name: 0.5}),
        whiskers(name, name, [Mark(name, 1.0, 0.5, 2.0)], "nats"),
        by_layer(name, name, [0, 1], [0.5, 0.7]),
    ]


@pytest.fixture(scope="module")
def harmless() -> list[str]:
    return drawings("harmless")


@pytest.mark.parametrize("name", NAMES)
def test_drawings_escape(name: str, harmless: list[str]) -> None:
    for html, same in zip(drawings(name), harmless):
        assert made_of(html) == made_of(same)
        ids = re.findall(r' id="([^"]*)"', html)
        assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w.-]+", i) for i in ids)
        if "<svg" in html[:5] and name.isprintable():  # XML has no place for control characters
            ET.fromstring(html)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_escape(name: str) -> None:
    template = environment().from_string(
        '{% import "blocks.html" as set %}{% for b in blocks %}{{ set[b.kind](b) }}{% endfor %}'
    )
    blocks = [
        Heading(name),
        Words(name),
        Items([name]),
        Pairs([(name, name)]),
        Table([name], [[name], [two_lines(name, name)]]),
    ]
    html = template.render(blocks=[*blocks, Drawing(mosaic.Markup("<svg/>"), name)])
    assert html.count(str(mosaic.Markup.escape(name))) == 10
    assert "<script" not in html and "<img" not in html


@pytest.mark.parametrize("name", ["".join(NAMES).replace("\0", ""), NAMES[2]])
def test_a_page_and_a_card_of_hostile_files(name: str, facts: Facts) -> None:  # noqa: F811
    """Through format names of the plan, the name of a reading, and the command."""
    assert made_of(page(named(facts, name), DAY)) == made_of(page(named(facts, "harmless"), DAY))
    outside = re.sub(r"(`+)[^`].*?\1", "", card(named(facts, name), NAMING).split("---", 2)[2], flags=re.S)
    assert not re.search(r"(?<!\\)<(script|img|b|!--)", outside)


def named(facts: Facts, name: str) -> Facts:  # noqa: F811
    assert facts.plan is not None and facts.scores is not None
    unit = next(iter(facts.plan.formats))
    readings = [{**r, "name": name} for r in facts.scores.facts["readings"]]
    rows = [replace(s, reading=name) if s.reading else s for s in facts.scores.scores]
    return replace(
        facts, scores=replace(facts.scores, scores=rows, facts={**facts.scores.facts, "readings": readings}),
        plan=replace(facts.plan, formats={**facts.plan.formats, unit: name}),
        source={**facts.source, "command": name, "model": str(Path("/m") / name.replace("/", "-").replace("\0", ""))},
    )  # fmt: skip


def test_markdown_by_hand() -> None:
    assert plain("a|b`c`<d>[e](f)*g*\\ \n h") == "a\\|b\\`c\\`\\<d>\\[e\\](f)\\*g\\*\\\\ h"
    assert code("x") == "`x`" and code("a`b") == "`` a`b ``" and code("``") == "``` `` ```"
    assert block("run\n```\nx") == "````\nrun\n```\nx\n````"
