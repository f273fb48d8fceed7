"""A run's loss as a function of its parameters alone, and its surface over two directions that all runs share."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.analysis.flatness import Loss, Params, losses_on_plane
from mgrad_jax.data import Batch, Interactions
from mgrad_jax.data.sampling import sample_negatives, shuffle
from mgrad_jax.models import Recommender, Variables
from mgrad_jax.training.epoch import split_model, training_data

DIRECTIONS = ("filter", "table", "raw")
# Matrices whose outputs are columns; other tables have one row per user, item or edge.
_KERNELS = ("kernel", "conv")


class Fixed(NamedTuple):
    """All that the loss reads besides the parameters."""

    epoch_state: Variables
    constants: Variables
    batch: Batch
    key: Array


@dataclass(frozen=True)
class ModelLoss:
    """A model's training loss, see `mgrad_jax.analysis.flatness`; equal for the runs of one model and setting."""

    name: str
    graphdef: nnx.GraphDef[Recommender]

    def __hash__(self) -> int:
        """Of the name: a structure may hold lists, which have none."""
        return hash(self.name)

    def __call__(self, params: Params, fixed: Fixed) -> Float[Array, ""]:
        """The loss of the fixed batch."""
        return nnx.merge(self.graphdef, params, fixed.epoch_state, fixed.constants).loss(fixed.batch, fixed.key)[0]


class Surface(NamedTuple):
    """A loss over a plane through some parameters.

    Attributes:
        a, b: (points,) how far along the first and the second direction.
        losses: (points, points), a down and b across.
        centre: the loss in the middle, where there need be no point.
    """

    a: np.ndarray
    b: np.ndarray
    losses: np.ndarray
    centre: float


def sample_batch(data: Interactions, n: int, key: Array, *, negatives: bool = True) -> Batch:
    """At most n training pairs, each once, with a negative each; the same for every model of the dataset."""
    order_key, negative_key = jax.random.split(key)
    train = training_data(data)
    order = shuffle(order_key, len(data.train))[:n]
    users, positives = train.users[order], train.items[order]
    drawn = sample_negatives(negative_key, users, train.history) if negatives else positives
    return Batch(users, positives, drawn)


def objective(model: Recommender, data: Interactions, n: int, key: Array) -> tuple[ModelLoss, Fixed]:
    """The loss of a model on fixed pairs and negatives, with fixed dropout and a fixed graph of the epoch.

    Args:
        model: trained or not; it stays as it is.
        data: its dataset.
        n: pairs, in one batch.
        key: of all that is drawn.
    """
    batch_key, resample_key, loss_key = jax.random.split(key, 3)
    copy = nnx.clone(model)
    for name, value in copy.resample(resample_key).items():
        getattr(copy, name).set_value(value)
    parts = split_model(copy)
    batch = sample_batch(data, n, batch_key, negatives=model.uses_negatives)
    return ModelLoss(model.name, parts.graphdef), Fixed(parts.epoch_state, parts.constants, batch, loss_key)


def parameters(model: Recommender) -> Variables:
    """The model's parameters in its own type: a narrower one, in which it may hold tables, loses small steps."""
    params: Variables = jax.tree.map(lambda x: jnp.asarray(x, model.dtype), nnx.state(model, nnx.Param))
    return params


def norm(params: Params) -> float:
    """|theta|."""
    return float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(params))))


@partial(jax.jit, static_argnums=0)
def direction(kind: Literal["filter", "table", "raw"], key: Array, params: Params) -> Params:
    """A normal direction in the units of the parameters.

    Args:
        kind: "raw": standard normal. "table": times the root mean square of the array. "filter" (Li et al. 2018): every
            row of a table, and every output's column of a kernel, has the norm of its own parameters; biases stay.
        key: an array's numbers follow from it and the array's name, so that all runs share them.
        params: in the middle.
    """

    def one(path: Any, x: Array) -> Array:
        name = jax.tree_util.keystr(path)
        z = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), x.shape, x.dtype)
        if kind == "raw":
            return z
        if kind == "table":
            return z * jnp.sqrt(jnp.mean(x**2))
        if x.ndim < 2:
            return jnp.zeros_like(x)
        axes = (
            tuple(range(x.ndim - 1)) if any(f"['{kernel}']" in name for kernel in _KERNELS) else tuple(range(1, x.ndim))
        )
        own, drawn = (jnp.sqrt(jnp.sum(y**2, axis=axes, keepdims=True)) for y in (x, z))
        return z * own / drawn

    return jax.tree_util.tree_map_with_path(one, params)


def surface(
    loss: Loss,
    fixed: Any,
    params: Params,
    key: Array,
    *,
    kind: Literal["filter", "table", "raw"] = "filter",
    points: int = 21,
    reach: float = 1.0,
    batch_size: int | None = None,
) -> Surface:
    """L(theta + a d1 + b d2) on a grid.

    Args:
        loss, fixed, params: see `mgrad_jax.analysis.flatness`.
        key: of the directions.
        kind: see `direction`.
        points: along each of them, evenly from -reach to reach; theta is one of them where their number is odd.
        reach: how far.
        batch_size: points evaluated side by side; None: one after the other.
    """
    first, second = (direction(kind, one, params) for one in jax.random.split(key))
    # In whole numbers, so that the middle is exactly 0.
    places = np.arange(1 - points, points, 2) * (reach / (points - 1))
    grid = np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1).reshape(-1, 2)
    given = jnp.asarray(np.concatenate([grid, np.zeros((1, 2))]), jax.tree.leaves(params)[0].dtype)
    found = np.asarray(losses_on_plane(loss, fixed, params, first, second, given, batch_size=batch_size), np.float64)
    return Surface(places, places, found[:-1].reshape(points, points), float(found[-1]))
