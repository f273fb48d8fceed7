"""Names that have another name now: they work for one version more, with a `DeprecationWarning`."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> None:
    """Have a module answer to old names by giving it a `__getattr__`, which type checkers do not see.

    Args:
        module: the module's `__name__`.
        names: old name -> new one, in the same module or dotted, "mgrad_jax.graph.mix_neighbours"; of a module that has
            moved as a whole, "*" -> the new module.
    """

    def get(name: str) -> Any:
        if name in names:
            place, _, attribute = names[name].rpartition(".")
        elif "*" in names and not name.startswith("__"):
            place, attribute = names["*"], name
        else:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(place or module), attribute)
        told = f"{module}.{name} is {place or module}.{attribute} now; the old name goes with the next version."
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return value

    sys.modules[module].__getattr__ = get  # type: ignore[method-assign]
