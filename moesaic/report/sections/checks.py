"""What was checked on the export, and what did not hold."""

from .. import words
from ..blocks import Block, Items, Section, Table, Words
from ..facts import Facts
from .base import Part


def section(facts: Facts) -> Section | None:
    if facts.verify is None:
        return None
    findings = facts.verify["findings"]
    verdict = Words("Every check holds.", "good")
    if not facts.verify["holds"]:
        verdict = Words(f"{len(findings)} checks do not hold.", "bad")
    rows = [[words.CHECKS.get(check, check), f"{n:,}"] for check, n in facts.verify["compared"].items()]
    blocks: list[Block] = [verdict, Table((), rows)]
    if notes := facts.verify.get("notes"):
        blocks.append(Items(notes))
    if findings:
        blocks.append(Items([f"{f['check']}: {f['where']} {f['what']}" for f in findings]))
    aside = [
        "The export was opened again with a reader that is not moesaic's and compared with the source and the plan."
    ]
    return Section("What was checked", aside, blocks)


PART = Part(name="checks", place=150, section=section)
