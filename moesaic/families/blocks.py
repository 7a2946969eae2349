"""Parts that most families have under names of their own: a gated MLP, grouped attention, routed experts, both ends.

Each gives matrices or small tensors for a family's `read`. Leaves out what a family alone has.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from .base import Linear, TensorInfo

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def gated(
    at: str, names: tuple[str, str, str], hidden: int, inner: int, **facts: Any
) -> list[Linear]:  # fmt: skip
    """A MLP's gate, up and down projection under their names on disk; `facts` are those that the three share."""
    return [
        Linear(f"{at}{names[0]}", (inner, hidden), projection="gate", cut="rows", fused="gate_up", **facts),
        Linear(f"{at}{names[1]}", (inner, hidden), projection="up", cut="rows", fused="gate_up", **facts),
        Linear(f"{at}{names[2]}", (hidden, inner), projection="down", cut="columns", **facts),
    ]


def attended(
    at: str, hidden: int, q: int, kv: int, layer: int, more: Sequence[Linear] = ()
) -> list[Linear]:  # fmt: skip
    """q, k and v of `q` and `kv` rows, `more` that is fused with them, and o."""
    facts: dict[str, Any] = dict(role="qkv", unit=f"layers.{layer}.qkv", layer=layer, fused="qkv")
    return [
        Linear(f"{at}q_proj", (q, hidden), projection="q", cut="rows", **facts),
        Linear(f"{at}k_proj", (kv, hidden), projection="k", cut="kv", **facts),
        Linear(f"{at}v_proj", (kv, hidden), projection="v", cut="kv", **facts),
        *more,
        Linear(
            name=f"{at}o_proj",
            shape=(hidden, q),
            role="o",
            unit=f"layers.{layer}.o",
            layer=layer,
            projection="o",
            cut="columns",
        ),
    ]


def routed(at: str, experts: int, names: tuple[str, str, str], hidden: int, inner: int, layer: int) -> list[Linear]:
    """The experts of a layer: `at` ends where an expert's number follows."""
    facts: dict[str, Any] = dict(role="experts", unit=f"layers.{layer}.experts", layer=layer)
    return [linear for e in range(experts) for linear in gated(f"{at}{e}.", names, hidden, inner, expert=e, **facts)]


def ends(vocab: int, hidden: int, prefix: str = "") -> tuple[TensorInfo, list[TensorInfo]]:
    """The embedding; and the final norm with the head. All in BF16."""
    embedding = TensorInfo(f"{prefix}model.embed_tokens.weight", "BF16", (vocab, hidden), "embedding")
    return embedding, [
        TensorInfo(f"{prefix}model.norm.weight", "BF16", (hidden,), "norm"),
        TensorInfo(f"{prefix}lm_head.weight", "BF16", (vocab, hidden), "head"),
    ]


def norms(at: str, sizes: Iterable[tuple[str, int]]) -> list[TensorInfo]:
    return [TensorInfo(f"{at}{name}.weight", "BF16", (size,), "norm") for name, size in sizes]


def as_on_disk(at: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """`Wiring.parameters` of those whose names within the layer are the same on disk and in transformers."""
    return {name: (f"{at}{name}",) for name in names}
