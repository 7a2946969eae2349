"""Rotary position embedding in config.json: transformers 5 keeps it in one object, vendors and engines in single keys.

    rope_parameters {rope_theta, rope_type, partial_rotary_factor, …}   as transformers 5 saves it
    rope_theta, rotary_dim, partial_rotary_factor, rope_scaling         as vendors write it, and mlx-lm reads it

A model is held, and exported, as its vendor writes it, which every engine reads.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import FamilyError

Config = Mapping[str, Any]

ROPE = "rope_parameters"
DEFAULT = ("default", "axial")  # types that scale nothing; the second is a vision tower's


def plain_rope(config: Config) -> Config:
    """`config` with its rotary embedding in single keys; as it is where it has no `rope_parameters`.

    Raises `FamilyError` where two keys state different values, or one that no engine reads in single keys.
    """
    stated = config.get(ROPE)
    if stated is None:
        rotary_width(config, config.get("partial_rotary_factor"))
        return config
    if not isinstance(stated, Mapping) or any(isinstance(value, Mapping) for value in stated.values()):
        raise FamilyError(f"config.json has {ROPE} = {stated!r:.120}; wanted one object of numbers for all layers")
    rest = {"rope_type": "default", **stated}
    theta = agreed(config, "rope_theta", rest.pop("rope_theta", None))
    factor = agreed(config, "partial_rotary_factor", rest.pop("partial_rotary_factor", None))
    found = {key: value for key, value in config.items() if key != ROPE}
    width = rotary_width(config, factor)
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", factor), ("rotary_dim", width)):
        if value is not None:
            found[key] = value
    scaling = {} if rest["rope_type"] in DEFAULT and len(rest) == 1 else rest
    if before := config.get("rope_scaling"):
        known = {"rope_type" if key == "type" else key: value for key, value in before.items()}
        if {key: value for key, value in known.items() if key != "rope_theta"} != rest:
            raise FamilyError(
                f"config.json has rope_scaling = {before!r:.120} and {ROPE} = {stated!r:.120}; make them say the same"
            )
    elif scaling:
        found["rope_scaling"] = scaling
    return found


def agreed(config: Config, key: str, other: Any) -> Any:
    """The value of `key`, stated by itself or within `rope_parameters`. Raises `FamilyError` where they differ."""
    plain = config.get(key)
    if plain is not None and other is not None and plain != other:
        raise FamilyError(
            f"config.json has {key} = {plain!r} and {ROPE}.{key} = {other!r}; keep the one that the model was trained with"
        )
    return other if plain is None else plain


def rotary_width(config: Config, factor: Any) -> int | None:
    """Channels of a head that are rotated; None where nothing states it. Raises `FamilyError` where two keys differ."""
    plain, head = config.get("rotary_dim"), config.get("head_dim")
    if not isinstance(head, int) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        return plain
    width = round(head * factor)
    if plain is not None and plain != width:
        raise FamilyError(
            f"config.json has rotary_dim = {plain!r}, and {factor!r} of a head_dim of {head} is {width}; "
            "keep the one that the model was trained with"
        )
    return width
