"""The model card: README.md of an export, for whoever finds it on the Hub.

Front matter as huggingface_hub checks it, the licence carried over from the source, every figure with its error,
commands that serve it, and what is not known. Leaves out putting it there (push.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    metadata_load,
)  # fmt: skip
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..artifact import atomic
from ..checkpoint import Checkpoint
from ..errors import InputError, MoesaicError
from ..fit import Machine, fit
from ..serve import vllm
from . import words
from .facts import Facts
from .page import title
from .sections import done, limits

HERE = Path(__file__).parent
LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
SHOWN = (
    "kl_mean", "kl_median", "kl_p99", "ppl_source", "ppl_export", "delta_ln_ppl", "top1_agreement", "router_agreement",
)  # fmt: skip
INDEXED = {"kl_mean": "kl_divergence", "ppl_export": "perplexity", "top1_agreement": "top1_agreement"}
BENCHMARKS = {
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "gpqa_diamond")
}  # harness's task -> data set, task on the Hub
SPECIAL = re.compile(r"[\\`*<\[\]|]")  # what begins code, emphasis, HTML, a link or a table's cell, or takes that away
COUNTS, CARD = (1, 2, 4, 8, 16), "H200"  # tried in turn where no devices are named


@dataclass(frozen=True)
class Naming:
    """What a card says that no file of the run does.

    base_model  the source's name on the Hub; "" where its folder is the Hub's own cache
    repository  where the export will be found; "" for its folder's name
    unlicensed  write a card although the source came without a licence file
    """

    base_model: str = ""
    repository: str = ""
    unlicensed: bool = False


def write_card(facts: Facts, naming: Naming) -> Path:
    """Write README.md into the export; returns its path. Raises as `card`."""
    text = card(facts, naming)
    assert facts.model is not None
    out = facts.model / "README.md"
    with atomic(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return out


def card(facts: Facts, naming: Naming) -> str:
    """The card as Markdown with its front matter. Raises `InputError` for a run without an export, a source without a
    name on the Hub, and a licence that is missing."""
    if facts.model is None or facts.after is None:
        raise InputError(f"{facts.run} holds no export to write a card for; make one first")
    base, licences = base_model(facts, naming), licence_files(facts.model)
    if all(name.upper().startswith("NOTICE") for name in licences) and not naming.unlicensed:
        raise InputError(
            f"{facts.model} holds no licence file, since its source came without one; put the model's LICENSE there, or say "
            "--unlicensed if you may pass it on without"
        )
    name = naming.repository or title(facts)
    body = (
        environment()
        .get_template("card.md")
        .render(
            name=name.rsplit("/", 1)[-1],
            base=base,
            licences=licences,
            facts=facts,
            rows=sizes(facts),
            scores=scores(facts),
            reading=reading(facts),
            steps=done.steps(facts),
            engines=engines(facts, name),
            limits=limits.limits(facts) + transformers_limits(facts),
            missing=limits.missing(facts),
            verified=facts.verify is not None and facts.verify["holds"],
            version=__version__,
        )
    )
    data = front_matter(facts, base, name.rsplit("/", 1)[-1], licences)
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    ModelCard(text)  # read back by the Hub's own client: front matter that it would not take is our bug
    return text


def environment() -> Environment:
    """card.md's: whatever stands between double braces is plain text to Markdown, unless a filter made it code."""
    found = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=plain
    )
    found.filters |= {"code": code, "block": block}
    return found


def plain(value: object) -> str:
    """Text in which nothing means anything to Markdown or HTML, on one line."""
    if isinstance(value, Markup):
        return str(value)
    return SPECIAL.sub(r"\\\g<0>", " ".join(str(value).split()))


def code(text: object) -> Markup:
    """A code span; the text may hold backticks (CommonMark 0.31, 6.1)."""
    one_line = " ".join(str(text).split())
    ticks, pad = fence(one_line, 1), " " if "`" in one_line else ""
    return Markup(f"{ticks}{pad}{one_line.replace('|', chr(92) + '|')}{pad}{ticks}")


