"""moesaic from Python: open a checkpoint, and do with it what the command line does, by the same functions.

    import moesaic

    model = moesaic.open("MiniMax-M3-MXFP8", progress=print)
    model.compress("run", moesaic.Recipe(devices="2x95GiB"), moesaic.Corpus(data=Path("texts")))

Nothing is printed. A call that is interrupted, by Ctrl-C or by an exception from `progress`, continues when it is made
again. Every error raised on purpose is a `MoesaicError` (errors.py) of one sentence. Leaves out the single stages
(calibrate, measure, allocate, export), which the rooms of their names have, and servers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .allocate import Limit, Offer, Pricing
from .calibrate.selection import Ranking
from .checkpoint import Checkpoint
from .checkpoint.inspect import inspect
from .data.corpus import PYTHON_TEXT, Corpus
from .errors import CheckError, InputError, MoesaicError
from .evaluate import Score, Scores
from .fit import Machine, fit
from .progress import Listener, Step, heard
from .recipes import compress, evaluate, prune, quantize
from .recipes.compress import Recipe
from .recipes.evaluate import Evaluating
from .recipes.machine import Use, held_bytes
from .recipes.prune import Pruning
from .recipes.quantize import Quantizing
from .resources import Resources

__all__ = [
    "CheckError", "Corpus", "Evaluating", "InputError", "Limit", "Model", "MoesaicError", "Offer", "Pricing", "Pruning",
    "Quantizing", "Ranking", "Recipe", "Score", "Scores", "Step", "open",
]  # fmt: skip

BY_TEXT = Evaluating()


@dataclass(frozen=True)
class Model:
    """A checkpoint: a source, or what moesaic made of one. Made by `open`.

    checkpoint  as its headers describe it: `checkpoint.architecture` has layers, experts, widths and shapes
    resources   that each call may take
    progress    is called with a `Step` when a stage begins and after each step of it
    """

    checkpoint: Checkpoint
    resources: Resources
    progress: Listener | None

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def inspect(self, base: str | Path | None = None) -> dict[str, Any]:
        """What the model holds, from headers alone: the object that `moesaic inspect --json` prints.

        Sizes are in bytes, `parameters` counts weights without their scales, `context` is in tokens. With `base`, also
        `kept`: for each MoE layer, by its number as text, which experts of that model are these.

        Raises `InputError` for a base of another family or another shape.
        """
        return inspect(self.path, None if base is None else Path(base))

    def fit(self, devices: str, context: int | None = None, kv: str = "bf16", concurrency: int = 1) -> dict[str, Any]:
        """What fits on devices that serve the model: what `moesaic fit --json` prints, without the next
        command. Sizes are in bytes.

        devices      a count and a size or a name: "2x95GiB", "4xH100 NVL"
        context      tokens of a request; None: 32,768, or the model's own if that is fewer
        kv           type of the cache: "bf16" or "fp8"
        concurrency  requests at once

        Raises `InputError` for devices that are unknown or a context that the model lacks, `PlanError` when no engine
        would start the model on so many devices.
        """
        return fit(self.checkpoint, Machine.parse(devices), context, kv, concurrency)

    def prune(self, out: str | Path, asked: Pruning, corpus: Corpus = PYTHON_TEXT) -> dict[str, Any]:
        """Write to the folder `out` the model with `asked.experts` experts in every layer; returns facts.

        What stays is copied byte for byte. Among the facts: `kept` (layer -> ids of experts), `bytes` and
        `source_bytes`, `verified` (what was compared -> how many times).

        Raises `InputError` for what cannot be done, before anything is read; `CheckError` when the result is not what
        was planned; `StaleError` where `out` was begun otherwise; `HeldError` while another process writes there.
        """
        asked = replace(asked, memory_bytes=memory(self, asked.memory_bytes))
        out = Path(out)
        with using(self, prune.use(self.path, out, asked.ranking.run, corpus)):
            return prune.prune(self.path, out, asked, corpus, quiet=True)

    def quantize(self, out: str | Path, asked: Quantizing, corpus: Corpus = PYTHON_TEXT) -> dict[str, Any]:
        """Write to the folder `out` the model with its matrices in `asked.format`; returns facts.

        Text is read only where `asked.rounding` needs it. Among the facts: `bytes` and `source_bytes`, `verified`, and
        `expert_errors` (layer -> relative error of each expert's weights, none of which has a unit).

        Raises as `prune` does.
        """
        out = Path(out)
        with using(self, quantize.use(self.path, out, asked.rounding, corpus)):
            return quantize.quantize(self.path, out, asked, corpus, quiet=True)

    def compress(self, run: str | Path, recipe: Recipe, corpus: Corpus = PYTHON_TEXT) -> dict[str, Any]:
        """Make the model smaller by `recipe` in the folder `run`: choose, export, verify, evaluate, report; returns facts.

        The result is run/model, and run/report.html shows what it cost. Among the facts: `bytes` and `source_bytes`,
        `experts`, `scores` (name -> value with its standard error; `kl_mean` is in nats per token), `report`.

        Raises as `prune` does, and `InputError` for a recipe without a goal.
        """
        run, pricing = Path(run), recipe.pricing
        pricing = replace(pricing, memory_bytes=memory(self, pricing.memory_bytes))
        with using(self, compress.use(self.path, run, corpus)):
            return compress.compress(self.path, run, replace(recipe, pricing=pricing), corpus, quiet=True)

    def evaluate(
        self,
        against: str | Path,
        asked: Evaluating = BY_TEXT,
        corpus: Corpus = PYTHON_TEXT,
        out: str | Path | None = None,
    ) -> Scores:
        """Score this model against the source in `against`; every figure stays in the folder `out`.

        out  None: the folder moesaic/ of this model

        `scores.find("kl_mean")` is one `Score`, with its value, its standard error and 95 % interval over rows, in
        `unit`; it is None where that was not measured, and its value is None where no prediction was finite.

        Raises `InputError` for a score that is unknown and for models that cannot be compared.
        """
        source, out = Checkpoint.open(against), self.path / "moesaic" if out is None else Path(out)
        asked = replace(asked, memory_bytes=memory(self, asked.memory_bytes))
        with using(self, evaluate.use(source.path, out, asked.cache, corpus)):
            return evaluate.evaluate_export(source, self.checkpoint, out, asked, corpus, quiet=True)


def open(
    path: str | Path,
    *,
    memory_bytes: int | None = None,
    threads: int | None = None,
    progress: Listener | None = None,
) -> Model:
    """Open a model folder by its headers; no weight is read. A folder with a config.json alone can be inspected and fitted.

    memory_bytes  that calls may take; None: what is available then. Changes what is held at once, never a result
    threads       that products are computed with, part of a result; None: those that its folder was begun with, else
                  torch's own choice
    progress      called with a `Step`, one call at a time; an exception from it ends the call of the model

    Raises `CheckpointError` for files that are missing, torn or foreign, `FamilyError` for a model whose family is not
    supported.
    """
    return Model(Checkpoint.open(path), Resources(memory_bytes, threads), progress)


@contextmanager
def using(model: Model, use: Use) -> Iterator[None]:
    """While a call runs: its progress is told to the caller, and its threads are those of its folder."""
    with heard(model.progress), use.within(model.resources):
        yield


def memory(model: Model, said: int | None) -> int | None:
    """Memory for what may be held more or less of: what the options say, else the model's share."""
    return held_bytes(model.resources.memory_bytes) if said is None else said
