"""Run by a Python that has vLLM and `humming-kernels`: the load check, with the layers that humming would serve built too.

    vllm_humming.py CHECK FOLDER … --json OUT.json       as the load check at CHECK, whose folder is on the path

vLLM gives auto-round's 2 and 3 bits to humming, which looks for a CUDA device to choose a kernel for. None is chosen
here. Names, shapes, the choice of method, and loading stay vLLM's and humming's own.
"""

import runpy
import sys

import vllm.model_executor.layers.quantization.humming as humming
import vllm_cpu_patch as patches


def patch_inc(real=patches.patch_inc) -> None:
    """The check's, and humming's: no kernel is chosen, and activations stay as they are."""
    real()
    humming.check_and_fallback_input_schema = lambda input_schema, **asked: input_schema
    humming.input_schema_to_quant_key = lambda *asked: None
    humming.select_humming_moe_experts = lambda **asked: None


patches.patch_inc = patch_inc
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
