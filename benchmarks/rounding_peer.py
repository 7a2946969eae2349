"""llm-compressor's GPTQ on the data of benchmarks/rounding.py, by its own functions and defaults: prints one JSON line.

    PYTHON benchmarks/rounding_peer.py DATA.safetensors int4_g128|nvfp4|mxfp4

Runs in an environment of its own, which has llm-compressor and not moesaic. Its default is an activation order
with static groups and damping 0.01; scales come from its minmax observer. Leaves out its modifiers and hooks.
"""

import json
import resource
import sys
import time

import torch
from compressed_tensors.quantization import ActivationOrdering, preset_name_to_scheme
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer
from safetensors.torch import load_file
from torch import Tensor

PRESETS = {"int4_g128": "W4A16", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}


def output_error(w: Tensor, value: Tensor, x: Tensor) -> float:
    return float(((w - value) @ x.T).square().sum() / (w @ x.T).square().sum())


def main() -> None:
    torch.set_num_threads(1)
    found = load_file(sys.argv[1])
    w, x, heldout = found["w"], found["x"], found["heldout"]
    args = preset_name_to_scheme(PRESETS[sys.argv[2]], ["Linear"]).weights
    args.actorder = ActivationOrdering.STATIC
    started = time.process_time()
    hessian = 2 * x.T @ x / len(x)
    hessian_seconds = time.process_time() - started
    started = time.process_time()
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = w.clone()
    observer = Observer.load_from_registry(
        args.observer or "memoryless_minmax", base_name="weight", args=args, module=module
    )
    observer(module.weight)
    params = observer.get_qparams()
    global_scale = params.get("global_scale")
    value, _, fell_back = quantize_weight(
        w[None].clone(), hessian[None].clone(), params["scale"][None], params["zero_point"][None],
        None if global_scale is None else global_scale.reshape(1), args,
    )  # fmt: skip
    seconds = time.process_time() - started
    assert not fell_back.any()
    print(
        json.dumps(
            {
                "hessian_cpu_s": hessian_seconds,
                "solve_cpu_s": seconds,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
                "calibration_error": output_error(w, value[0], x),
                "heldout_error": output_error(w, value[0], heldout),
                "weight_error": output_error(w, value[0], torch.eye(w.shape[1])),
            }
        )
    )


if __name__ == "__main__":
    main()
