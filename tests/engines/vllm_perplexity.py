"""Run by a Python that has vLLM: log-probabilities of given tokens in the real engine, on a CPU.

    vllm_perplexity.py kernels|reference FOLDER TOKENS.json OUT.json

TOKENS.json holds rows of token ids; OUT.json gets, for each, the log-probability of every token but the first.
vLLM's CPU router has no sigmoid; the check's patches, which are found on the path, add that, and with "reference"
stand in for quantized kernels that this CPU lacks: vLLM's own parameters, decoded and multiplied. Leaves out all of ours.
"""

import json
import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", TORCHDYNAMO_DISABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
)  # fmt: skip

import vllm.model_executor.layers.quantization.auto_awq
import vllm.model_executor.layers.quantization.auto_gptq
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors
import vllm.model_executor.layers.quantization.fp8
import vllm.model_executor.layers.quantization.inc.inc
import vllm.model_executor.layers.quantization.inc.schemes.inc_wna16_linear  # noqa: F401  before they are patched
import vllm_cpu_patch as patches
from vllm import LLM, SamplingParams


def main(way: str, folder: str, tokens: str, out: str) -> None:
    patches.patch_router()
    if way == "reference":
        for patch in (
            "patch_oracles",
            "patch_linear_kernels",
            "patch_inc",
            "patch_marlin",
            "install_reference_compute",
        ):
            getattr(patches, patch)()
    with open(tokens) as file:
        rows = json.load(file)
    engine = LLM(folder, dtype="bfloat16", max_model_len=512, enforce_eager=True, max_num_seqs=8, seed=0)
    asked = [{"prompt_token_ids": row} for row in rows]
    done = engine.generate(asked, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    found = [[at[id].logprob for at, id in zip(d.prompt_logprobs[1:], row[1:])] for d, row in zip(done, rows)]
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
