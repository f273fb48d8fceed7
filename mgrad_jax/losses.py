"""Moved to `mgrad_jax.models.losses`."""

from mgrad_jax.deprecation import renamed

renamed(__name__, {"*": "mgrad_jax.models.losses"})
