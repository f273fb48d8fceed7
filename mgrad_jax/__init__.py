"""Mirror Gradient for JAX: the Optax transformation, and the paper's recommenders in Flax NNX.

The names below are imported on first use, so that `mgrad-jax --help` need not wait for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgrad_jax.iterates import evaluation_params
    from mgrad_jax.mirror import (
        MirrorState,
        close_batch,
        mirror_gradient,
        mirror_step,
        mirrored,
        replay,
        replayed,
        schedule_over_passes,
        second_pass_pending,
    )
    from mgrad_jax.nnx_loop import nnx_step
    from mgrad_jax.same_batch import checked
    from mgrad_jax.sharpness_aware import SSAMState, sam, ssam_d, ssam_f

__all__ = [
    "MirrorState",
    "SSAMState",
    "checked",
    "close_batch",
    "evaluation_params",
    "mirror_gradient",
    "mirror_step",
    "mirrored",
    "nnx_step",
    "replay",
    "replayed",
    "sam",
    "schedule_over_passes",
    "second_pass_pending",
    "ssam_d",
    "ssam_f",
]
_ELSEWHERE = {
    "checked": "mgrad_jax.same_batch",
    "evaluation_params": "mgrad_jax.iterates",
    "nnx_step": "mgrad_jax.nnx_loop",
    **dict.fromkeys(("SSAMState", "sam", "ssam_d", "ssam_f"), "mgrad_jax.sharpness_aware"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_ELSEWHERE.get(name, "mgrad_jax.mirror")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
