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
    from mgrad_jax.sharpness_aware import SSAMState, sam, ssam_d, ssam_f

__all__ = [
    "MirrorState",
    "SSAMState",
    "mirror_gradient",
    "mirror_step",
    "mirrored",
    "replay",
    "replayed",
    "sam",
    "second_pass_pending",
    "ssam_d",
    "ssam_f",
]
_SHARPNESS_AWARE = ("SSAMState", "sam", "ssam_d", "ssam_f")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "mgrad_jax.sharpness_aware" if name in _SHARPNESS_AWARE else "mgrad_jax.mirror"
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
