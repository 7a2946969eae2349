"""Run by a Python that has vLLM: the divisors of activations that its own loader leaves in its own parameters.

    vllm_divisors.py FOLDER OUT.json

OUT.json gets every parameter of that kind, by vLLM's name. The model is built as the load check, which is found on
the path, builds it: kernels that a CPU lacks are stood in for. Leaves out weights, which that check decodes itself.
"""

import json
import sys

import check_load
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors  # noqa: F401  before it is patched
import vllm_cpu_patch as patches
from vllm.config import set_current_vllm_config


def main(folder: str, out: str) -> None:
    config = check_load.build_config(folder)
    with set_current_vllm_config(config):
        check_load.init_dist(config)
        patches.patch_oracles()
        patches.patch_linear_kernels()
        patches.patch_marlin()
        if "MiniMaxM3" in str(config.model_config.architectures):
            patches.patch_m3()
        model = check_load.build_model(config)
        model.load_weights(check_load.ckpt_tensors(folder))
    divisors = {name: p.tolist() for name, p in model.named_parameters() if name.endswith("input_global_scale")}
    with open(out, "w") as file:
        json.dump(divisors, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
