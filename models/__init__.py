"""Flax NNX ports of the paper's recommenders, by name.

>>> names()[0]
'bm3'
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mgrad_jax.data import Interactions
from mgrad_jax.declaration import check_choice, check_names
from mgrad_jax.deprecation import renamed
from mgrad_jax.devices import tables_of
from mgrad_jax.models.base import (
    Constant,
    EpochState,
    ModelConfig,
    Recommender,
    TracedHyperParameter,
    Variables,
    cast_features,
)

renamed(__name__, {"Frozen": "Constant", "Scalar": "TracedHyperParameter"})

_CLASSES = {
    "bm3": "BM3",
    "dragon": "DRAGON",
    "dualgnn": "DualGNN",
    "freedom": "FREEDOM",
    "grcn": "GRCN",
    "layergcn": "LayerGCN",
    "lightgcn": "LightGCN",
    "mmgcn": "MMGCN",
    "selfcf": "SelfCF",
    "slmrec": "SLMRec",
    "vbpr": "VBPR",
}


def names() -> list[str]:
    """The models' names, in alphabetical order."""
    return sorted(_CLASSES)


def model_class(name: str) -> type[Recommender]:
    """The class of a model; an unknown name is a `UserError` that lists the known ones."""
    check_choice("unknown model", name, names())
    module = importlib.import_module(f"mgrad_jax.models.{name}")
    found: type[Recommender] = getattr(module, _CLASSES[name])
    return found


def make_config(name: str, hyper_parameters: dict[str, Any]) -> ModelConfig:
    """A model's configuration; an unknown hyper-parameter is a `UserError` that lists the known ones."""
    config_class = model_class(name).config_class
    known = [field.name for field in dataclasses.fields(config_class)]
    check_names(f"{name} has no hyper-parameter", hyper_parameters, known)
    return config_class(**hyper_parameters)


def create(
    name: str,
    data: Interactions,
    *,
    seed: int = 999,
    dtype: Any = jnp.float32,
    feature_dtype: Any = None,
    mesh: Mesh | None = None,
    **hyper_parameters: Any,
) -> Recommender:
    """Build a model for a dataset.

    Args:
        name: one of `names()`, e.g. "freedom".
        data: the interactions and features it is built on.
        seed: seed of the initial parameters.
        dtype: floating-point type of parameters, features and graphs.
        feature_dtype: type in which the tables of features are held, e.g. `jnp.bfloat16` for half of the memory;
            `dtype` unless given. Everything else, item graphs included, is made of the features as they are.
        mesh: of several devices, from `mgrad_jax.devices.mesh`, each of which then reads and draws the columns of the
            tables that it holds, so that no device needs room for a whole one; where they are those of several
            processes, all of these make this call, of equal data. Only while an item graph is made each device has the
            whole of a table below 1 GiB (`mgrad_jax.graph.items`). Parameters drawn from a normal distribution may
            differ in their last digit.
        **hyper_parameters: names of the reference code, e.g. `reg_weight=1e-3`; the rest keep their defaults there.

    Raises:
        UserError: unknown model or hyper-parameter, a value out of range, a feature that the data lack, or a
            `feature_dtype` for a model that reads no features.
    """
    config = make_config(name, hyper_parameters)
    with tables_of(mesh):
        model = model_class(name)(data, config, rngs=nnx.Rngs(seed), dtype=dtype)
        if feature_dtype is not None and feature_dtype != dtype:
            cast_features(model, feature_dtype)
    return model


__all__ = [
    "Constant",
    "EpochState",
    "ModelConfig",
    "Recommender",
    "TracedHyperParameter",
    "Variables",
    "create",
    "make_config",
    "model_class",
    "names",
]
