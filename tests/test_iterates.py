"""Parameters to evaluate with: found in any nest, and the parameters themselves where nothing else is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mgrad_jax import evaluation_params, mirror_gradient, mirror_step, mirrored, sam

FREE = optax.contrib.schedule_free_sgd


def start():
    return {"a": jnp.arange(1.0, 4.0), "b": jnp.full(2, -2.0)}


def loss(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def trained(tx, params, n=4):
    state, step = tx.init(params), jax.jit(mirror_step(loss, tx))
    for _ in range(n):
        params, state, _ = step(params, state)
    return params, state


def state_of(kind, opt_state):
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    (found,) = [node for node in nodes if isinstance(node, kind)]
    return found


@pytest.mark.parametrize(
    "nest",
    [
        lambda tx: tx,
        lambda tx: optax.chain(mirror_gradient(), tx),
        lambda tx: optax.apply_if_finite(optax.chain(mirror_gradient(), optax.chain(tx)), 3),
        mirrored,
        sam,
        lambda tx: optax.MultiSteps(tx, 2),
    ],
    ids=["alone", "behind the mirror", "nested", "mirrored", "sam", "accumulated"],
)
def test_averages_are_found_in_any_nest(nest):
    params, state = trained(nest(FREE(0.1)), start())
    averages = evaluation_params(state, params)
    inner = state_of(optax.contrib.ScheduleFreeState, state)
    jax.tree.map(np.testing.assert_array_equal, averages, optax.contrib.schedule_free_eval_params(inner, params))
    assert bool(jnp.any(averages["a"] != params["a"]))


def test_a_group_with_averages_leaves_the_other_as_it_is():
    params = start()
    tx = optax.partition({"free": FREE(0.1), "plain": optax.sgd(0.1)}, {"a": "free", "b": "plain"})
    params, state = trained(tx, params)
    found = evaluation_params(state, params)
    alone, inner = trained(FREE(0.1), {"a": start()["a"]})
    np.testing.assert_allclose(found["a"], optax.contrib.schedule_free_eval_params(inner, alone)["a"], rtol=1e-6)
    assert found["b"] is params["b"]


def test_two_groups_with_averages_are_both_found():
    tx = optax.partition({"fast": FREE(0.1), "slow": FREE(0.01)}, {"a": "fast", "b": "slow"})
    params, state = trained(tx, start())
    found = evaluation_params(state, params)
    for name, rate in (("a", 0.1), ("b", 0.01)):
        alone, inner = trained(FREE(rate), {name: start()[name]})
        np.testing.assert_allclose(found[name], evaluation_params(inner, alone)[name], rtol=1e-6)


def test_lookahead_is_evaluated_with_its_slow_parameters():
    tx = optax.lookahead(optax.chain(mirror_gradient(interval=2), optax.sgd(0.1)), 5, 0.5)
    pair = optax.LookaheadParams.init_synced(jnp.ones(2))
    state, step = tx.init(pair), jax.jit(mirror_step(lambda pair: jnp.sum(pair.fast**2), tx))
    for _ in range(2):
        pair, state, _ = step(pair, state)
    assert evaluation_params(state, pair).tolist() == [1.0, 1.0]
    assert pair.fast.tolist() != [1.0, 1.0]
    with pytest.raises(ValueError, match="LookaheadParams"):
        evaluation_params(state, pair.fast)


def test_a_visible_sam_is_evaluated_where_it_is_not_perturbed():
    tx = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.5), sync_period=2)
    params = jnp.ones(2)
    state, seen = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((float(params[0]), float(evaluation_params(state, params)[0])))
    assert seen[0] == (2.0, 1.0)  # up the gradient, evaluated before
    assert seen[1][0] == seen[1][1] == pytest.approx(0.6)
    assert seen[2][1] == pytest.approx(0.6)


@pytest.mark.parametrize("tx", [optax.adam(0.1), mirrored(optax.sgd(0.1)), sam(optax.sgd(0.1)), optax.identity()])
def test_other_optimizers_are_evaluated_with_their_parameters(tx):
    params = start()
    assert evaluation_params(tx.init(params), params) is params


def test_one_average_inside_another_is_refused():
    inside = optax.contrib.schedule_free(FREE(0.1), 0.1)
    with pytest.raises(ValueError, match="Two optimizers, one inside the other"):
        evaluation_params(inside.init(start()), start())
    slow = optax.lookahead(FREE(0.1), 5, 0.5)
    pair = optax.LookaheadParams.init_synced(start())
    with pytest.raises(ValueError, match="Two optimizers, one inside the other"):
        evaluation_params(slow.init(pair), pair)


def test_works_under_jit_and_vmap_and_on_stacked_states():
    tx = FREE(0.1)

    def train(params):
        params, state = trained(tx, params)
        return params, state, evaluation_params(state, params)

    params, states, inside = jax.jit(jax.vmap(train))(jnp.arange(6.0).reshape(2, 3))
    np.testing.assert_allclose(evaluation_params(states, params), inside, rtol=1e-6)
    assert bool(jnp.any(inside != params))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_those_of_the_parameters(dtype):
    tx = optax.contrib.schedule_free_sgd(0.1, state_dtype=jnp.float32)
    params = jnp.ones(2, dtype)
    with jax.numpy_dtype_promotion("strict"):
        assert evaluation_params(tx.init(params), params).dtype == dtype


def test_variables_of_flax_are_understood():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(mirror_gradient(), FREE(0.5)), wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(jnp.ones((1, 2))) - 3.0) ** 2))(model))
    params = nnx.state(model, nnx.Param)
    averages = evaluation_params(optimizer.opt_state, params)
    assert jax.tree.structure(averages) == jax.tree.structure(params)
    assert bool(jnp.any(averages["kernel"][...] != params["kernel"][...]))
