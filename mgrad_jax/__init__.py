"""Mirror Gradient for JAX: the Optax transformation, and the paper's recommenders in Flax NNX."""

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
