"""Run by a Python that has vLLM: what its own code makes of flags, of a cache, and of one rank's weights.

Questions come as JSON on standard input, a line each, and are answered so: importing vLLM is the slow part.

    ["flags", [WORD, …]]                       what `vllm serve` reads in these arguments
    ["cache", [CONFIG, {…}]]                   pages and tokens of a cache, or vLLM's error
    ["weights", [CONFIG, DEVICES, DEAL]]       bytes of rank 0's parameters, on the meta device

Leaves out everything of ours.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", TORCHDYNAMO_DISABLE="1",
)  # fmt: skip

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_capacity, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout


def flags(*words: str) -> dict[str, Any]:
    """Exits, as `vllm serve` does, at a word that it does not know."""
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(list(words))
    read.model = read.model_tag
    validate_parsed_serve_args(read)
    return {key: str(value) for key, value in (vars(read) | vars(AsyncEngineArgs.from_cli_args(read))).items()}


def engine_config(folder: str, **more: Any) -> Any:
    return EngineArgs(
        model=folder, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, **more
    ).create_engine_config()


def cache(folder: str, q: dict[str, Any]) -> dict[str, Any]:
    """A cache of the layers that `q` describes, in so many bytes. The model in `folder` lends the rest of a config."""
    config = engine_config(folder, max_model_len=q["context"])
    dtype = {"bf16": torch.bfloat16, "fp8": torch.uint8}[q["kv"]]
    main = FullAttentionSpec(block_size=q["page_tokens"], num_kv_heads=q["heads"], head_size=q["width"], dtype=dtype)
    specs: dict[str, Any] = {f"layers.{n}": main for n in range(q["layers"])}
    for n in range(q["index_layers"]):
        specs[f"index.{n}"] = MLAAttentionSpec(
            block_size=q["page_tokens"], num_kv_heads=1, head_size=q["index_width"], dtype=torch.bfloat16
        )
    resolve_kv_cache_layout(config, [[layout.name for layout in KVCacheLayout]], specs.values())
    configs = get_kv_cache_configs(config, [specs], [q["bytes"]])
    tokens, concurrency = get_kv_cache_capacity(config, generate_scheduler_kv_cache_config(configs))
    return {"pages": configs[0].num_blocks, "tokens": tokens, "concurrency": concurrency}


def on_cpu(real: Callable[..., Any], manager: Any) -> Any:
    """Expert maps are read as numbers while a model is built, which meta tensors do not have."""
    with torch.device("cpu"):
        return real(manager)


def weights(folder: str, devices: int, deal: bool) -> dict[str, Any]:
    """Parameters as the first of so many ranks creates them: groups are of one process, and told that they are more."""
    config = engine_config(folder, max_model_len=256, enable_expert_parallel=deal)
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, backend="gloo")
            initialize_model_parallel(1, 1)
            for name in ("_calculate_expert_maps", "_init_routing_tables"):
                real = getattr(ExpertMapManager, name)
                setattr(ExpertMapManager, name, lambda manager, real=real: on_cpu(real, manager))
            ExpertMapManager.get_compressed_map_string = lambda manager: ""
        for group in (parallel_state._TP, parallel_state._EP):
            if group is not None:
                group.world_size = devices
        config.parallel_config.tensor_parallel_size = devices
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
    return {"bytes": sum(p.numel() * p.element_size() for p in model.parameters())}


def answer(asked: str, arguments: list[Any]) -> dict[str, Any]:
    """Whatever goes wrong is an answer too."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return partial({"flags": flags, "cache": cache, "weights": weights}[asked], *arguments)()
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error} {said.getvalue()[-2000:]}"}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
