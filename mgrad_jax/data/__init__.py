"""Data: interactions in MMRec format, the embedded demo dataset, preprocessing, sampling on the device."""

from mgrad_jax.data.interactions import Batch, Interactions
from mgrad_jax.data.mmrec import load_interactions, problems
from mgrad_jax.data.preprocess import prepare
from mgrad_jax.data.synthetic import demo_interactions, synthetic_interactions

__all__ = [
    "Batch",
    "Interactions",
    "demo_interactions",
    "load_interactions",
    "prepare",
    "problems",
    "synthetic_interactions",
]
