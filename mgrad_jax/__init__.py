"""Mirror Gradient for JAX: the Optax transformation, and the paper's recommenders in Flax NNX.

The names below are imported on first use, so that `mgrad-jax --help` need not wait for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgrad_jax.mirror import (
        MirrorState,
        mirror_gradient,
        mirror_step,
        mirrored,
        replay,
        replayed,
        second_pass_pending,
    )

__all__ = [
    "MirrorState",
    "mirror_gradient",
    "mirror_step",
    "mirrored",
    "replay",
    "replayed",
    "second_pass_pending",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("mgrad_jax.mirror"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