def block(text: object) -> Markup:
    """A fenced code block; the text may hold fences (CommonMark 0.31, 4.5)."""
    ticks = fence(str(text), 3)
    return Markup(f"{ticks}\n{text}\n{ticks}")


def fence(text: str, least: int) -> str:
    """Backticks in a row, more of them than in any row of `text`."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def base_model(facts: Facts, naming: Naming) -> str:
    path = Path(facts.source["model"]).resolve()
    cached = next((part for part in path.parts if part.startswith("models--")), "")
    found = naming.base_model or "/".join(cached.split("--")[1:])
    if found.count("/") != 1 or not all(found.split("/")):
        raise InputError(f"the Hub's name of {path} is not known; say --base-model ORGANISATION/NAME")
    return found


def licence_files(folder: Path) -> list[str]:
    """Names of the licence files in a folder, the licence itself first."""
    found = [f.name for f in folder.iterdir() if f.is_file() and f.stem.upper().split("-")[0] in LICENCES]
    return sorted(found, key=lambda name: (name.upper().startswith("NOTICE"), name))


def front_matter(facts: Facts, base: str, name: str, licences: list[str]) -> ModelCardData:
    readme = Path(facts.source["model"]) / "README.md"
    told: Mapping[str, Any] = (metadata_load(readme) or {}) if readme.exists() else {}
    carried = {key: told[key] for key in CARRIED if told.get(key)}
    if licences and not carried.get("license"):
        carried["license"] = "other"
    if carried.get("license") == "other" and licences:
        link = str(carried.get("license_link", ""))
        carried["license_link"] = link if link.startswith("https://") else licences[0]
        carried.setdefault("license_name", f"{base.split('/')[1].lower()}-license")
    assert facts.after is not None
    container = facts.after["container"]
    formats = sorted(set(facts.plan.formats.values()) - {"source"}) if facts.plan else []
    tags = ["moesaic", "moe", container.replace("_", "-"), *formats]
    tags += ["expert-pruning"] if not facts.kept_LE.all() else []
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized",
        library_name="mlx" if container == "mlx" else "transformers",
        tags=tags,
        model_name=name,
        eval_results=results(facts) or None,
        **({"pipeline_tag": "text-generation"} | carried),
    )


def results(facts: Facts) -> list[EvalResult]:
    """What the model's page lists: KL, perplexity and agreement on the first text, which is no benchmark of the Hub."""
    text = first_text(facts)
    if facts.scores is None or text is None:
        return []
    domains = ", ".join(text["facts"].get("rows_by_domain", {})) or text["name"]
    name = f"{domains} ({text['tokens_read']:,} tokens)"
    found = {metric: facts.scores.find(name) for name, metric in INDEXED.items()}
    return [
        EvalResult(
            "text-generation", "text", name, metric, score.value, metric_name=words.name(score.name),
        )
        for metric, score in found.items()
        if score is not None and score.value is not None
    ]  # fmt: skip


def first_text(facts: Facts) -> dict[str, Any] | None:
    readings = facts.scores.facts["readings"] if facts.scores is not None else []
    return next((reading for reading in readings if reading["kind"] == "text"), None)


def sizes(facts: Facts) -> list[tuple[str, str, str]]:
    """What it was, and what it is."""
    assert facts.after is not None
    was, now = facts.source["bytes"], facts.after
    before = facts.before or {}
    kept = int(facts.kept_LE.sum(1).max()) if facts.kept_LE.size else facts.experts
    bits = [8 * n["bytes"] / n["parameters"] if n else 0 for n in (before, now)]
    disk = [f"{words.decimal(count)} ({words.binary(count)})" for count in (was, now["bytes"])]
    return [
        ("on disk", disk[0], disk[1]),
        ("experts a layer", f"{facts.experts}", f"{kept}"),
        ("routed experts", words.one_format(facts.before, "experts"), words.one_format(facts.after, "experts")),
        ("attention", words.one_format(facts.before, "qkv"), words.one_format(facts.after, "qkv")),
        ("stored bits a weight", f"{bits[0]:.2f}" if before else "", f"{bits[1]:.2f}"),
    ]  # fmt: skip


