"""Products of graphs over several devices: equal to those of one, and nothing sent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax import devices
from mgrad_jax.devices import COLUMNS
from mgrad_jax.graph import (
    edge_dot,
    knn_graph,
    knn_indices,
    mean_bipartite,
    normalized_bipartite,
    propagate,
    propagate_bipartite,
)
from mgrad_jax.graph.sparse import replace_values

USERS, ITEMS = 13, 9
rng = np.random.default_rng(0)
EDGES = np.unique(rng.integers((0, 0), (USERS, ITEMS), (60, 2)), axis=0)


def bipartite(build=normalized_bipartite):
    return build(EDGES[:, 0], EDGES[:, 1], USERS, ITEMS, dtype=jnp.float64)


def together(x):
    """A number that depends on every entry, each in its own way."""
    return sum(jnp.sum(jnp.sin(part) * jnp.arange(part.size).reshape(part.shape)) for part in jax.tree.leaves(x))


CASES = {
    "propagate": lambda x, values: propagate(replace_values(bipartite(mean_bipartite), values), x),
    "propagate_symmetric": lambda x, values: propagate(bipartite(), x) + values.sum(),
    "propagate_bipartite": lambda x, values: (*propagate_bipartite(bipartite(), x[:USERS], x[USERS:]), values),
    "edge_dot": lambda x, values: edge_dot(bipartite(mean_bipartite), x) * values,
}
EXACT = {"propagate", "propagate_symmetric", "propagate_bipartite"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dim", [16, 5])
@pytest.mark.parametrize("name", CASES)
def test_value_and_derivatives_are_those_of_one_device(name, dim):
    x = jnp.asarray(rng.normal(size=(USERS + ITEMS, dim)))
    values = jnp.asarray(rng.normal(size=2 * len(EDGES)))

    def computed(x, values):
        value, pull = jax.vjp(CASES[name], x, values)
        gradient = pull(jax.tree.map(jnp.cos, value))
        second = jax.jvp(jax.grad(lambda x: together(CASES[name](x, values))), (x,), (jnp.cos(x),))[1]
        return value, gradient, second

    expected = jax.jit(computed)(x, values)
    for n in (2, 8):
        mesh = devices.mesh(n)
        placed = jax.device_put(x, jax.NamedSharding(mesh, COLUMNS if dim % n == 0 else devices.WHOLE))
        with jax.set_mesh(mesh):
            found = jax.jit(computed)(placed, values)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), expected, found)
        if name in EXACT:
            jax.tree.map(np.testing.assert_array_equal, expected[0], found[0])


def test_a_graph_s_product_sends_nothing_there_and_back():
    graph, mesh = normalized_bipartite(EDGES[:, 0], EDGES[:, 1], USERS, ITEMS), devices.mesh(8)
    x = jax.device_put(jnp.ones((USERS + ITEMS, 16)), jax.NamedSharding(mesh, COLUMNS))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x: jax.vjp(lambda x: propagate(graph, jnp.sin(x)), x)[1](x)).lower(x).compile()
    assert not re.search(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", program.as_text())
    assert program.output_shardings[0].spec == COLUMNS


def test_members_of_a_grid_go_through_the_product_on_several_devices():
    graph, mesh = knn_graph(rng.normal(size=(ITEMS, 4)).astype(np.float32), 3), devices.mesh(2)
    x = jnp.asarray(rng.normal(size=(3, ITEMS, 4)), jnp.float32)
    product = jax.vmap(lambda x: propagate(graph, x))
    expected = jax.jit(product)(x)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(product)(x), expected)


def test_a_mesh_that_is_left_and_entered_again_finds_its_own_programs():
    graph = normalized_bipartite(EDGES[:, 0], EDGES[:, 1], USERS, ITEMS)
    x, product = jnp.ones((USERS + ITEMS, 16)), jax.jit(lambda x: propagate(graph, x))
    expected = product(x)
    for _ in range(2):
        for n in (4, 2):
            with jax.set_mesh(devices.mesh(n)):
                result = product(x)
                assert len(result.sharding.device_set) == n
                np.testing.assert_array_equal(result, expected)
        assert len(product(x).sharding.device_set) == 1


@pytest.mark.parametrize("n", [2, 8])
def test_nearest_items_are_the_same_on_several_devices_ties_included(n):
    rng = np.random.default_rng(0)
    features = rng.integers(-1, 2, (333, 7)).astype(np.float32)
    features[~features.any(axis=1)] = 1  # of many rows others have exactly the same direction
    expected = knn_indices(features, 9, block=64)
    with jax.set_mesh(devices.mesh(n)):
        found = knn_indices(features, 9, block=64)
    np.testing.assert_array_equal(found, expected)
