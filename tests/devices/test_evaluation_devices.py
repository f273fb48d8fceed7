"""Evaluation over several devices: equal to the bit, given equal vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax import devices
from mgrad_jax.data import load_interactions
from mgrad_jax.evaluation.ranking import by_user, full_sort_metrics, make_eval_split, split_over_devices, user_metrics


@pytest.fixture(scope="module")
def data():
    return load_interactions("demo")


@pytest.fixture(scope="module")
def vectors(data):
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(n, 16)).astype(np.float32) for n in (data.n_users, data.n_items))
    items[1] = items[0]  # a tie
    users[3] = np.nan  # scores that rank last
    return jnp.asarray(users), jnp.asarray(items)


@pytest.mark.parametrize("block", [512, 37])  # fewer blocks than devices, and more
@pytest.mark.parametrize("n", [2, 8])
def test_metrics_are_equal_to_the_bit(data, vectors, n, block):
    split = make_eval_split(data, "test", (5, 20), block=block)
    expected = jax.jit(full_sort_metrics)(split, *vectors)
    mesh = devices.mesh(n)
    spread = split_over_devices(split, mesh)
    assert spread.users.shape[0] % n == 0
    assert spread.users.addressable_shards[0].data.shape[0] == spread.users.shape[0] // n
    with jax.set_mesh(mesh):
        found = jax.jit(full_sort_metrics)(spread, *vectors)
        per_user = jax.jit(user_metrics)(spread, *vectors)
    assert {name: float(x) for name, x in found.items()} == {name: float(x) for name, x in expected.items()}

    ids, values = by_user(split, jax.device_get(user_metrics(split, *vectors)))
    ids_spread, values_spread = by_user(spread, jax.device_get(per_user))
    np.testing.assert_array_equal(ids_spread, ids)
    jax.tree.map(np.testing.assert_array_equal, values_spread, values)


def test_a_split_that_is_not_spread_is_evaluated_all_the_same(data, vectors):
    split = make_eval_split(data, "test", (5, 20), block=37)
    expected = jax.jit(full_sort_metrics)(split, *vectors)
    with jax.set_mesh(devices.mesh(8)):
        found = jax.jit(full_sort_metrics)(split, *vectors)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
