"""One sweep forward that leaves the hidden states before each layer on disk, and one backward that reads them again.

What a layer's listener adds up becomes that layer's file. Interrupted, the same call goes on at the layer it had
reached. Leaves out what is added up: see surrogate and trace.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..artifact import read_tensors, sweep_partials, write_tensors
from ..checkpoint import Checkpoint
from ..progress import progress
from ..stream import STATES, LayerRun, Standing, State, Sweep
from ..stream.backward import Listener, drawn, retreat, tail
from ..stream.state import ignore
from ..stream.sweep import EACH_LAYER, load, save
from .branch import Trial
from .prices import Options

KIND = "slopes"
TEXT, SLOPE = "text", "slope"  # the states of either direction
PASSES = 7  # a layer's work besides formats: forward, again, slopes before and behind, experts that tokens would go to

# Of a layer: who listens while it is run backward, and what has then been found, by name.
Hearing = Callable[[int], tuple[Listener, Callable[[], Mapping[str, Tensor]]]]


def reverse_work(checkpoint: Checkpoint, options: Options) -> float:
    """Layers that a token goes through, forward and backward and once for each format, if all were forward passes."""
    return checkpoint.architecture.layers * (PASSES + len({format for _, format in options.rounded}))


def reverse(
    run: LayerRun, trial: Trial, folder: Path, inputs: Mapping[str, str], hearing: Hearing, seed: int | None
) -> dict[str, Tensor]:
    """What `hearing` found in all layers, from the last to the first.

    seed   of labels drawn from the model; None: they are the text's own next tokens

    Takes 4 · T · D bytes of disk for each layer, gone at the end, and reads the weights twice.
    """
    layers, slopes, tokens = run.architecture.layers, folder / STATES, trial.tokens
    sweep_partials(folder)
    if not all(product(folder, layer).exists() for layer in range(layers)):
        if not trial.quiet:
            disk = 4 * layers * tokens.tokens * run.architecture.hidden
            print(f"slopes: {tokens.tokens:,} tokens, {disk / 1e9:,.2f} GB of hidden states on disk", file=sys.stderr)
        if not slopes.exists():
            last_BTD = forward(run, trial, folder, inputs)
            labels_BS = tokens.ids_BT[:, 1:] if seed is None else drawn(run, last_BTD, seed)
            save(slopes, Standing({SLOPE: State(tail(run, last_BTD, labels_BS))}), inputs)
            del last_BTD
        under_way = Sweep(range(layers)[::-1], slopes, inputs, run.device, EACH_LAYER)
        with progress("backward", (layers - under_way.done) * tokens.tokens, "token-layers", trial.quiet) as meter:
            step = partial(backward, run, hearing, folder, inputs)
            begin = partial(load, slopes, inputs, run.device)
            under_way.through(begin, step, ignore, lambda _: meter.advance(tokens.tokens))
    for states in (*(before(folder, layer) for layer in range(layers)), slopes):
        states.unlink(missing_ok=True)
    files = [read_tensors(product(folder, layer), KIND, inputs)[0] for layer in range(layers)]
    return {name: tensor for found in files for name, tensor in found.items()}


def forward(run: LayerRun, trial: Trial, folder: Path, inputs: Mapping[str, str]) -> Tensor:
    """Hidden states after the last layer; those before each layer are left in `folder`."""
    layers, tokens = run.architecture.layers, trial.tokens
    start = max((layer for layer in range(layers) if before(folder, layer).exists()), default=0)

    def begin() -> Standing:
        if before(folder, start).exists():
            return load(before(folder, start), inputs, run.device)
        return Standing({TEXT: State(run.embed(tokens.ids_BT))})

    with progress("forward", (layers - start) * tokens.tokens, "token-layers", trial.quiet) as meter:
        return Sweep(range(layers), None, inputs, run.device).through(
            begin, partial(onward, run, folder, inputs), lambda at: at.states[TEXT].hidden_BTD,
            lambda _: meter.advance(tokens.tokens),
        )  # fmt: skip


def onward(run: LayerRun, folder: Path, inputs: Mapping[str, str], layer: int, at: Standing) -> Standing:
    """One layer forward, and the states before it into a file of their own."""
    save(before(folder, layer), at, inputs)
    (after,) = run.advance(layer, [at.states[TEXT]])
    return replace(at, states={TEXT: after})


def backward(
    run: LayerRun, hearing: Hearing, folder: Path, inputs: Mapping[str, str], layer: int, at: Standing
) -> Standing:
    """One layer backward, from the states before it in their file; what is heard goes into the layer's file."""
    hidden_BTD = load(before(folder, layer), inputs, run.device).states[TEXT].hidden_BTD
    listener, found = hearing(layer)
    slope_BTD = retreat(run, layer, hidden_BTD, at.states[SLOPE].hidden_BTD, listener)
    write_tensors(product(folder, layer), KIND, found(), inputs)
    return replace(at, states={SLOPE: State(slope_BTD)})


def before(folder: Path, layer: int) -> Path:
    return folder / f"before-{layer:03d}.safetensors"


def product(folder: Path, layer: int) -> Path:
    return folder / f"{layer:03d}.safetensors"
