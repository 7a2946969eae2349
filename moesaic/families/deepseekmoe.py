"""The MLP of DeepSeek-V3 and those that took it over (Kimi, GLM-4.5 and later), and the layer for multi-token prediction.

The first layers are dense. The others have routed experts beside a shared one, under a sigmoid router with a correction
bias in F32, which selects within groups where there are some (arXiv:2412.19437, §2.1.2). Behind the last layer may lie
one more (MTP, §2.2), with experts of its own: it is carried along or left out, and never run.
"""

from collections.abc import Callable
from dataclasses import replace

from ..errors import FamilyError
from .base import Linear, Router, TensorInfo
from .blocks import PROJECTIONS, gated, norms, routed
from .stated import MOST_EXPERTS, MOST_LAYERS, Config, allow, count, expect

MTP_KEY = "num_nextn_predict_layers"
MTP_NORMS = ("enorm", "hnorm", "shared_head.norm")


def check(config: Config) -> None:
    """The values that the code below was written for. Raises `FamilyError`."""
    expect(config, "hidden_act", "silu")
    expect(config, "tie_word_embeddings", False)
    expect(config, "norm_topk_prob", True)
    for key, wanted in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        allow(config, key, wanted)
    layers, experts = count(config, "num_hidden_layers", MOST_LAYERS), count(config, "n_routed_experts", MOST_EXPERTS)
    for key in ("hidden_size", "vocab_size", "intermediate_size", "moe_intermediate_size", "n_shared_experts"):
        count(config, key)
    top_k, groups = count(config, "num_experts_per_tok", experts), count(config, "n_group", experts)
    kept = count(config, "topk_group", groups)
    if groups > 1 and (experts % groups or experts // groups < 2 or experts // groups * kept < top_k):
        raise FamilyError(
            f"config.json has {experts} experts in {groups} groups, of which a token selects {top_k} within {kept}; "
            "wanted equal groups of two or more that hold as many"
        )
    dense, mtp = expect(config, "first_k_dense_replace"), config.get(MTP_KEY, 0)
    if type(dense) is not int or not 0 <= dense < layers:
        raise FamilyError(f"config.json has first_k_dense_replace = {dense!r}; wanted fewer than its {layers} layers")
    if mtp not in (0, 1):
        raise FamilyError(f"config.json has {MTP_KEY} = {mtp!r}; this family's code was written for 0 or 1")


def routers(prefix: str, config: Config) -> dict[int, Router]:
    """By MoE layer."""
    return {layer: router(prefix, config, layer) for layer in moe_layers(config)}


def moe_layers(config: Config) -> range:
    return range(config["first_k_dense_replace"], config["num_hidden_layers"])


def router(prefix: str, config: Config, layer: int) -> Router:
    at = f"{prefix}{layer}.mlp.gate."
    groups, kept = config["n_group"], config["topk_group"]
    return Router(f"{at}weight", "sigmoid_guarded", f"{at}e_score_correction_bias", groups=groups, kept_groups=kept)


def mlp(prefix: str, config: Config, layer: int) -> list[Linear]:
    """A layer's dense MLP, or its routed experts and the shared one."""
    at, hidden, inner = f"{prefix}{layer}.mlp.", config["hidden_size"], config["moe_intermediate_size"]
    if layer < config["first_k_dense_replace"]:
        unit, dense = f"layers.{layer}.dense", config["intermediate_size"]
        return gated(at, PROJECTIONS, hidden, dense, role="dense", unit=unit, layer=layer)
    experts, shared = config["n_routed_experts"], inner * config["n_shared_experts"]
    return routed(f"{at}experts.", experts, PROJECTIONS, hidden, inner, layer) + gated(
        f"{at}shared_experts.", PROJECTIONS, hidden, shared, role="shared", unit=f"layers.{layer}.shared", layer=layer
    )


def small_tensors(prefix: str, config: Config, layer: int) -> list[TensorInfo]:
    """The router's."""
    if layer < config["first_k_dense_replace"]:
        return []
    found, experts = router(prefix, config, layer), config["n_routed_experts"]
    return [
        TensorInfo(found.weight, "BF16", (experts, config["hidden_size"]), "router"),
        TensorInfo(found.correction, "F32", (experts,), "router_bias"),
    ]


def parameters(has_experts: bool) -> list[str]:
    """Names, within a layer, of its shared expert's parameters, or of its dense MLP's."""
    at = "mlp.shared_experts." if has_experts else "mlp."
    return [f"{at}{projection}.weight" for projection in PROJECTIONS]


def mtp(
    prefix: str, config: Config, layer: Callable[[Config, int], tuple[list[Linear], list[TensorInfo]]]
) -> tuple[list[Linear], list[TensorInfo]]:
    """What lies on disk behind the last layer; nothing where config.json counts no such layer.

    `layer` gives the matrices and small tensors of one of the family's layers. Some releases have the embedding and the
    head a second time, others leave them out (`Architecture.optional`).
    """
    if not config.get(MTP_KEY, 0):
        return [], []
    number, hidden, vocab = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    linears, tensors = layer(config, number)
    at = f"{prefix}{number}."
    tensors = tensors + norms(at, ((name, hidden) for name in MTP_NORMS))
    tensors += [
        TensorInfo(f"{at}eh_proj.weight", "BF16", (hidden, 2 * hidden)),
        TensorInfo(f"{at}embed_tokens.weight", "BF16", (vocab, hidden)),
        TensorInfo(f"{at}shared_head.head.weight", "BF16", (vocab, hidden)),
    ]
    return [replace(n, role="mtp") for n in linears], [replace(t, role="mtp") for t in tensors]


def optional(prefix: str, config: Config) -> frozenset[str]:
    at = f"{prefix}{config['num_hidden_layers']}."
    return frozenset((f"{at}embed_tokens.weight", f"{at}shared_head.head.weight"))
