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
    before = getattr(sys.modules[module], "__getattr__", None)

    def get(name: str) -> Any:
        if name in names:
            place, _, attribute = names[name].rpartition(".")
        elif "*" in names and not name.startswith("__"):
            place, attribute = names["*"], name
        elif before is not None:
            return before(name)
        else:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(place or module), attribute)
        told = f"{module}.{name} is {place or module}.{attribute} now; the old name goes with the next version."
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return value

    sys.modules[module].__getattr__ = get  # type: ignore[method-assign]


class Formerly:
    """An attribute that has another name now: `values = Formerly("data")` in the body of a class."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            raise AttributeError(self.old)
        told = f"{self.old} is {owner.__name__}.{self.new} now; the old name goes with the next version."
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return getattr(instance, self.new)
