"""The facts of `fit`, to look at: one table of a device, one of the plans, the answer in words, and every formula.

Tables have few columns and rows, so that 80 columns of a terminal hold each number and each name whole.
"""

from typing import Any

from rich.console import Group
from rich.table import Table

SHOWN = 4  # kept counts: 80 columns have room for no more


def size(count: int) -> str:
    """Bytes as people compare them."""
    return f"{count / 1e9:,.2f} GB = {count / 2**30:,.2f} GiB"


def span(band: dict[str, int]) -> str:
    return f"{band['low'] / 2**30:,.2f} to {band['high'] / 2**30:,.2f}"


def table(facts: dict[str, Any]) -> Group:
    return Group(device_table(facts), "", plan_table(facts))


def device_table(facts: dict[str, Any]) -> Table:
    """What one device holds, in the words of vLLM's log."""
    cache, device, reserve = facts["cache"], facts["device"], facts["device"]["reserve_bytes"]
    title = (
        f"{facts['family']}, {size(facts['disk_bytes'])},\n"
        f"on {facts['machine']['name']} as {facts['layout']['name']}: {facts['verdict']}"
    )
    shown = Table("one device", "GiB", "", title=title, title_justify="left", show_edge=False)
    shown.columns[1].justify = "right"
    rows = [
        ("device memory", device["bytes"], f"{facts['machine']['utilization']:.0%} of it is asked for"),
        ("Model loading took", device["weight_bytes"], f"{device['repeated_bytes'] / 2**30:,.2f} on other devices too"),
        ("reserve", reserve["typical"], f"graphs, activations; {span(reserve)}"),
        ("Available KV cache memory", cache["bytes"]["typical"], span(cache["bytes"])),
    ]  # fmt: skip
    for name, count, note in rows:
        shown.add_row(name, f"{count / 2**30:,.2f}", note)
    asked, longest = facts["context"], cache["longest_context"]
    shown.add_section()
    shown.add_row(f"{facts['kv']} cache of a token", "", f"{cache['token_bytes']:,} B; pages of {cache['page_tokens']}")
    shown.add_row("KV cache size", "", f"{cache['tokens']:,} tokens")
    shown.add_row(f"Maximum concurrency for {asked:,}", "", f"{cache['concurrency']:.2f}x")
    shown.add_row("maximum model length", "", f"{longest['typical']:,} tokens")
    if longest["low"] < longest["high"]:
        shown.add_row("", "", f"{longest['low']:,} to {longest['high']:,}")
    if facts["concurrency"] > 1:
        shown.add_row("", "", f"for each of {facts['concurrency']} requests")
    shown.add_row("a model may have", "", size(max(0, facts["budget_bytes"])))
    for refused in facts["refused"]:
        for reason in refused["reasons"]:
            shown.add_row(f"not {refused['layout']}", "", reason)
    return shown


