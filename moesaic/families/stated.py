"""What config.json states, asked for by families: values that have to be there, or have to be what their code was written for."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import FamilyError

Config = Mapping[str, Any]

MOST_LAYERS, MOST_EXPERTS = 1024, 8192  # a typo beyond them would fill the memory with names
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "num_routed_experts")


def expect(config: Config, key: str, *wanted: Any) -> Any:
    """config[key], which must be one of `wanted`; with none given it must merely be there."""
    if key not in config:
        raise FamilyError(
            f"config.json has no {key!r}; the family's code needs it" + (f" to be {wanted[0]!r}" if wanted else "")
        )
    if wanted and config[key] not in wanted:
        raise FamilyError(
            f"config.json has {key} = {config[key]!r}; this family's code was written for {' or '.join(map(repr, wanted))}"
        )
    return config[key]


def allow(config: Config, key: str, *wanted: Any) -> None:
    """Where config.json states `key`, it must be one of `wanted`."""
    if key in config:
        expect(config, key, *wanted)


def count(config: Config, key: str, most: int = 2**31) -> int:
    """config[key], which must be a whole number from 1 to `most`."""
    value = expect(config, key)
    if type(value) is not int or not 1 <= value <= most:
        raise FamilyError(f"config.json has {key} = {value!r}; wanted a whole number from 1 to {most:,}")
    return value


def section(config: Config, key: str) -> Config:
    """config[key], which must be an object."""
    value = expect(config, key)
    if not isinstance(value, Mapping):
        raise FamilyError(f"config.json has {key} = {value!r}; wanted an object")
    return value


def schedule(config: Config, key: str, layers: int) -> list[int]:
    """config[key], which must say 0 or 1 of each layer."""
    value = expect(config, key)
    if not isinstance(value, list) or len(value) != layers or not all(flag in (0, 1) for flag in value):
        raise FamilyError(f"config.json has {key} = {value!r:.80}; wanted a 0 or 1 for each of {layers} layers")
    return value


def expert_counts(config: Config, path: str = "") -> Iterator[tuple[str, int]]:
    """Every place in a config that states the number of routed experts: ("text_config.num_local_experts", 128)."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from expert_counts(value, f"{path}{key}.")
        elif key in COUNT_KEYS and isinstance(value, int):
            yield path + key, value


def with_experts(config: Config, source: int, kept: int) -> dict[str, Any]:
    """`config` with the expert count changed wherever it stands. Raises `FamilyError` if it stands nowhere."""
    found = dict(expert_counts(config))
    if source not in found.values():
        raise FamilyError(f"config.json states the number of experts nowhere as {source}: found {found}")

    def edit(part: Config) -> dict[str, Any]:
        return {
            k: edit(v) if isinstance(v, Mapping) else kept if k in COUNT_KEYS and v == source else v
            for k, v in part.items()
        }

    return edit(config)
