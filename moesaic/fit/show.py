"""The facts of `fit`, to look at: one table of a device, one of the plans, and every formula with its operands."""

from typing import Any

from rich.console import Group
from rich.table import Table


def size(count: int) -> str:
    """Bytes as people compare them."""
    return f"{count / 1e9:,.2f} GB = {count / 2**30:,.2f} GiB"


def gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def span(band: dict[str, int]) -> str:
    return f"{gib(band['low'])} to {gib(band['high'])}"


def table(facts: dict[str, Any]) -> Group:
    return Group(device_table(facts), "", plan_table(facts))


def device_table(facts: dict[str, Any]) -> Table:
    """What one device holds, in the words of vLLM's log."""
    cache, device, reserve = facts["cache"], facts["device"], facts["device"]["reserve_bytes"]
    title = (
        f"{facts['family']}, {size(facts['disk_bytes'])}, on {facts['machine']['name']} as {facts['layout']['name']}"
    )
    shown = Table("one device", "GiB", "", title=f"{title}: {facts['verdict']}", title_justify="left", show_edge=False)
    shown.columns[1].justify = "right"
    rows = [
        ("device memory", device["bytes"], f"{facts['machine']['utilization']:.0%} of it is asked for"),
        ("Model loading took", device["weight_bytes"], f"{gib(device['repeated_bytes'])} of it on other devices too"),
        ("reserve", reserve["typical"], f"activations, graphs, context; {span(reserve)}"),
        ("Available KV cache memory", cache["bytes"]["typical"], span(cache["bytes"])),
    ]  # fmt: skip
    for name, count, note in rows:
        shown.add_row(name, f"{count / 2**30:,.2f}", note)
    asked, longest = facts["context"], cache["longest_context"]
    shown.add_section()
    shown.add_row(f"{facts['kv']} cache of a token", "", f"{cache['token_bytes']:,} B; pages of {cache['page_tokens']}")
    shown.add_row("KV cache size", "", f"{cache['tokens']:,} tokens")
    shown.add_row(f"Maximum concurrency for {asked:,} tokens", "", f"{cache['concurrency']:.2f}x")
    shown.add_row(
        "maximum model length", "",
        f"{longest['typical']:,} tokens; {longest['low']:,} to {longest['high']:,}"
        + (f", {facts['concurrency']} at once" if facts["concurrency"] > 1 else ""),
    )  # fmt: skip
    shown.add_row(
        "a model may have",
        "",
        f"{size(max(0, facts['budget_bytes']))} beside {facts['concurrency']} × {asked:,} tokens",
    )
    for refused in facts["refused"]:
        for reason in refused["reasons"]:
            shown.add_row(f"not {refused['layout']}", "", reason)
    return shown


def plan_table(facts: dict[str, Any]) -> Table:
    """GB by experts kept and their format; those in parentheses do not fit."""
    title = f"GB on disk by experts kept and format, (too big) for {facts['machine']['name']} with {facts['context']:,} tokens"
    shown = Table("experts in", title=title, title_justify="left", show_edge=False)
    for cell in facts["plans"][0]["kept"]:
        shown.add_column(f"{cell['experts']}", justify="right")
    shown.add_column("most that fit", justify="right")
    for row in facts["plans"]:
        cells = [f"{c['bytes'] / 1e9:,.1f}" if c["fits"] else f"({c['bytes'] / 1e9:,.1f})" for c in row["kept"]]
        most = f"{row['most_experts']}: {row['most_bytes'] / 1e9:,.1f}" if row["most_experts"] else "none"
        shown.add_row(row["format"], *cells, most)
    notes = [f"{row['format']} {row['note']}" for row in facts["plans"] if row["note"]]
    shown.caption, shown.caption_justify = "; ".join(notes), "left"
    return shown


def explain(facts: dict[str, Any]) -> str:
    """Every number of `facts` with the formula that it follows, a line each."""
    return "\n".join(
        f"{line['name']}: {line['formula']} = {line['value']:,} {line['unit']}" for line in facts["explain"]
    )
