"""Run by a Python that has mlx-lm: the logits that it computes for model folders, in F32, or its error.

    python mlx_side.py TOKENS.json OUT FOLDER …

OUT/FOLDER's name.safetensors has "whole", logits of every position in one pass, and "cached", those of the last
STEPS positions decoded one by one behind a cache. Says a JSON object for each folder on standard output. One process
serves all of them: importing is the slow part. Leaves out everything of ours.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

STEPS = 6


def logits(folder: Path, tokens: list[list[int]]) -> dict[str, mx.array]:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)  # MLX's CPU has kernels for experts in no other
    ids = mx.array(tokens)
    found, cache = model(ids), make_prompt_cache(model)
    model(ids[:, :-STEPS], cache=cache)
    steps = [model(ids[:, at : at + 1], cache=cache) for at in range(ids.shape[1] - STEPS, ids.shape[1])]
    return {"whole": found, "cached": mx.concatenate(steps, axis=1)}


if __name__ == "__main__":
    asked, out, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        try:
            mx.save_safetensors(str(out / f"{folder.name}.safetensors"), logits(folder, json.loads(asked.read_text())))
            print(json.dumps({"folder": folder.name}), flush=True)
        except Exception as error:  # whatever it is, the other side judges it
            print(json.dumps({"folder": folder.name, "error": f"{type(error).__name__}: {error}"[:2000]}), flush=True)
