"""What is measured: the setting of every model, what the published trainer calls it, and the sizes of data.

Adam at 1e-3, batches of 2,048 and embeddings of 64 throughout. VBPR, BM3 and FREEDOM have the hyper-parameters of the
published reference runs; the others a point of their published grid (`mgrad_jax.training.grid.published_grid`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from mgrad_jax import models
from mgrad_jax.data import Interactions, load_interactions, synthetic, synthetic_interactions

LEARNING_RATE, BATCH_SIZE, EMBEDDING = 1e-3, 2048, 64
MIRROR: dict[str, Any] = {"alpha1": 1.0, "alpha2": 0.2, "interval": 3}
FEATURED = ["vbpr", "bm3", "freedom"]  # the models of most benchmarks
PRECISIONS = ("highest", "default", "float64")  # of the parity on a GPU
SIZES = {"quick": synthetic.Size(300, 200, 3_000, 32, 16), **synthetic.SIZES}
SOURCES = f"a directory in MMRec format, 'demo', or a size that is made up: {', '.join(SIZES)}"


def dataset(source: str) -> Interactions:
    """Data made up at one of the sizes, or read from a directory."""
    return synthetic_interactions(SIZES[source], name=source) if source in SIZES else load_interactions(source)


def make_model(name: str, data: Interactions, dtype: Any = jnp.float32) -> Any:
    """A model at its setting."""
    return models.create(name, data, dtype=dtype, **SETTINGS[name].hyper_parameters)


@dataclass(frozen=True)
class Setting:
    """One model's setting.

    Attributes:
        published: the model's class in the published trainer, and its configuration file's name; None: it has none.
        hyper_parameters: by published name, the same on both sides.
        weight_decay: of the optimizer.
        published_only: options of the published configuration that our model knows as fixed.
    """

    published: str | None
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    published_only: Mapping[str, Any] = field(default_factory=dict)


SETTINGS: Mapping[str, Setting] = {
    "vbpr": Setting("VBPR", {"reg_weight": 1e-3}),
    "bm3": Setting("BM3", {"n_layers": 1, "dropout": 0.3, "reg_weight": 0.1}),
    "freedom": Setting("FREEDOM", {"dropout": 0.8, "reg_weight": 1e-3}),
    "mmgcn": Setting("MMGCN", {"reg_weight": 1e-3}),
    "grcn": Setting("GRCN", {"reg_weight": 1e-3}),
    "dualgnn": Setting("DualGNN", {"reg_weight": 1e-3}, published_only={"aggr_mode": "add"}),
    "slmrec": Setting("SLMRec", {"ssl_temp": 0.2, "ssl_alpha": 0.1}, 1e-4, {"reg": 1e-4}),
    "dragon": Setting("DRAGON", {"reg_weight": 1e-3}, published_only={"aggr_mode": "add"}),
    "layergcn": Setting("LayerGCN", {"dropout": 0.1, "reg_weight": 1e-3}, published_only={"n_layers": 4}),
    "selfcf": Setting("SELFCFED_LGN", {"n_layers": 1, "dropout": 0.1, "reg_weight": 0.0}),
    "lightgcn": Setting(None, {"n_layers": 3, "reg_weight": 1e-4}),
}
