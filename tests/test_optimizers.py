"""Optimizers by name follow PyTorch's rules, written out here in numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgrad_jax.errors import UserError
from mgrad_jax.optimizers import make_optimizer, optimizer_names

STEPS, RATE = 6, 0.05
GRADS = np.random.default_rng(0).normal(size=(STEPS, 5)) * np.array([1.0, 1e-3, 1e-6, 1e-9, 0.0])
START = np.linspace(-1.0, 1.0, 5)


def torch_adam(p: np.ndarray, g: np.ndarray, state: dict[str, Any], t: int) -> np.ndarray:
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g * g
    root = np.sqrt(state["v"]) / np.sqrt(1 - 0.999**t)
    return p - RATE / (1 - 0.9**t) * state["m"] / (root + 1e-8)


def torch_sgd(p: np.ndarray, g: np.ndarray, state: dict[str, Any], t: int) -> np.ndarray:
    return p - RATE * g


def torch_momentum(p: np.ndarray, g: np.ndarray, state: dict[str, Any], t: int) -> np.ndarray:
    state["m"] = g if t == 1 else 0.9 * state["m"] + g
    return p - RATE * state["m"]


def torch_rmsprop(p: np.ndarray, g: np.ndarray, state: dict[str, Any], t: int) -> np.ndarray:
    state["v"] = 0.99 * state.get("v", 0.0) + 0.01 * g * g
    return p - RATE * g / (np.sqrt(state["v"]) + 1e-8)


def torch_adagrad(p: np.ndarray, g: np.ndarray, state: dict[str, Any], t: int) -> np.ndarray:
    state["v"] = state.get("v", 0.0) + g * g
    return p - RATE * g / (np.sqrt(state["v"]) + 1e-10)


def run(tx: optax.GradientTransformation) -> np.ndarray:
    params = jnp.asarray(START)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grads in GRADS:
        updates, state = update(jnp.asarray(grads), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "arguments", "rule"),
    [
        ("adam", {}, torch_adam),
        ("sgd", {}, torch_sgd),
        ("sgd", {"momentum": 0.9}, torch_momentum),
        ("rmsprop", {}, torch_rmsprop),
        ("adagrad", {}, torch_adagrad),
    ],
)
def test_follows_pytorch(name: str, arguments: dict[str, Any], rule: Any, weight_decay: float) -> None:
    expected, state = START, {}
    for t, grads in enumerate(GRADS, start=1):
        expected = rule(expected, grads + weight_decay * expected, state, t)
    ours = run(make_optimizer(name, RATE, weight_decay=weight_decay, **arguments))
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_descends_and_keeps_dtypes(name: str) -> None:
    params = {"matrix": jnp.ones((3, 2)), "half": jnp.ones(4, jnp.bfloat16)}
    tx = make_optimizer(name, 1e-2)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)  # the gradient of |p|^2 / 2
    for leaf, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert update.dtype == leaf.dtype
        assert bool(jnp.all(update < 0))


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "adagrad", "adamw"])
def test_a_grid_of_rates_and_decays_is_traced(name: str) -> None:
    def step(rate: jax.Array, decay: jax.Array) -> jax.Array:
        tx = make_optimizer(name, rate, weight_decay=decay)
        params = jnp.ones(3)
        return tx.update(jnp.full(3, 0.5), tx.init(params), params)[0]

    rates, decays = jnp.array([0.1, 0.2]), jnp.array([0.0, 0.3])
    together = jax.jit(jax.vmap(step))(rates, decays)
    for i in range(2):
        np.testing.assert_allclose(together[i], step(rates[i], decays[i]), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamm", {}, "unknown optimizer 'adamm'; choose one of adabelief, adagrad, adam,"),
        ("adam", {"momentum": 0.9}, "adam has no argument 'momentum'; choose among b1, b2, eps."),
        ("adabelief", {"weight_decay": 0.1}, "adabelief has no weight decay"),
    ],
)
def test_bad_input_is_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_optimizer(name, 0.1, **arguments)
    assert message in str(error.value)
