"""An export against its source, from what is asked for to scores: readings of text and of haystacks, one sweep, samples.

Its files stand in one folder, which docs/SCORES.md describes. Leaves out tasks, whose readings ride along and whose
marks are given afterwards (evaluate/tasks), and what a server answers (evaluate/server).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import atomic
from ..checkpoint import Checkpoint
from ..data.corpus import PYTHON_TEXT, Corpus
from ..data.tokens import Tokenizer
from ..errors import InputError
from ..evaluate import EVALUATIONS, Conditions, Reading, Scores, evaluate
from ..evaluate.samples import compare, local
from ..evaluate.scores.kld import llama_text
from ..evaluate.scores.needle import haystacks
from ..evaluate.scores.perplexity import windows
from ..lock import held
from ..resources import THREADS
from .machine import Use

FORMER = {"spots": "samples"}  # names of scores that still work in this version
SAMPLES = "samples"
OF_TEXT = tuple(name for name, of in EVALUATIONS.items() if "text" in of.reads)  # one sweep gives them all
THERE_ARE = (*EVALUATIONS, SAMPLES)
NOTHING: dict[str, Any] = {"readings": [], "layers": [], "activations": {}}  # facts of an evaluation without a sweep
LENGTHS = (1024, 4096, 8192)  # of haystacks; the longer ones are beyond what M3's sparse attention looks at
WINDOW = 2048


@dataclass(frozen=True)
class Evaluating:
    """What is asked for.

    scores        names of `THERE_ARE`; None: those of text
    activations   ways to run the export: "none" (left as computed), "engine" (rounded as its config.json asks), "w4a4"
    text          a file that is read whole, in windows of `window` tokens, each `stride` after the one before (None:
                  the window); None: rows of the corpus
    lengths       of haystacks, in tokens; None: 1024, 4096 and 8192, as far as the model's context goes
    readings      more of them, in the same sweep
    cache         folder that keeps what the source gave: a further export costs its own sweep alone
    memory_bytes  for weights while samples are written; None: half of what is available
    """

    scores: tuple[str, ...] | None = None
    activations: tuple[str, ...] = ("none", "engine")
    text: Path | None = None
    window: int = WINDOW
    stride: int | None = None
    lengths: Sequence[int] | None = None
    readings: tuple[Reading, ...] = ()
    cache: Path | None = None
    memory_bytes: int | None = None


def evaluate_export(
    source: Checkpoint,
    export: Checkpoint,
    out: Path,
    asked: Evaluating,
    corpus: Corpus = PYTHON_TEXT,
    quiet: bool = False,
) -> Scores:
    """Score `export` against `source` and leave every figure in the folder `out`.

    Raises `InputError` for a score that is unknown, for nothing to score, and for models that cannot be compared.
    """
    wanted = chosen(asked.scores, THERE_ARE, OF_TEXT)
    source.check_values()
    export.check_values()
    with held(out):
        readings = [*readings_of(source, asked, wanted, corpus, out), *asked.readings]
        scores = None
        if readings:
            conditions = Conditions(activations=asked.activations, seed=corpus.seed, cache=asked.cache)
            scores = evaluate(source, export, readings, out, conditions, quiet)
        if SAMPLES in wanted:
            writers = {"source": local(source, asked.memory_bytes), "export": local(export, asked.memory_bytes)}
            more, facts = compare(writers, Tokenizer.open(source.path))
            inputs = {"source": source.identity, "export": export.identity}
            scores = (scores or Scores((), NOTHING)).add(more, {"samples": facts}, out / "scores.json", inputs)
        if scores is None:
            raise InputError(f"no score was asked for; choose from {', '.join(THERE_ARE)}")
        if "kld" in wanted:
            with atomic(out / "kld.txt") as partial:
                partial.write_text(llama_text(scores) + "\n", encoding="utf-8")
        return scores


def chosen(scores: Sequence[str] | None, there_are: Sequence[str], default: Sequence[str] = OF_TEXT) -> tuple[str, ...]:
    """The scores that are asked for, by their present names. Raises `InputError` for an unknown one."""
    wanted = tuple(FORMER.get(s, s) for s in (default if scores is None else scores))
    if unknown := sorted(set(wanted) - set(there_are)):
        raise InputError(f"unknown score {unknown[0]!r}; choose from {', '.join(there_are)}")
    return wanted


def readings_of(
    model: Checkpoint, asked: Evaluating, wanted: Sequence[str], corpus: Corpus, out: Path
) -> list[Reading]:
    """The readings of text and of haystacks; rows of the corpus stay in `out`."""
    tokenizer, architecture = Tokenizer.open(model.path), model.architecture
    found: list[Reading] = []
    if set(wanted) & set(OF_TEXT):
        if asked.text:
            stride = asked.stride or asked.window
            found.append(windows(asked.text, tokenizer, vocab=architecture.vocab, window=asked.window, stride=stride))
        else:
            found.append(Reading.of(corpus.evaluation(model, out / "evaluation.safetensors")))
    if "needle" in wanted:
        lengths = asked.lengths or [n for n in LENGTHS if n <= architecture.context]
        found += haystacks(model, lengths, seed=corpus.seed)
    return found


def use(source: Path | None, out: Path, cache: Path | None, corpus: Corpus) -> Use:
    """What of the machine an evaluation takes. An export may be judged on another machine than it was made on."""
    kept_in = (out / f"evaluate-{THREADS}", *([cache / THREADS] if cache else []))
    return Use(kept_in, source, corpus.tokens, states=2)
