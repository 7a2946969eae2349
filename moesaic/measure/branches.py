"""Branches run beside the source, as many in one pass as fit into memory, and what is found of them at the end.

Each pass leaves its findings in a file of the folder when it is done, and its states while it is under way: the same
call goes on from there, however much memory it is given then. What is found of a branch does not depend on who goes
with it. Leaves out what a branch is (branch.py).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..artifact import identity, read_json, sweep_partials, write_json
from ..checkpoint import Checkpoint
from ..data.tokens import TokenSet
from ..plan import dropped
from ..progress import progress
from ..resources import Resources
from ..rounding import arithmetic
from ..stream import STATE_COPIES, STATES, Change, LayerRun, Standing, State, Sweep
from ..stream.sweep import packed, save
from .branch import Branch, Trial, changes, effort, head_layers
from .kl import kl_to_source

KIND = "branches"
VERSION = 1  # of `measure`; goes up with any change to what it finds of the same branch and text
SOURCE, AWAITED = "source", "awaited"  # the source's own states, and those that the next pass begins with


@dataclass(frozen=True)
class Figures:
    """What is to be found of branches.

    find   source and branches after the last layer [B, T, D], the rows that they read, and who is to be told how many
           logits are done -> JSON-able facts of each branch, which depend on no other branch
    asked  name -> identity of what else they depend on, beside model, rows and rounding
    """

    find: Callable[[LayerRun, Tensor, Sequence[Tensor], TokenSet, Callable[[int], None]], list[dict[str, Any]]]
    asked: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BranchPass:
    """One pass: branches by the identity of what they are, in order of where they leave the source."""

    run: LayerRun
    branches: Mapping[str, Branch]
    way: Mapping[str, Change]  # what `Branch.formats` come to
    tokens: TokenSet

    @property
    def start(self) -> int:
        return next(iter(self.branches.values())).first(self.run.architecture)


def run_branches(
    checkpoint: Checkpoint, branches: Sequence[Branch], trial: Trial, folder: Path, figures: Figures, title: str
) -> list[dict[str, Any]]:
    """What `figures` finds of each branch by running it; `title` is what progress is called."""
    run, way, tokens = LayerRun(checkpoint), changes(branches, trial.rounding), trial.tokens
    inputs = {"source": checkpoint.identity, "tokens": tokens.identity, **figures.asked}
    inputs["rounding"] = arithmetic(trial.rounding, ())["rounding"]  # formats are in the branches' names
    limit = trial.memory_bytes or Resources().held_bytes(run.device)
    names = [branch.identity for branch in branches]
    sweep_partials(folder)
    done = {
        name: row
        for file in sorted(folder.glob("*.json"))
        for name, row in read_json(file, KIND, inputs)["found"].items()
    }
    left = {name: branch for name, branch in zip(names, branches) if name not in done}
    if not left:
        (folder / STATES).unlink(missing_ok=True)
        return [done[name] for name in names]
    foreseen, saved = effort(checkpoint, list(left.values()), tokens.tokens, limit), folder / STATES
    if not trial.quiet:
        print(f"{title}: {foreseen}", file=sys.stderr, flush=True)
    begun = Sweep((), saved, inputs, run.device).saved["notes"]
    with progress(title, foreseen.work, "token-layers", trial.quiet) as meter:
        at, source = 0, [State(run.embed(tokens.ids_BT))]
        for group in passes(run, left, begun.get("names", []), tokens.tokens, limit):
            branch_pass = BranchPass(run, group, way, tokens)
            if begun.get("names") == list(group):
                at = begun["from"]
            else:
                saved.unlink(missing_ok=True)
                if at > branch_pass.start:
                    at, source = 0, [State(run.embed(tokens.ids_BT))]
                elif at:  # so that the source's way here is not gone again
                    save(saved, begin(branch_pass, at, source), inputs)
            under_way = Sweep(range(at, run.architecture.layers), saved, inputs, run.device)
            end = partial(finish, branch_pass, figures, folder / f"{identity(list(group))}.json", inputs, meter.advance)
            told = partial(count, branch_pass, meter.advance)
            found, after = under_way.through(
                partial(begin, branch_pass, at, source), partial(advance, branch_pass), end, told
            )
            at, source, begun = branch_pass.start, [after], {}
            done |= found
        meter.advance(meter.total - meter.done)
    return [done[name] for name in names]


def begin(branch_pass: BranchPass, at: int, source: list[State]) -> Standing:
    """The source before layer `at`, taken out of its list, so that nobody else keeps its memory."""
    return Standing({SOURCE: source.pop()}, {"names": list(branch_pass.branches), "from": at})


def passes(
    run: LayerRun, left: Mapping[str, Branch], names: Sequence[str], tokens: int, memory_bytes: int
) -> list[Mapping[str, Branch]]:
    """What is left to do, first of all the branches `names`, whose states were saved."""
    found: list[Mapping[str, Branch]] = (
        [{name: left[name] for name in names}] if names and set(names) <= set(left) else []
    )
    rest = [name for name in left if not found or name not in found[0]]
    first = [left[name].first(run.architecture) for name in rest]
    for group in packed(first, STATE_COPIES * 4 * tokens * run.architecture.hidden, memory_bytes):
        found.append({rest[i]: left[rest[i]] for i in group})
    return found


def advance(branch_pass: BranchPass, layer: int, at: Standing) -> Standing:
    """One layer of the source and of all branches that have left it; those that leave it here join."""
    run, states = branch_pass.run, dict(at.states)
    if layer == branch_pass.start:
        states[AWAITED] = states[SOURCE]
    for name, branch in branch_pass.branches.items():
        if branch.first(run.architecture) == layer:
            states[name] = state_of(run, branch, states[SOURCE].hidden_BTD, branch_pass.way)
        elif name in states:
            states[name] = replace(states[name], changed=changed(branch, branch_pass.way))
    going = [name for name in states if name != AWAITED]
    after = zip(going, run.advance(layer, [states[name] for name in going]))
    return replace(at, states={**states, **{name: replace(state, changed={}) for name, state in after}})


def state_of(run: LayerRun, branch: Branch, hidden_BTD: Tensor, way: Mapping[str, Change]) -> State:
    """The branch where it leaves the source, whose hidden states those are."""
    return State(hidden_BTD, dropped(branch.kept, run.architecture.experts), changed=changed(branch, way))


def changed(branch: Branch, way: Mapping[str, Change]) -> dict[str, Change]:
    return {unit: way[format] for unit, format in branch.formats.items()}


def count(branch_pass: BranchPass, told: Callable[[int], None], at: Standing) -> None:
    told((len(at.states) - (AWAITED in at.states)) * branch_pass.tokens.tokens)


def finish(
    branch_pass: BranchPass,
    figures: Figures,
    file: Path,
    inputs: Mapping[str, str],
    told: Callable[[int], None],
    at: Standing,
) -> tuple[dict[str, dict[str, Any]], State]:
    """The findings of a pass by branch, which are then in `file`; and the source where its branches began to leave it."""
    run, source = branch_pass.run, at.states[SOURCE]
    each = head_layers(run.architecture) / run.architecture.vocab
    hidden = [at.states.get(name, source).hidden_BTD for name in branch_pass.branches]  # a branch may differ in nothing
    rows = figures.find(run, source.hidden_BTD, hidden, branch_pass.tokens, lambda logits: told(round(logits * each)))
    found = dict(zip(branch_pass.branches, rows, strict=True))
    write_json(file, KIND, {"found": found}, inputs)
    return found, at.states.get(AWAITED, source)


# Harm -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """KL(source ‖ branch) of one branch on some rows."""

    kl_B: np.ndarray  # mean over each row's finite tokens, nats, float64
    nonfinite: int  # tokens that are in no figure

    @property
    def nats(self) -> float:
        """Per token; infinite where a token is not finite, as no plan should be made of such a branch."""
        return float("inf") if self.nonfinite else float(self.kl_B.mean())

    @property
    def error(self) -> float:
        """Standard error over rows; NaN for a single row."""
        return float(self.kl_B.std(ddof=1) / len(self.kl_B) ** 0.5) if len(self.kl_B) > 1 else float("nan")


def measure(
    checkpoint: Checkpoint, branches: Sequence[Branch], trial: Trial, folder: Path, title: str = "measure"
) -> list[Measured]:
    """KL(source ‖ branch) of each branch, in nats, by running it."""
    found = run_branches(checkpoint, branches, trial, folder, Figures(harm, {"harm": f"measured {VERSION}"}), title)
    return [Measured(np.array(row["kl_nats"]), row["nonfinite"]) for row in found]


def harm(
    run: LayerRun, source_BTD: Tensor, branches: Sequence[Tensor], tokens: TokenSet, told: Callable[[int], None]
) -> list[dict[str, Any]]:
    """`Figures.find` of `measure`."""
    return [
        {"kl_nats": kl_BS.nanmean(-1).nan_to_num(0.0).tolist(), "nonfinite": int(kl_BS.isnan().sum())}
        for kl_BS in kl_to_source(run, source_BTD, branches, told)
    ]
