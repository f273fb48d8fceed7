"""Moved to `mgrad_jax.models.losses`."""

from mgrad_jax.deprecation import renamed

renamed(__name__, {"*": "mgrad_jax.models.losses", "half_squares": "mgrad_jax.models.losses.l2_penalty"})
