"""One sweep forward that leaves the hidden states before each layer on disk, and one backward that reads them again.

What a layer's listener adds up becomes that layer's file. Interrupted, the same call goes on at the layer it had
reached. Leaves out what is added up: see surrogate and trace.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..artifact import read_tensors, sweep_partials, write_tensors
from ..checkpoint import Checkpoint
from ..plan import SOURCE
from ..progress import progress
from ..stream import LayerRun, State
from ..stream.backward import Listener, drawn, retreat, tail
from ..tokens import TokenSet

KIND = "slopes"
PASSES = 7  # a layer's work besides formats: forward, again, slopes before and behind, experts that tokens would go to

# Of a layer: who listens while it is run backward, and what has then been found, by name.
Hearing = Callable[[int], tuple[Listener, Callable[[], Mapping[str, Tensor]]]]


def reverse_work(checkpoint: Checkpoint, offered: Mapping[str, Sequence[str]]) -> float:
    """Layers that a token goes through, forward and backward and once for each format, if all were forward passes."""
    formats = {format for of in offered.values() for format in of if format != SOURCE}
    return checkpoint.architecture.layers * (PASSES + len(formats))


def reverse(
    run: LayerRun, tokens: TokenSet, folder: Path, inputs: Mapping[str, str], hearing: Hearing, *,
    from_text: bool = False, seed: int = 0, quiet: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """What `hearing` found in all layers, from the last to the first.

    from_text  labels are the text's own next tokens; else drawn from the model, by `seed`

    Takes 4 · T · D bytes of disk for each layer, gone at the end, and reads the weights twice.
    """
    layers = run.architecture.layers
    sweep_partials(folder)
    if not all((folder / f"{layer:03d}.safetensors").exists() for layer in range(layers)):
        begun = folder / "slope.safetensors"
        if not quiet:
            disk = 4 * layers * tokens.tokens * run.architecture.hidden
            print(f"slopes: {tokens.tokens:,} tokens, {disk / 1e9:,.2f} GB of hidden states on disk", file=sys.stderr)
        if not begun.exists():
            last_BTD = forward(run, tokens, folder, inputs, quiet)
            labels_BS = tokens.ids_BT[:, 1:] if from_text else drawn(run, last_BTD, seed)
            keep(begun, tail(run, last_BTD, labels_BS), inputs, layers)
        tensors, body = read_tensors(begun, KIND, inputs)
        at, slope_BTD = int(body["layer"]), tensors["at_BTD"].to(run.device)
        with progress("backward", at * tokens.tokens, "token-layers", quiet) as meter:
            for layer in reversed(range(at)):
                hidden_BTD = read_tensors(before(folder, layer), KIND, inputs)[0]["at_BTD"].to(run.device)
                listener, found = hearing(layer)
                slope_BTD = retreat(run, layer, hidden_BTD, slope_BTD, listener)
                write_tensors(folder / f"{layer:03d}.safetensors", KIND, found(), inputs)
                keep(begun, slope_BTD, inputs, layer)
                meter.advance(tokens.tokens)
    for state in (*(before(folder, layer) for layer in range(layers)), folder / "slope.safetensors"):
        state.unlink(missing_ok=True)
    files = [read_tensors(folder / f"{layer:03d}.safetensors", KIND, inputs)[0] for layer in range(layers)]
    return {name: tensor for found in files for name, tensor in found.items()}


def forward(run: LayerRun, tokens: TokenSet, folder: Path, inputs: Mapping[str, str], quiet: bool) -> Tensor:
    """Hidden states after the last layer; those before each layer are left in `folder`."""
    layers = run.architecture.layers
    done = [layer for layer in range(layers) if before(folder, layer).exists()]
    start = max(done, default=0)
    if done:
        state = State(read_tensors(before(folder, start), KIND, inputs)[0]["at_BTD"].to(run.device))
    else:
        state = State(run.embed(tokens.ids_BT))
    with progress("forward", (layers - start) * tokens.tokens, "token-layers", quiet) as meter:
        for layer in range(start, layers):
            keep(before(folder, layer), state.hidden_BTD, inputs, layer)
            (state,) = run.advance(layer, [state])
            meter.advance(tokens.tokens)
    return state.hidden_BTD


def before(folder: Path, layer: int) -> Path:
    return folder / f"before-{layer:03d}.safetensors"


def keep(file: Path, at_BTD: Tensor, inputs: Mapping[str, str], layer: int) -> None:
    write_tensors(file, KIND, {"at_BTD": at_BTD.cpu()}, inputs, {"layer": layer})
