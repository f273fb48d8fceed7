"""Moved to `mgrad_jax.models.losses`."""

from mgrad_jax.deprecation import moved

__getattr__ = moved(__name__, "mgrad_jax.models.losses")
