"""One epoch of training as one pure, jit-able program.

The program is a scan over *passes*, not over batches: a mirror batch is two consecutive passes over the same batch, so
nothing in the loop is conditional and an epoch of J batches at interval beta costs exactly J + ceil(J / beta) gradient
evaluations, alone and under `jax.vmap`. Which batch each pass reads is known before compilation
(`mgrad_jax.mirror.pass_schedule`); what a pass does with its gradient is the transformation's own business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.data.sampling import UserHistory, sample_negatives, shuffle, user_history
from mgrad_jax.devices import Layout, everywhere, hold_of
from mgrad_jax.iterates import evaluation_params
from mgrad_jax.mirror import restart_epoch, update_with
from mgrad_jax.models import EpochState, Recommender, Variables
from mgrad_jax.training.decay import next_epoch


class TrainState(NamedTuple):
    """What an epoch changes.

    Attributes:
        params: the model's `nnx.Param` variables.
        opt_state: state of the Optax chain.
        epoch_state: the model's `EpochState` variables.
        stale_params: those one evaluates before the epoch's last update (only with `evaluate="stale"`, else None).
    """

    params: Variables
    opt_state: optax.OptState
    epoch_state: Variables
    stale_params: Variables | None = None


class TrainingData(NamedTuple):
    """Training interactions on the device: users and items (n_train,) int32, and each user's history."""

    users: Int[Array, " train"]
    items: Int[Array, " train"]
    history: UserHistory


class EpochLog(NamedTuple):
    """Losses of every pass (passes,) and the parts of the loss, each (passes,)."""

    losses: Float[Array, " passes"]
    parts: dict[str, Float[Array, " passes"]]


@dataclass(frozen=True)
class EpochPlan:
    """What is fixed before compilation.

    Attributes:
        batch_size: interactions per batch; the last batch holds the rest.
        schedule: batch number of every pass, in order.
        keep_stale: whether to return the parameters before the last update.
        layout: how arrays are split over several devices; None on one.
    """

    batch_size: int
    schedule: tuple[int, ...]
    keep_stale: bool = False
    layout: Layout | None = None

    def epoch_loss(self, losses: Any) -> float:
        """The epoch's loss, of those of its passes (passes,) on the host: the published one adds up first passes."""
        first_passes = np.unique(np.asarray(self.schedule), return_index=True)[1]
        return float(np.asarray(losses)[first_passes].sum(dtype=np.float64))


class SplitModel(NamedTuple):
    """A model taken apart for jit: what is static, what is trained, what is redrawn and what is constant."""

    graphdef: nnx.GraphDef[Recommender]
    params: Variables
    epoch_state: Variables
    constants: Variables


def split_model(model: Recommender) -> SplitModel:
    """Split a model by the types of its variables (see `models/base.py`)."""
    return SplitModel._make(nnx.split(model, nnx.Param, EpochState, ...))


def training_data(data: Interactions) -> TrainingData:
    """Put the training interactions on the device."""
    return TrainingData(jnp.asarray(data.train[:, 0]), jnp.asarray(data.train[:, 1]), user_history(data))


def run_epoch(
    graphdef: nnx.GraphDef[Recommender],
    tx: optax.GradientTransformation,
    plan: EpochPlan,
    state: TrainState,
    constants: Variables,
    train: TrainingData,
    key: Array,
) -> tuple[TrainState, EpochLog]:
    """Train one epoch: resample, shuffle, draw negatives, scan over the passes.

    Args:
        graphdef, tx, plan: static; the model's structure, the optimizer chain and the order of passes.
        state: parameters and states before the epoch.
        constants: the model's frozen variables and scalar hyper-parameters.
        train: training interactions.
        key: the epoch's key; everything random in the epoch follows from it.
    """
    resample_key, order_key, negative_key, pass_key = jax.random.split(key, 4)
    hold = hold_of(plan.layout)
    constants = hold(constants)
    model = nnx.merge(graphdef, state.params, state.epoch_state, constants)
    for name, value in model.resample(resample_key).items():
        getattr(model, name).set_value(everywhere(value))
    epoch_state = nnx.state(model, EpochState)
    samples = everywhere(_samples(train, model.uses_negatives, order_key, negative_key))

    def step(batches: Batch, carry: Any, position: Any) -> tuple[Any, EpochLog]:
        carry, log = train_pass(graphdef, tx, epoch_state, constants, pass_key, batches, carry, position, hold)
        return hold(carry), log

    carry = hold((state.params, restart_epoch(state.opt_state)))
    segments = _segments(samples, plan)
    stale = None
    logs = []
    for number, (batches, indices, numbers) in enumerate(segments, start=1):
        if plan.keep_stale and number == len(segments):
            stale = evaluation_params(carry[1], carry[0])
        carry, log = jax.lax.scan(partial(step, batches), carry, (jnp.asarray(indices), jnp.asarray(numbers)))
        logs.append(log)
    log = jax.tree.map(lambda *parts: jnp.concatenate(parts), *logs)
    return TrainState(carry[0], next_epoch(carry[1]), epoch_state, stale), log


