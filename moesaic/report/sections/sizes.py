"""Where the bytes went: before and after, by class of module."""

from markupsafe import Markup

from .. import words
from ..blocks import Section, Table, Text, two_lines
from ..facts import Facts
from .base import Part


def section(facts: Facts) -> Section | None:
    if facts.after is None:
        return None
    largest = max(r["bytes"] for r in (facts.before or facts.after)["roles"].values())
    rows: list[list[Text]] = []
    for role, name in words.ROLES.items():
        before, after = ((f or {"roles": {}})["roles"].get(role) for f in (facts.before, facts.after))
        if before is not None or after is not None:
            b, a = (None if x is None else x["bytes"] for x in (before, after))
            rows.append([two_lines(name, formats_moved(facts, role)), bars(b, a, largest), size(b), size(a)])
    was, now = facts.source["bytes"], facts.after["bytes"]
    rows.append(["All", "", size(was), size(now)])
    bits = 8 * now / facts.after["parameters"]
    aside = [
        f"Tensors as they lie on disk, scales included. {words.decimal(was - now)} were saved; {bits:.2f} stored bits per "
        "weight remain, over all that was kept."
    ]
    head = ("module class", "", "source", "export")
    return Section("Where the bytes went", aside, [Table(head, rows, optional=(1,), left=(0, 1), has_total=True)])


def size(count: int | None) -> Text:
    return "" if count is None else two_lines(words.decimal(count), words.binary(count))


def bars(before: int | None, after: int | None, largest: int) -> Markup:
    width = [100 * (count or 0) / largest for count in (before, after)]
    return Markup('<span class="bars"><i style="width:{:.2f}%"></i><i style="width:{:.2f}%"></i></span>').format(*width)


def formats_moved(facts: Facts, role: str) -> str:
    after = words.one_format(facts.after, role)
    before = words.one_format(facts.before, role) if facts.before else after
    return after if before == after else f"{before} → {after}"


PART = Part(name="sizes", place=20, section=section)