def plan_table(facts: dict[str, Any]) -> Table:
    """GB by experts kept and their format; those in parentheses do not fit."""
    title = "GB on disk by experts kept, (too big)"
    rows = facts["plans"]
    shown = Table("experts in", title=title, title_justify="left", show_edge=False)
    counts = [cell["experts"] for cell in rows[0]["kept"]]
    places = sorted({round(i * (len(counts) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    for i in places:
        shown.add_column(f"{counts[i]}", justify="right", no_wrap=True)
    shown.add_column("most", justify="right", no_wrap=True)
    shown.add_column("in GB", justify="right", no_wrap=True)
    shown.columns[0].no_wrap = True
    for row in rows:
        cells = [gigabytes(row["kept"][i]) for i in places]
        most = (f"{row['most_experts']}", f"{row['most_bytes'] / 1e9:,.1f}") if row["most_experts"] else ("none", "")
        shown.add_row(row["format"], *cells, *most)
    if noted := [row["format"] for row in rows if row["note"]]:
        shown.caption, shown.caption_justify = f"{' and '.join(noted)}: vLLM needs its humming kernels", "left"
    return shown


def gigabytes(cell: dict[str, Any]) -> str:
    count = f"{cell['bytes'] / 1e9:,.1f}"
    return count if cell["fits"] else f"({count})"


def answer(facts: dict[str, Any]) -> str:
    """What to do, in words: what fits unchanged, else what the rule recommends; how much it holds, and how fast it can be."""
    plan, machine, asked = facts["recommendation"], facts["machine"], requests(facts["concurrency"], facts["context"])
    if plan["format"] is None:
        more = (
            f"{plan['devices']} such devices would do"
            if plan["devices"]
            else "Ask for less cache, or for larger devices"
        )
        return (
            f"Neither the model as it is nor a plan that the rule allows fits {machine['name']} with the "
            f"{facts['kv']} cache of {asked}. {more}.\n{plan['rule']}"
        )
    return "\n".join([*what(facts, asked), *held(facts), *speed(facts)])


def what(facts: dict[str, Any], asked: str) -> list[str]:
    """The plan, and why."""
    plan, name, layout = facts["recommendation"], facts["machine"]["name"], facts["recommendation"]["layout"]["name"]
    if plan["unchanged"]:
        found = [f"It fits unchanged: {size(plan['bytes'])} on {name} as {layout}."]
        if facts["machine"]["engine"] == "mlx":
            found.append("mlx_lm.server serves it there; what is printed below starts moesaic's own small server.")
        return found
    engine = {"mlx": "MLX", "vllm": "vLLM"}[facts["machine"]["engine"]]
    fits = facts["verdict"] != "does not fit"
    why = (
        f"{engine} does not load it as it is"
        if fits
        else f"It does not fit {name} with the {facts['kv']} cache of {asked}"
    )
    every = facts["experts"]
    experts = f"all {every} experts" if plan["experts"] == every else f"{plan['experts']} of {every} experts"
    form = "as they are" if plan["format"] == "source" else f"in {plan['format']}"
    rest = "" if plan["rest"] == "source" else ", all else in BF16"
    found = [
        f"{why}. Recommended: {experts} {form}{rest}, {size(plan['bytes'])}, as {layout}.",
        f"The rule: {plan['rule'][0].lower()}{plan['rule'][1:]} It rests on evidence from two small models, which --explain "
        "shows.",
    ]
    if plan["humming"]:
        found.append(f"For {plan['format']} vLLM needs its humming kernels.")
    return found


def held(facts: dict[str, Any]) -> list[str]:
    """The cache beside it."""
    plan, least = facts["recommendation"], facts["concurrency"]
    tight = " It is tight: with the reserve at its highest that does not fit." if plan["tight"] else ""
    found = [requests(plan["concurrency"], facts["context"]), requests(least, plan["longest_context"])]
    return [f"Beside it the cache of {' or '.join(dict.fromkeys(found))}.{tight}"]


def speed(facts: dict[str, Any]) -> list[str]:
    """The bound of tokens a second."""
    found = facts["recommendation"]["speed"]
    if not found:
        return ["Tokens a second: the bandwidth of a size is not known; name the device for a bound."]
    rates = f"{rate(found[0]['tokens_second'])} for one request after {found[0]['context']:,} tokens"
    rates += "".join(f", {rate(s['tokens_second'])} for {s['requests']} at once" for s in found[1:])
    return [f"Tokens a second by bandwidth alone, at most: {rates}. Engines stay below."]


def rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:,.1f}"


def requests(count: int, context: int) -> str:
    return f"one request of {context:,} tokens" if count == 1 else f"{count:,} requests of {context:,} tokens"


def explain(facts: dict[str, Any]) -> str:
    """Every number of `facts` with the formula that it follows, a line each; then the rule, and what it comes from."""
    plan = facts["recommendation"]
    lines = [("", line) for line in facts["explain"]]
    for bound in plan.get("speed", []):
        lines += [(f", {bound['requests']} at once", line) for line in bound["lines"]]
    found = [f"{line['name']}{of}: {line['formula']} = {line['value']:,} {line['unit']}" for of, line in lines]
    return "\n".join([*found, f"rule: {plan['rule']}", f"evidence: {plan['evidence']}"])
