"""As it is served: what the server of the export was measured at, beside what the sweep of its files was."""

from .. import words
from ..blocks import Block, Section, Table, Text
from ..facts import Facts
from .base import Part

SWEPT = {
    "ppl_served": "ppl_export",
    "needle_found_served": "needle_found_export",
    "needle_log_p_served": "needle_log_p_export",
}


def section(facts: Facts) -> Section | None:
    if facts.served is None:
        return None
    rows: list[list[Text]] = []
    for score in facts.served.scores:
        if score.part:
            continue
        here, swept = words.figure(score), None
        if facts.scores is not None and score.name in SWEPT:
            swept = facts.scores.find(SWEPT[score.name], reading=score.reading)
        there = words.figure(swept) if swept is not None else {"value": "", "error": "", "unit": ""}
        cells = [" ".join(f"{x['value']} {x['error']} {x['unit']}".split()) for x in (here, there)]
        rows.append([f"{score.reading}: {words.name(score.name)}", *cells])
    of = facts.served.facts
    blocks: list[Block] = [Table(("figure", "served", "from its files"), rows)]
    aside = f"The same rows through {of['server']}, which serves {of['model']}. "
    aside += "A server does not return the full distribution, so no KL."
    if of.get("tokens_before"):
        aside += " It puts a token of its own before every row, which the sweep of the files did not."
    return Section("As it is served", [aside], blocks)


PART = Part(name="served", place=90, section=section)
