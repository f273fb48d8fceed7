"""Names that have another name now: they work for one version more, with a `DeprecationWarning`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module some of whose names are found under others.

    Args:
        module: the module's `__name__`.
        names: old name -> new one, in the same module or dotted, "mgrad_jax.graph.mix_neighbours".
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, attribute = names[name].rpartition(".")
        return _taken(f"{module}.{name}", place or module, attribute)

    return get


def moved(module: str, place: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module all of whose names are found in another module, `place`."""

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return _taken(f"{module}.{name}", place, name)

    return get


def _taken(old: str, place: str, attribute: str) -> Any:
    value = getattr(importlib.import_module(place), attribute)
    warnings.warn(f"{old} is {place}.{attribute} now; the old name goes with the next version.", DeprecationWarning, 3)
    return value
