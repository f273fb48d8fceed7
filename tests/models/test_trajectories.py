"""Whole Mirror Gradient trajectories of the published trainer: two epochs of seven batches, eight settings."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden import created, graph_of, recorded, recorded_parameters

from mgrad_jax import interop, mirror_gradient, mirror_step, mirrored
from mgrad_jax.data import Batch
from mgrad_jax.mirror import pass_schedule, restart_epoch
from mgrad_jax.models import Constant, Recommender
from mgrad_jax.optimizers import make_optimizer

BATCHES_PER_EPOCH = 7
SETTINGS: dict[str, dict[str, Any]] = {
    "vbpr": {"reg_weight": 0.01},
    "freedom": {"dropout": 0.0, "reg_weight": 0.01},
}
ZERO_GRADIENT = ("image_trs.bias", "text_trs.bias")
RUNS = [
    (name, run)
    for name in SETTINGS
    for run in ("adagrad", "adam", "adam_beta1", "adam_clip", "adam_plain", "rmsprop", "sgd", "sgd_alpha1")
    if (name, run) != ("freedom", "sgd_alpha1")
]


def build(name: str, dtype: Any) -> Recommender:
    numbers = recorded(f"mg_{name}")
    model = created(name, dtype=dtype, embedding_dim=8, **SETTINGS[name])
    if name == "freedom":
        model.graph = Constant(graph_of(numbers["graph/norm_adj"], dtype))
        model.item_graph = Constant(graph_of(numbers["graph/mm_adj"], dtype, symmetric=False))
    return interop.load_torch_state(model, recorded_parameters(f"mg_{name}"))


def transformation(name: str, run: str, form: str = "chain") -> optax.GradientTransformation:
    optimizer_name = run.split("_")[0]
    optimizer = make_optimizer(optimizer_name, 0.01)
    if run == "adam_plain":
        return optimizer
    alpha1 = 0.6 if run == "sgd_alpha1" else 1.0
    alpha2, interval = (0.3, 1) if run == "adam_beta1" else (0.2, 3)
    max_norm = 0.05 if run == "adam_clip" else None
    if form == "opaque":
        return mirrored(optimizer, alpha1, alpha2, interval, max_norm=max_norm)
    return optax.chain(mirror_gradient(alpha1, alpha2, interval, max_norm=max_norm), optimizer)


def batches(name: str) -> Batch:
    numbers = recorded(f"mg_{name}")
    return Batch(*(numbers[f"batch/{key}"].astype(np.int32) for key in ("users", "pos_items", "neg_items")))


@functools.cache
def loss_and_gradients(name: str, dtype: Any) -> Any:
    """Of parameters and a batch: one program for all runs of a model."""
    graphdef, _, rest = nnx.split(build(name, dtype), nnx.Param, ...)
    return jax.jit(jax.value_and_grad(lambda p, batch: nnx.merge(graphdef, p, rest).loss(batch, jax.random.key(0))[0]))


def train(name: str, tx: optax.GradientTransformation, dtype: Any) -> tuple[list[Any], list[list[float]]]:
    """Parameters after every batch, and the losses of every batch's passes, by the loop a user would write."""
    params = nnx.state(build(name, dtype), nnx.Param)
    state = tx.init(params)
    every = batches(name)

    @jax.jit
    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def one_pass(params: Any, state: Any, batch: Batch) -> tuple[Any, Any, Any]:
        loss, grads = loss_and_gradients(name, dtype)(params, batch)
        return *update(params, state, grads), loss

    trajectory, losses = [], []
    for epoch in range(2):
        state = restart_epoch(state)
        for index in pass_schedule(state, BATCHES_PER_EPOCH):
            t = epoch * BATCHES_PER_EPOCH + int(index)
            params, state, loss = one_pass(params, state, jax.tree.map(lambda x, t=t: x[t], every))
            if len(losses) == t:
                losses.append([])
                trajectory.append(None)
            losses[t].append(float(loss))
            trajectory[t] = params
    return trajectory, losses


def assert_trajectory(name: str, run: str, trajectory: list[Any], atol: float, leave_out: tuple[str, ...] = ()) -> None:
    numbers, model = recorded(f"mg_{name}"), build(name, jnp.float32)
    compared = 0
    for t, params in enumerate(trajectory):
        for path, value in nnx.to_flat_state(params):
            dotted = ".".join(map(str, path))
            key = f"traj/{run}/{t}/{model.published_names[dotted]}"
            if key in numbers and dotted not in leave_out:
                array = np.asarray(value[...])
                array = array.T if path[-1] == "kernel" else array
                np.testing.assert_allclose(array, numbers[key], atol=atol, err_msg=f"batch {t}: {dotted}")
                compared += 1
    assert compared >= 4


@pytest.mark.parametrize(("name", "run"), RUNS)
@pytest.mark.usefixtures("x64")
def test_trajectory_in_float64(name: str, run: str) -> None:
    numbers = recorded(f"mg_{name}")
    trajectory, losses = train(name, transformation(name, run), jnp.float64)
    assert_trajectory(name, run, trajectory, atol=1e-6)
    # The second pass's loss, where there is one, is what the published code logs; the first one is what it adds up.
    np.testing.assert_allclose([loss[-1] for loss in losses], numbers[f"traj/{run}/loss"], rtol=1e-9)
    np.testing.assert_allclose([loss[0] for loss in losses], numbers[f"traj/{run}/first_loss"], rtol=1e-9)
    totals = np.asarray([loss[0] for loss in losses]).reshape(2, BATCHES_PER_EPOCH).sum(axis=1)
    np.testing.assert_allclose(totals, numbers[f"traj/{run}/epoch_total_loss"], rtol=1e-9)


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_trajectory_in_float32(name: str, run: str) -> None:
    trajectory, losses = train(name, transformation(name, run), jnp.float32)
    assert_trajectory(name, run, trajectory, atol=1e-4, leave_out=ZERO_GRADIENT if name == "freedom" else ())
    np.testing.assert_allclose([loss[-1] for loss in losses], recorded(f"mg_{name}")[f"traj/{run}/loss"], rtol=1e-4)


@pytest.mark.parametrize("form", ["chain", "opaque"])
@pytest.mark.parametrize("run", ["adam", "sgd"])
@pytest.mark.usefixtures("x64")
def test_mirror_step_follows_the_same_trajectory(form: str, run: str) -> None:
    name = "vbpr"
    graphdef, params, rest = nnx.split(build(name, jnp.float64), nnx.Param, ...)
    tx = transformation(name, run, form)
    step = jax.jit(mirror_step(lambda p, b: nnx.merge(graphdef, p, rest).loss(b, jax.random.key(0))[0], tx))
    state, every, trajectory = tx.init(params), batches(name), []
    for t in range(2 * BATCHES_PER_EPOCH):
        if t == BATCHES_PER_EPOCH:
            state = restart_epoch(state)
        params, state, _ = step(params, state, jax.tree.map(lambda x, t=t: x[t], every))
        trajectory.append(params)
    assert_trajectory(name, run, trajectory, atol=1e-6)
