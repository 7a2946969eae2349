"""The folder is the registry: a plug-in is found because its file is there. No list to edit, no decorator."""

import importlib
import pkgutil
from pathlib import Path
from typing import TypeVar

from .errors import PluginError

Kind = TypeVar("Kind")


def names_in(folder: Path) -> tuple[str, ...]:
    """The names of a folder's plug-ins, of which each has a file of its own, without importing them."""
    return tuple(sorted(f.stem for f in folder.glob("*.py") if f.stem not in ("__init__", "base")))


def collect(package: str, kind: type[Kind], *beside: str) -> dict[str, Kind]:
    """Import every file of `package` but `base` and those `beside`. Return each `kind` that they define, by its `name`.

    A file of one plug-in bears that plug-in's name. A file of several (`integer.py`: every width and
    group) is one idea, and its plug-ins bear names of their own. Two of one name, or a file with
    none, is a `PluginError`.
    """
    found: dict[str, Kind] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name in ("base", *beside):
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        mine = [v for v in vars(module).values() if isinstance(v, kind)]
        for v in vars(module).values():
            if isinstance(v, tuple) and v and all(isinstance(x, kind) for x in v):
                mine += v
        if not mine:
            raise PluginError(f"{package}/{info.name}.py defines no {kind.__name__}; it should, or live elsewhere")
        if len(mine) == 1 and mine[0].name != info.name:  # type: ignore[attr-defined]
            raise PluginError(f"{package}/{info.name}.py holds {mine[0].name!r}; name the file after it")  # type: ignore[attr-defined]
        for plugin in mine:
            name = plugin.name  # type: ignore[attr-defined]
            if name in found:
                raise PluginError(f"{package}/{info.name}.py defines {name!r} a second time")
            found[name] = plugin
    return found
