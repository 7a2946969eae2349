"""One format for one class of matrices: as fast as the disk, or, where the rounding looks at data, rendered on text.

Router, embeddings, norms, head and vision stay as they are: no tool that rounded a router was right.
"""

from pathlib import Path
from typing import Any

from .artifact import write_json
from .checkpoint import Checkpoint
from .containers import CONTAINERS
from .corpus import PYTHON_TEXT, Corpus
from .errors import InputError
from .export import check_free
from .fit import Layout, check_layout
from .formats import FORMATS
from .make import expert_errors, make, rendered, rounding_on
from .plan import SOURCE, Plan
from .rounding import ROUNDINGS
from .target import Target
from .tokens import TokenSet
from .verify import verify

SCOPES = {"experts": ("experts",), "linears": ("experts", "shared", "dense", "qkv", "o")}


def quantize(
    model: Path, out: Path, format: str, only: str = "experts", rest: str = SOURCE,
    to: str = "compressed_tensors", rounding: str = "rtn", layout: Layout | None = None, check: bool = True, quiet: bool = False,
    command: str = "", corpus: Corpus = PYTHON_TEXT,
) -> dict[str, Any]:  # fmt: skip
    """Write to `out` the model whose `only` matrices are in `format`; returns JSON-able facts.

    only    "experts" (routed experts) or "linears" (attention, shared and dense too)
    rest    "source": the others keep their bytes; "bf16" or another format: they are written in that
    layout  how it will be served, if that is known: what an engine would not load so is refused
    corpus  text for a rounding that looks at data; "search" does where the text is the user's
    Raises `InputError` before the first byte for what cannot be, `CheckError` when the result does not verify.
    """
    for what, name, there_are in (
        ("format", format, FORMATS), ("scope", only, SCOPES), ("format for the rest", rest, (SOURCE, *FORMATS)),
        ("container", to, CONTAINERS), ("rounding", rounding, ROUNDINGS),
    ):  # fmt: skip
        if name not in there_are:
            raise InputError(f"no {what} {name!r}; there are {', '.join(there_are)}")
    source = Checkpoint.open(model)
    check_free(out, source)
    plan = Plan(to, formats=formats_of(source, format, only, rest), rounding=rounding_on(rounding, corpus))
    if layout is not None:
        check_layout(Target.of(source, plan), layout)
    source.check_values()

    def text() -> TokenSet:
        return corpus.calibration(source, out / "moesaic" / "tokens.safetensors")

    plan, told = rendered(source, plan, out, out / "moesaic", text, quiet)
    result = make(source, plan, out, out / "moesaic", quiet)
    facts: dict[str, Any] = {
        "command": command,
        "model": str(model),
        "out": str(out),
        "format": format,
        "only": only,
        "rest": rest,
        "container": to,
        "rounding": plan.rounding,
        "rendered": told,
        "source_bytes": sum(t.bytes for t in source.inventory),
        "bytes": sum(t.bytes for t in result.inventory),
    }
    if check:
        verdict = verify(out, source, quiet)
        facts["verified"] = dict(verdict.compared)
        facts["expert_errors"] = expert_errors(result, verdict)
        verdict.require(out, "remove it and quantize again")
    write_json(out / "moesaic" / "quantize.json", "quantize", facts, {"source": source.identity})
    return facts


def formats_of(source: Checkpoint, format: str, only: str, rest: str) -> dict[str, str]:
    """A format for every unit of a model: `format` inside the scope, `rest` outside it."""
    roles = {unit: members[0].role for unit, members in source.architecture.units.items()}
    return {unit: format if role in SCOPES[only] else rest for unit, role in roles.items()}
