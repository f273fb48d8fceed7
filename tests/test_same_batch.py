"""The check that both passes of a mirror batch read the same batch, for loops that call `update` themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from mgrad_jax import checked, mirror_gradient, mirror_step, replay, second_pass_pending
from mgrad_jax.mirror import pass_schedule
from mgrad_jax.same_batch import _fingerprint

NESTS = {
    "link": lambda: optax.chain(checked(mirror_gradient(interval=3)), optax.adam(0.1)),
    "chain": lambda: checked(optax.chain(mirror_gradient(interval=3), optax.adam(0.1))),
    "replay": lambda: optax.chain(checked(replay(3)), optax.adam(0.1)),
}
every_nest = pytest.mark.parametrize("nest", NESTS)


def loss(params, x):
    return jnp.mean((x * params - 1.0) ** 2)


def run(tx, batches, order, jit):
    params = jnp.ones(2)
    state = tx.init(params)

    def one_pass(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params, batch=x)
        return optax.apply_updates(params, updates), state

    one_pass = jax.jit(one_pass) if jit else one_pass
    for number in order:
        params, state = one_pass(params, state, batches[number])
    return params


BATCHES = jnp.arange(1.0, 9.0).reshape(4, 2)


@every_nest
def test_one_update_a_batch_is_told_from_two(nest):
    tx = NESTS[nest]()
    order = pass_schedule(tx.init(jnp.ones(2)), 4)
    assert order.tolist() == [0, 0, 1, 2, 3, 3]
    right, jitted = (run(tx, BATCHES, order, jit) for jit in (False, True))
    np.testing.assert_allclose(right, jitted, rtol=1e-6)
    assert bool(jnp.all(jnp.isfinite(right)))
    with pytest.raises(ValueError, match="another batch than the first: call `update` once more"):
        run(tx, BATCHES, range(4), jit=False)
    assert bool(jnp.all(jnp.isnan(run(tx, BATCHES, range(2), jit=True))))


@every_nest
def test_the_check_changes_no_number(nest):
    plain = optax.chain(replay(3) if nest == "replay" else mirror_gradient(interval=3), optax.adam(0.1))
    results = []
    for tx in (plain, NESTS[nest]()):
        params, step = jnp.ones(2), jax.jit(mirror_step(loss, tx))
        state = tx.init(params)
        for x in BATCHES:
            params, state, _ = step(params, state, x)
        results.append(params.tolist())
    assert results[0] == results[1]


def test_a_caller_without_a_batch_gets_a_sentence():
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=NESTS["link"]())
    with pytest.raises(ValueError, match=r"pass `batch=`.*TrainState.apply_gradients.*mirror_step"):
        jax.jit(lambda state: state.apply_gradients(grads=state.params))(state)


def test_runs_under_vmap_and_scan_with_the_state_as_a_fixed_point():
    tx = NESTS["link"]()
    params = jnp.ones((3, 2))

    def member(params, numbers):
        def one_pass(carry, number):
            updates, state = tx.update(carry[0], carry[1], carry[0], batch=number)
            return (optax.apply_updates(carry[0], updates), state), second_pass_pending(state)

        return jax.lax.scan(one_pass, (params, tx.init(params)), numbers)[0][0]

    numbers = jnp.asarray([[0, 0, 1, 2], [0, 1, 2, 3], [5, 5, 5, 7]])
    result = jax.jit(jax.vmap(member))(params, numbers)
    assert jnp.isnan(result[:, 0]).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_dtypes_are_kept_under_strict_promotion(dtype):
    tx, grads = checked(mirror_gradient(interval=1)), jnp.ones(2, dtype)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(grads)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(grads, state, batch=grads)
            assert updates.dtype == dtype
    assert bool(jnp.all(jnp.isfinite(updates)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0, 1),
        (jnp.asarray([1.0, 2.0]), jnp.asarray([2.0, 1.0])),
        (jnp.asarray([1.0, 2.0], jnp.bfloat16), jnp.asarray([1.0, 2.0 + 2**-6], jnp.bfloat16)),
        (jnp.asarray([1 + 2j]), jnp.asarray([2 + 1j])),
        (jnp.asarray([1, 2], jnp.int8), jnp.asarray([2, 1], jnp.int8)),
        (jnp.asarray([True, False]), jnp.asarray([False, True])),
        (jax.random.key(0), jax.random.key(1)),
        ((1, 2), (2, 1)),
        ({"x": jnp.ones(2), "y": jnp.zeros(2)}, {"x": jnp.zeros(2), "y": jnp.ones(2)}),
        (jnp.zeros(2), jnp.zeros(3)),
        (np.float32(0.1), np.float32(0.2)),
    ],
)
def test_fingerprints_tell_values_and_places_apart(one, other):
    assert int(_fingerprint(one)) == int(_fingerprint(jax.tree.map(jnp.array, one)))
    assert int(_fingerprint(one)) != int(_fingerprint(other))


def test_what_is_no_array_is_left_out():
    assert int(_fingerprint(("text", 1))) == int(_fingerprint((1,)))


def test_random_batches_do_not_collide():
    keys = jax.random.split(jax.random.key(3), 2000)
    prints = jax.jit(jax.vmap(lambda key: _fingerprint(jax.random.randint(key, (32,), 0, 4))))(keys)
    assert len(set(prints.tolist())) == 2000