def _samples(train: TrainingData, negatives: bool, order_key: Array, negative_key: Array) -> Batch:
    """The epoch's interactions in a fresh random order, each with its own negative, (n_train,) each."""
    order = shuffle(order_key, train.users.shape[0])
    users, positives = train.users[order], train.items[order]
    drawn = sample_negatives(negative_key, users, train.history) if negatives else positives
    return Batch(users, positives, drawn)


def _segments(samples: Batch, plan: EpochPlan) -> list[tuple[Batch, np.ndarray, np.ndarray]]:
    """The scans of an epoch: the full batches, then the last partial one (another shape, so a program of its own).

    Each segment is (batches with a leading axis, batch index of each pass within them, number of each pass). With
    `keep_stale` the very last pass is a segment of its own.
    """
    schedule = np.asarray(plan.schedule, np.int32)
    numbers = np.arange(len(schedule), dtype=np.int32)
    n_full = samples.users.shape[0] // plan.batch_size
    cut = n_full * plan.batch_size
    full = jax.tree.map(lambda x: x[:cut].reshape(n_full, plan.batch_size), samples)
    rest = jax.tree.map(lambda x: x[None, cut:], samples)
    in_full = schedule < n_full
    segments = [(full, schedule[in_full], numbers[in_full])]
    segments.append((rest, np.zeros_like(schedule[~in_full]), numbers[~in_full]))
    segments = [segment for segment in segments if len(segment[1])]
    if plan.keep_stale:
        batches, indices, passes = segments.pop()
        segments += [(batches, indices[:-1], passes[:-1])] if len(indices) > 1 else []
        segments.append((batches, indices[-1:], passes[-1:]))
    return segments


def train_pass(
    graphdef: nnx.GraphDef[Recommender],
    tx: optax.GradientTransformation,
    epoch_state: Variables,
    constants: Variables,
    pass_key: Array,
    batches: Batch,
    carry: tuple[Variables, optax.OptState],
    position: tuple[Int[Array, ""], Int[Array, ""]],
    hold: Callable[[Variables], Variables] = lambda params: params,
) -> tuple[tuple[Variables, optax.OptState], EpochLog]:
    """One gradient and one update.

    Forms that need more gradients get `grad_fn(params, pass_index)`, that of the same batch, and
    `sample_grad_fn(params, index)`, that of one of the `n_samples` interactions in the segment's batches. What a form
    does not call is not in the program.
    """
    params, opt_state = carry
    index, number = position
    batch = jax.tree.map(lambda x: x[index], batches)
    key = jax.random.fold_in(pass_key, number)

    def loss_fn(params: Variables, key: Array = key, batch: Batch = batch) -> tuple[Array, dict[str, Array]]:
        # Held here, the gradient is held as well, and the update then sends nothing.
        return nnx.merge(graphdef, hold(params), epoch_state, constants).loss(batch, key)

    gradient: Callable[..., tuple[Variables, Any]] = jax.grad(loss_fn, has_aux=True)

    def grad_fn(params: Variables, pass_index: Any) -> Variables:
        # 2**30 keeps these keys apart from the pass numbers.
        return gradient(params, jax.random.fold_in(key, 2**30 + pass_index))[0]

    def sample_grad_fn(params: Variables, index: Any) -> Variables:
        sample = jax.tree.map(lambda x: x.reshape(-1)[index][None], batches)
        # A second fold: an index may be as large as the numbers that tell the other keys apart.
        sample_key = jax.random.fold_in(jax.random.fold_in(key, 2**30 - 1), index)
        return gradient(params, sample_key, sample)[0]

    def value_fn(params: Variables) -> Array:
        return loss_fn(params)[0]

    (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = update_with(
        tx.update,
        grads,
        opt_state,
        params,
        value=loss,
        grad=grads,
        value_fn=value_fn,
        obj_fn=value_fn,
        grad_fn=grad_fn,
        sample_grad_fn=sample_grad_fn,
        n_samples=batches.users.size,
    )
    return (optax.apply_updates(params, updates), opt_state), EpochLog(loss, parts)
