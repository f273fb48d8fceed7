"""Training: the epoch program, early stopping, run directories.

The names below are imported on first use, so that `mgrad-jax train --help` need not wait for JAX.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgrad_jax.training.fit import EpochReport, FitResult, TrainingDiverged, fit
    from mgrad_jax.training.methods import register_method

__all__ = ["EpochReport", "FitResult", "TrainingDiverged", "fit", "register_method"]


class _Package(ModuleType):
    """Names by first use; `fit` is the function, although its file bears the same name and would take its place."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        file = "methods" if name == "register_method" else "fit"
        return getattr(importlib.import_module(f"{__name__}.{file}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "fit" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
