"""Memory of one device: weights, reserve and cache, on the devices that the run was made for."""

from typing import Any

from markupsafe import Markup

from .. import words
from ..blocks import Block, Drawing, Items, Section, Table, Text
from ..facts import Facts
from .base import Part


def section(facts: Facts) -> Section | None:
    if facts.memory is None:
        return None
    m, device, cache = facts.memory, facts.memory["device"], facts.memory["cache"]
    reserve, total = device["reserve_bytes"], device["bytes"]
    spare = total - device["requested_bytes"]
    parts = [
        ("weights", device["weight_bytes"], "var(--fate-0)", f"{words.binary(device['repeated_bytes'])} on others too"),
        ("cache of keys and values", max(0, cache["bytes"]["typical"]), "var(--fate-1)", span(cache["bytes"])),
        ("reserve", reserve["typical"], "var(--fate-3)", f"activations, graphs, context: {span(reserve)}"),
        ("not asked for", spare, "var(--tile)", f"{m['machine']['utilization']:.0%} of the device is claimed"),
    ]  # fmt: skip
    rows: list[list[Text]] = [
        [Markup('<i class="dot" style="background:{}"></i>{}').format(color, name), words.binary(count), note]
        for name, count, color, note in parts
    ]
    rows.append(["one device", words.binary(total), m["machine"]["name"]])
    blocks: list[Block] = [
        Drawing(stack(parts, total)),
        Table(("", "GiB", ""), rows, left=(0, 2), optional=(2,), has_total=True),
        Items(sentences(m), plain=True),
    ]
    aside = [
        f"{m['machine']['name']} as {m['layout']['name']}: {m['verdict']}, by the rules of {words.term(m['machine']['engine'])}. "
        "Weights are exact; the reserve is an estimate with its band, and the cache is what is left."
    ]
    return Section("What one device holds", aside, blocks)


def stack(parts: list[tuple[str, int, str, str]], total: int) -> Markup:
    shares = Markup("").join(
        Markup('<i style="width:{:.2f}%;background:{}"></i>').format(100 * count / total, color)
        for _, count, color, _ in parts
    )
    return Markup('<div class="stack" role="img" aria-label="What one device holds">{}</div>').format(shares)


def span(band: dict[str, int]) -> str:
    return f"{words.binary(max(0, band['low']))} to {words.binary(max(0, band['high']))}"


def sentences(m: dict[str, Any] | Any) -> list[str]:
    cache, longest = m["cache"], m["cache"]["longest_context"]
    at_once = f", with {m['concurrency']} at once" if m["concurrency"] > 1 else ""
    return [
        f"A request may have {longest['typical']:,} tokens ({longest['low']:,} to {longest['high']:,}){at_once}.",
        f"The cache holds {cache['tokens']:,} tokens of requests of {m['context']:,}: {cache['concurrency']:,.1f} at once.",
        f"A token takes {cache['token_bytes']:,} bytes of {m['kv'].upper()} cache.",
    ]


PART = Part(name="memory", place=140, section=section)
