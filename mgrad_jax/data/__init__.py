"""Data: interactions in MMRec format, the embedded demo dataset, preprocessing, sampling on the device.

`Batch` is imported on first use, so that files can be prepared without waiting for JAX.
"""

from typing import TYPE_CHECKING, Any

from mgrad_jax.data.interactions import Interactions
from mgrad_jax.data.mmrec import diagnose, load_interactions
from mgrad_jax.data.preprocess import prepare
from mgrad_jax.data.synthetic import demo_interactions, synthetic_interactions
from mgrad_jax.deprecation import renamed

if TYPE_CHECKING:
    from mgrad_jax.data.sampling import Batch

__all__ = [
    "Batch",
    "Interactions",
    "demo_interactions",
    "diagnose",
    "load_interactions",
    "prepare",
    "synthetic_interactions",
]


def __getattr__(name: str) -> Any:
    if name != "Batch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mgrad_jax.data.sampling import Batch

    return Batch


renamed(__name__, {"problems": "diagnose"})
