"""Moved to `mgrad_jax.graph`."""

from mgrad_jax.deprecation import renamed

renamed(__name__, {"lightgcn_layers": "mgrad_jax.graph.lightgcn_mean"})
