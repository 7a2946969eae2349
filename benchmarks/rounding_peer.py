"""Other people's GPTQ on the data of benchmarks/rounding.py, by their own functions and defaults: prints one JSON line.

    PYTHON benchmarks/rounding_peer.py DATA.safetensors int4_g128|nvfp4|mxfp4 llm-compressor|gptqmodel

Runs in an environment of its own, which has that peer and not moesaic. llm-compressor's default is an activation
order with static groups and damping 0.01, scales by its minmax observer; GPTQModel's are its QuantizeConfig's, and
it has integers only. Leaves out their modifiers, hooks and loopers.
"""

import importlib
import json
import resource
import sys
import time

import torch
from safetensors.torch import load_file
from torch import Tensor

PRESETS = {"int4_g128": "W4A16", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}


def output_error(w: Tensor, value: Tensor, x: Tensor) -> float:
    return float(((w - value) @ x.T).square().sum() / (w @ x.T).square().sum())


def linear(w: Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = w.clone()
    return module


def llm_compressor(w: Tensor, x: Tensor, format: str) -> tuple[Tensor, float, float]:
    """Values, and CPU-seconds of the Hessian and of all the rest."""
    quantization = importlib.import_module("compressed_tensors.quantization")
    gptq = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    observers = importlib.import_module("llmcompressor.observers")
    args = quantization.preset_name_to_scheme(PRESETS[format], ["Linear"]).weights
    args.actorder = quantization.ActivationOrdering.STATIC
    started = time.process_time()
    hessian = 2 * x.T @ x / len(x)
    hessian_seconds = time.process_time() - started
    started = time.process_time()
    module = linear(w)
    name = args.observer or "memoryless_minmax"
    observer = observers.Observer.load_from_registry(name, base_name="weight", args=args, module=module)
    observer(module.weight)
    params = observer.get_qparams()
    shared = params.get("global_scale")
    value, _, fell_back = gptq.quantize_weight(
        w[None].clone(), hessian[None].clone(), params["scale"][None], params["zero_point"][None],
        None if shared is None else shared.reshape(1), args,
    )  # fmt: skip
    assert not fell_back.any()
    return value[0], hessian_seconds, time.process_time() - started


def gptqmodel(w: Tensor, x: Tensor, format: str) -> tuple[Tensor, float, float]:
    """Values, and CPU-seconds of the Hessian and of all the rest."""
    config = importlib.import_module("gptqmodel.quantization").QuantizeConfig(bits=4, group_size=128)
    task = importlib.import_module("gptqmodel.quantization.gptq").GPTQ(linear(w), config)
    task.quantizer.configure(perchannel=True)
    started = time.process_time()
    task.add_batch(x[None], x[None])
    task.finalize_hessian()
    hessian_seconds = time.process_time() - started
    started = time.process_time()
    value = task.quantize()[0]
    return value.float(), hessian_seconds, time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    path, format, peer = sys.argv[1:]
    found = load_file(path)
    w, x, heldout = found["w"], found["x"], found["heldout"]
    value, hessian_seconds, seconds = {"llm-compressor": llm_compressor, "gptqmodel": gptqmodel}[peer](w, x, format)
    print(
        json.dumps(
            {
                "hessian_cpu_s": hessian_seconds,
                "solve_cpu_s": seconds,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
                "calibration_error": output_error(w, value, x),
                "heldout_error": output_error(w, value, heldout),
                "weight_error": output_error(w, value, torch.eye(w.shape[1])),
            }
        )
    )


if __name__ == "__main__":
    main()
