"""Containers: how codes and scales lie in a safetensors file, one file for each way that the wire knows."""

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ...registry import collect
from .base import Container, Packing, Part, siblings

CONTAINERS = collect(__name__, Container, "names")


def container_of(config: Mapping[str, Any]) -> Container:
    """The container that a config.json declares. Raises `CheckpointError` for one that is not supported."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"config.json has quantization_config = {quantization!r}; wanted an object")
    method = "mlx" if "quantization" in config else quantization.get("quant_method", "")  # MLX's own key, and no name
    for container in CONTAINERS.values():
        if container.quant_method == method:
            return container
    known = ", ".join(repr(c.quant_method) for c in CONTAINERS.values() if c.quant_method)
    raise CheckpointError(f"config.json says quant_method {method!r}; moesaic reads {known} and unquantized BF16")


__all__ = ["CONTAINERS", "Container", "Packing", "Part", "container_of", "siblings"]