def scores(facts: Facts) -> list[tuple[str, str, str]]:
    if facts.scores is None:
        return []
    found = {name: words.figure(facts.scores.find(name)) for name in SHOWN if facts.scores.find(name) is not None}
    return [
        (words.name(name), f"{shown['value']} {shown['error']} {shown['unit']}".strip(), shown["interval"])
        for name, shown in found.items()
    ]


def reading(facts: Facts) -> dict[str, str]:
    text = first_text(facts)
    if text is None:
        return {}
    domains = ", ".join(text["facts"].get("rows_by_domain", {})) or text["name"]
    way = next(iter(facts.ways.values()))
    return {"tokens": f"{text['tokens_read']:,}", "rows": f"{text['rows']:,}", "domains": domains, "activations": way}


def engines(facts: Facts, name: str) -> list[dict[str, str]]:
    """Ways to serve the export: a title, a sentence, a command."""
    assert facts.model is not None and facts.after is not None
    if facts.after["container"] == "mlx":
        command = f"pip install mlx-lm\nmlx_lm.server --model {name}"
        return [{"title": "MLX", "says": "On a Mac that has the memory.", "command": command}]
    export = Checkpoint.open(facts.model)
    memory = facts.memory or smallest(export)
    if memory is None:
        return []
    what = vllm.deployment(export, memory)
    short = name.rsplit("/", 1)[-1]
    what = replace(what, model=Path(name), name=short, flags={**what.flags, "--served-model-name": short})
    says = f"With vLLM {vllm.base.VERSION} on {memory['machine']['name']}, for which these limits were computed."
    return [{"title": "vLLM", "says": says, "command": vllm.render(what, "command").rstrip()}]


def smallest(export: Checkpoint) -> Mapping[str, Any] | None:
    """`fit` on the fewest of a common card that hold the export; None where none of the counts tried does."""
    for count in COUNTS:
        try:
            found = fit(export, Machine.parse(f"{count}x{CARD}"))
        except MoesaicError:
            continue  # no engine starts it on so many
        if found["verdict"] != "does not fit":
            return found
    return None


def transformers_limits(facts: Facts) -> list[str]:
    """Where transformers is known not to read what vLLM reads (tests/test_transformers_loads.py)."""
    assert facts.after is not None
    held = set(facts.after["formats"].get("experts", {}))
    if facts.after["container"] != "compressed_tensors":
        return []
    if "nvfp4" in held:
        return [
            "Do not load this with transformers 5.23: it leaves out the second scale of NVFP4 experts without a word."
        ]
    return ["Made for vLLM. transformers 5.23 refuses some mixtures of formats that vLLM serves."]


def eval_results(facts: Facts) -> dict[str, str]:
    """Files of `.eval_results/` by name: tasks that are benchmarks of the Hub, asked as the harness itself words them.

    The format is https://huggingface.co/docs/hub/eval-results; results of other tasks have no place there.
    """
    tasks = facts.scores.facts.get("tasks", {}) if facts.scores is not None else {}
    if facts.scores is None or tasks.get("folder", "") is not None:  # task files of one's own may bear any name
        return {}
    found = {}
    for task, (dataset, task_id) in BENCHMARKS.items():
        score = facts.scores.find("task_acc_export", reading=task)
        if score is not None and score.value is not None:
            notes = f"{score.rows:,} items by log-likelihood, {tasks['harness']}, streamed by moesaic {__version__}"
            entry = EvalResultEntry(dataset, task_id, round(score.value, 4), notes=notes)
            found[f".eval_results/{task}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return found
