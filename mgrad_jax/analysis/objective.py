"""A recommender's training loss on fixed pairs, negatives, dropout and epoch graph, as a function of its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax import models
from mgrad_jax.data import Batch, Interactions
from mgrad_jax.data.sampling import sample_negatives
from mgrad_jax.models import Recommender
from mgrad_jax.models.adversarial import adversarial
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.epoch import split_model, training_data


class Given(NamedTuple):
    """What a loss reads besides the parameters and the batch."""

    epoch_state: nnx.State
    constants: nnx.State
    key: Array


@dataclass(frozen=True)
class Objective:
    """A model's loss and gradient, compiled once for every batch of one size."""

    loss_and_gradient: Any
    given: Given

    @classmethod
    def of(cls, model: Recommender, key: Array) -> Objective:
        """That of a model; `key` draws the dropout of every batch."""
        parts = split_model(model)

        def loss(params: nnx.State, batch: Batch, given: Given) -> Float[Array, ""]:
            return nnx.merge(parts.graphdef, params, given.epoch_state, given.constants).loss(batch, given.key)[0]

        return cls(jax.jit(jax.value_and_grad(loss)), Given(parts.epoch_state, parts.constants, key))

    def loss(self, params: nnx.State, batch: Batch) -> Float[Array, ""]:
        """The loss of a batch."""
        return self.loss_and_gradient(params, batch, self.given)[0]

    def gradient(self, params: nnx.State, batch: Batch) -> nnx.State:
        """Its gradient."""
        return self.loss_and_gradient(params, batch, self.given)[1]


def with_epoch_state(model: Recommender, key: Array) -> Recommender:
    """A copy with what is redrawn every epoch drawn from this key."""
    copy = nnx.clone(model)
    for name, value in copy.resample(key).items():
        getattr(copy, name).set_value(value)
    return copy


def draw_batches(data: Interactions, model: Recommender, n: int, size: int, key: Array) -> list[Batch]:
    """n batches of training pairs, each pair at most once a batch, with a negative each."""
    train = training_data(data)
    size = min(size, len(data.train))
    batches = []
    for batch_key in jax.random.split(key, n):
        order_key, negative_key = jax.random.split(batch_key)
        chosen = jax.random.permutation(order_key, len(data.train))[:size]
        users, positives = train.users[chosen], train.items[chosen]
        drawn = sample_negatives(negative_key, users, train.history) if model.uses_negatives else positives
        batches.append(Batch(users, positives, drawn))
    return batches


def in_float64(model: Recommender, config: RunConfig, data: Interactions) -> Recommender:
    """The same model in float64; to be called under `jax.enable_x64(True)`."""
    twin = models.create(config.model, data, seed=config.seed, dtype=np.float64, **config.hyper_parameters)
    if config.adversarial is not None:
        twin = adversarial(twin, **config.adversarial)
    values = jax.tree.map(lambda new, old: jnp.asarray(old, new.dtype), nnx.state(twin), nnx.state(model))
    nnx.update(twin, values)
    return twin
