"""Run by a Python that has vLLM: what its own code makes of flags, of a cache, and of one rank's weights.

    vllm_side.py flags WORD …                     what `vllm serve` reads in these arguments
    vllm_side.py cache CONFIG FACTS…              pages, tokens and longest context of a cache (JSON)
    vllm_side.py weights CONFIG DEVICES DEAL      bytes of rank 0's parameters, on the meta device

Leaves out everything of ours.
"""

import json
import os
import sys
import tempfile
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", TORCHDYNAMO_DISABLE="1",
)  # fmt: skip

import torch  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402


def flags(*words: str) -> dict[str, Any]:
    """Exits, as `vllm serve` does, at a word that it does not know."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    read = make_arg_parser(FlexibleArgumentParser()).parse_args(list(words))
    validate_parsed_serve_args(read)
    engine = AsyncEngineArgs.from_cli_args(read)
    return {key: str(value) for key, value in vars(engine).items()} | {"headless": str(read.headless)}


def engine_config(folder: str, **more: Any) -> Any:
    return EngineArgs(
        model=folder, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, **more
    ).create_engine_config()


def cache(folder: str, question: str) -> dict[str, Any]:
    """A cache of the layers that the question describes, in so many bytes, as vLLM 0.32 allots it."""
    from vllm.v1.core.kv_cache_utils import (
        generate_scheduler_kv_cache_config,
        get_kv_cache_capacity,
        get_kv_cache_configs,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    q = json.loads(question)
    config = engine_config(folder, max_model_len=q["context"])
    dtype = {"bf16": torch.bfloat16, "fp8": torch.uint8}[q["kv"]]
    specs: dict[str, Any] = {
        f"layers.{n}": FullAttentionSpec(
            block_size=q["page_tokens"], num_kv_heads=q["heads"], head_size=q["width"], dtype=dtype
        )
        for n in range(q["layers"])
    }
    for n in range(q["index_layers"]):
        specs[f"index.{n}"] = MLAAttentionSpec(
            block_size=q["page_tokens"], num_kv_heads=1, head_size=q["index_width"], dtype=torch.bfloat16
        )
    try:
        configs = get_kv_cache_configs(config, [specs], [q["bytes"]])
    except ValueError as error:
        return {"error": str(error)}
    tokens, concurrency = get_kv_cache_capacity(config, generate_scheduler_kv_cache_config(configs))
    return {"pages": configs[0].num_blocks, "tokens": tokens, "concurrency": concurrency}


def weights(folder: str, devices: str, deal: str) -> dict[str, Any]:
    """Parameters as the first of so many ranks creates them. The groups are of one process and told that they are more."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = engine_config(folder, max_model_len=256, enable_expert_parallel=deal == "deal")
    for name in ("_calculate_expert_maps", "_init_routing_tables"):  # these read numbers, which meta tensors lack
        real = getattr(ExpertMapManager, name)
        setattr(ExpertMapManager, name, torch.device("cpu")(real))
    ExpertMapManager.get_compressed_map_string = lambda self: ""
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        for group in (parallel_state._TP, parallel_state._EP):
            if group is not None:
                group.world_size = int(devices)
        config.parallel_config.tensor_parallel_size = int(devices)
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
    return {"bytes": sum(p.numel() * p.element_size() for p in model.parameters())}


if __name__ == "__main__":
    print(json.dumps({"flags": flags, "cache": cache, "weights": weights}[sys.argv[1]](*sys.argv[2:])))
