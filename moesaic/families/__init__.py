"""Model families, one file each, under the `model_type` that config.json gives them."""

from collections.abc import Mapping
from typing import Any

from ..errors import FamilyError
from ..registry import collect
from .base import (
    DTYPE_BYTES,
    Architecture,
    Arithmetic,
    Engine,
    Family,
    Linear,
    Refusal,
    Router,
    Serving,
    Split,
    Stack,
    TensorInfo,
    Vision,
    Wiring,
)
from .stated import expert_counts, with_experts
from .talk import Markup, Talk

PARTS = ("blocks", "deepseekmoe", "mla", "rope", "stated", "talk")  # of families, each used by several
FAMILIES = collect(__name__, Family, *PARTS)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to. Raises `FamilyError` for one nobody wrote code for."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise FamilyError(
            f"config.json says model_type {name!r}; moesaic knows {', '.join(sorted(FAMILIES))}. "
            "Add families/<model_type>.py to teach it another"
        )
    return FAMILIES[name]


__all__ = [
    "DTYPE_BYTES",
    "FAMILIES",
    "Architecture",
    "Arithmetic",
    "Engine",
    "Family",
    "Linear",
    "Markup",
    "Refusal",
    "Router",
    "Serving",
    "Split",
    "Stack",
    "Talk",
    "TensorInfo",
    "Vision",
    "Wiring",
    "expert_counts",
    "family_of",
    "with_experts",
]
