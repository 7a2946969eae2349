"""What was done, and with which command."""

from .. import words
from ..blocks import Block, Code, Items, Section
from ..facts import Facts
from .base import Part


def section(facts: Facts) -> Section | None:
    command, taken = facts.source.get("command"), steps(facts)
    blocks: list[Block] = [Code(command)] if command else []
    blocks += [Items(taken, plain=True)] if taken else []
    if not blocks:
        return None
    return Section("What was done", ["The same command on the same files makes the same model again."], blocks)


def steps(facts: Facts) -> list[str]:
    """A sentence for each step that was taken."""
    found = []
    if facts.selection is not None:
        s, kept = facts.selection, int(facts.kept_LE.sum(1).max())
        seen = (
            f"Calibrated on {s['calibration_tokens']:,} tokens" if s["calibration_tokens"] else "Read the weights alone"
        )
        best = f"the {kept} best of {facts.experts} experts in each of {len(s['kept'])} layers"
        found.append(f"{seen}; kept {best}, by {words.term(s['criterion'])}.")
    if facts.candidates is not None:
        c = facts.candidates
        budget = f"{words.decimal(c['budget_bytes'])} ({words.binary(c['budget_bytes'])})"
        several = f"the {len(c['candidates'])} most promising plans were measured on {c['tokens']:,} unseen tokens"
        found.append(f"Priced every choice in nats and solved for a budget of {budget}; {several}, and the best ships.")
    if facts.plan is not None and "repaired" in facts.plan.overlays and facts.selection is not None:
        change = facts.selection["repair"]["change_nats"]
        found.append(
            f"Fitted the shared experts of {len(facts.plan.overlays['repaired'])} layers to what the dropped ones had added: "
            f"{change['value']:+.4f} ± {change['error']:.4f} nats of KL on text not fitted on."
        )
    if facts.plan is not None:
        formats = ", ".join(sorted(f.upper() for f in set(facts.plan.formats.values()) - {"source"}))
        rounded = f"Wrote {formats} by {words.term(facts.plan.rounding)}" if formats else "Rounded nothing"
        container = f"The container is {words.term(facts.plan.container)}."
        found.append(f"{rounded}; all other bytes are the source's own. {container}")
    if facts.verify is not None:
        looked_at = sum(facts.verify["compared"].values())
        found.append(f"Reopened the export and made {looked_at:,} comparisons with the plan and the source.")
    if facts.scores is not None:
        read = sum(r["tokens_read"] for r in facts.scores.facts["readings"])
        found += [f"Read {read:,} tokens with both models, in one sweep of the layers of each."] if read else []
    return found


PART = Part(name="done", place=10, section=section)
