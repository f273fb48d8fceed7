"""Sparse graphs: equal to dense ones in value, gradient and vmap; sampling; nearest neighbours; recorded numbers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.errors import UserError
from mgrad_jax.graph import (
    SparseGraph,
    bipartite_edges,
    blend_graphs,
    drop_entries,
    edge_dot,
    edge_softmax,
    keep_edges,
    knn_graph,
    knn_indices,
    mean_bipartite,
    normalized_bipartite,
    propagate,
    propagate_bipartite,
    prune_edges,
    replace_values,
    sparse_graph,
    with_transpose,
)

GOLDEN = Path(__file__).parent / "golden"


def random_dense(shape: tuple[int, int], seed: int = 0, *, symmetric: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=shape) * (rng.random(shape) < 0.3)
    dense[min(2, shape[0] - 1)] = 0.0  # an empty row
    return dense + dense.T if symmetric else dense


def as_graph(dense: np.ndarray, *, symmetric: bool = False, dtype: Any = jnp.float32) -> SparseGraph:
    rows, columns = np.nonzero(dense)
    return sparse_graph(rows, columns, dense[rows, columns], dense.shape, symmetric=symmetric, dtype=dtype)


CASES = {
    "rectangular": random_dense((7, 5)),
    "square": random_dense((9, 9), 1),
    "symmetric": random_dense((8, 8), 2, symmetric=True),
    "one node": np.ones((1, 1)),
    "no entries": np.zeros((4, 3)),
}


@pytest.fixture(params=["on a CPU", "elsewhere"])
def lowering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The product as a CPU computes it, and, on this CPU too, as every other platform does."""
    taken = []

    def elsewhere(*operands: Any, cpu: Any, default: Any) -> Any:
        del cpu
        taken.append(default)
        return default(*operands)

    if request.param == "elsewhere":
        monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
    yield
    assert bool(taken) == (request.param == "elsewhere")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures("lowering")
def test_propagate_equals_the_dense_product(case: str, dtype: Any) -> None:
    dense = CASES[case]
    graph = as_graph(dense, symmetric=case == "symmetric")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(dense.shape[1], 3)), dtype)
    y = jax.jit(lambda graph, x: propagate(graph, x))(graph, x)  # a function that is not compiled yet
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.15
    np.testing.assert_allclose(np.asarray(y, np.float64), dense @ np.asarray(x, np.float64), atol=tolerance)
    np.testing.assert_allclose(graph.todense(), dense, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("x64", "lowering")
def test_derivatives_equal_the_dense_ones(case: str) -> None:
    """In x and in the values; both of first order and, in x, of second."""
    dense = CASES[case]
    graph = as_graph(dense, symmetric=case == "symmetric", dtype=jnp.float64)
    rows, columns = np.nonzero(dense)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(dense.shape[1], 3)))

    def sparse_loss(values: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(propagate(graph.__class__(values, *structure), x)))

    def dense_loss(values: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(jnp.zeros(dense.shape).at[rows, columns].set(values) @ x))

    structure = (graph.indices, graph.indptr, graph.shape, graph.transpose)
    ours, expected = (jax.jit(jax.grad(loss, (0, 1)))(graph.data, x) for loss in (sparse_loss, dense_loss))
    for found, dense_one in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, dense_one, atol=1e-12)


@pytest.mark.parametrize("batched", ["x", "values", "both"])
@pytest.mark.parametrize("case", ["rectangular", "symmetric"])
@pytest.mark.usefixtures("x64")
def test_vmap_equals_a_loop(case: str, batched: str) -> None:
    """vmap, vmap of the gradient, and the gradient of vmap."""
    dense = CASES[case]
    graph = as_graph(dense, symmetric=case == "symmetric", dtype=jnp.float64)
    rng = np.random.default_rng(0)
    many_x = jnp.asarray(rng.normal(size=(4, dense.shape[1], 3)))
    many_values = jnp.asarray(rng.normal(size=(4, graph.nnz)))
    x = many_x if batched != "values" else many_x[0]
    values = many_values if batched != "x" else graph.data
    axes = (0 if batched != "x" else None, 0 if batched != "values" else None)

    def run(values: Any, x: Any) -> Any:
        return propagate(SparseGraph(values, graph.indices, graph.indptr, graph.shape, graph.transpose), x)

    def loss(values: Any, x: Any) -> Any:
        return jnp.sum(jnp.cos(run(values, x)))

    def member(array: Any, axis: int | None, index: int) -> Any:
        return array if axis is None else array[index]

    def loop(function: Any) -> list[Any]:
        return [function(member(values, axes[0], i), member(x, axes[1], i)) for i in range(4)]

    np.testing.assert_allclose(jax.jit(jax.vmap(run, axes))(values, x), jnp.stack(loop(jax.jit(run))), atol=1e-12)
    gradient = jax.grad(loss, argnums=(0, 1))
    together = jax.jit(jax.vmap(gradient, axes))(values, x)
    all_alone = loop(jax.jit(gradient))
    for index, alone in enumerate(all_alone):
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[index], theirs, atol=1e-12)
    total = jax.jit(jax.grad(lambda v, x: jnp.sum(jax.vmap(loss, axes)(v, x)), argnums=(0, 1)))(values, x)
    for ours, axis, parts in zip(total, axes, zip(*all_alone, strict=True), strict=True):
        np.testing.assert_allclose(ours, jnp.stack(parts) if axis == 0 else sum(parts), atol=1e-11)


def test_graphs_are_arguments_and_do_not_compile_again() -> None:
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(graph: SparseGraph, x: Any) -> Any:
        return propagate(graph, x)

    graph = as_graph(CASES["square"])
    for scale in (1.0, 2.0, 3.0):
        run(dataclasses.replace(graph, data=graph.data * scale), jnp.ones((9, 2)) * scale)


def test_repeated_entries_add_up_and_wrong_ids_are_refused() -> None:
    rows, columns, values = np.array([[0, 1, 0], [1, 0, 1], [1, 2, 3]])
    graph = sparse_graph(rows, columns, values, (2, 2))
    np.testing.assert_array_equal(graph.todense(), [[0, 4], [2, 0]])
    with pytest.raises(ValueError, match="column ids run from 2 to 2; the graph has 2 columns"):
        sparse_graph(rows[:1], columns[:1] + 1, values[:1], (2, 2))
    with pytest.raises(ValueError, match=r"x has shape \(3, 1\); the graph needs \(2, dim\)"):
        propagate(graph, jnp.ones((3, 1)))


@pytest.mark.parametrize(("file", "eps"), [("bm3", 1e-7), ("slmrec", 1e-8)])
def test_normalisation_equals_the_recorded_graph(file: str, eps: float) -> None:
    numbers = np.load(GOLDEN / f"{file}.npz")
    users, items = np.nonzero(numbers["graph/train_matrix"])
    repeated = np.concatenate([users, users[:5]]), np.concatenate([items, items[:5]])
    graph = normalized_bipartite(*repeated, 40, 30, eps)
    np.testing.assert_allclose(graph.todense(), numbers["graph/norm_adj"], atol=1e-6)


def test_mean_graph_averages_neighbours() -> None:
    graph = mean_bipartite(np.array([0, 0, 1]), np.array([0, 1, 1]), 3, 2)
    x = jnp.asarray([[1.0], [2.0], [9.0], [4.0], [8.0]])
    np.testing.assert_allclose(propagate(graph, x)[:, 0], [6.0, 8.0, 0.0, 1.0, 1.5])


# Sampling edges


def small_edges() -> Any:
    users, items = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    return bipartite_edges(users, items, 3, 2)


def test_weighted_pruning_is_sampling_without_replacement() -> None:
    """The share of every pair of kept edges against the exact probability of drawing one after the other."""
    edges, n = small_edges(), 30_000
    weights = np.exp(np.asarray(edges.log_weights))

    @jax.jit
    @jax.vmap
    def kept(key: Any) -> Any:
        dense = prune_edges(key, edges, 2).todense()
        return dense[edges.users, edges.n_users + edges.items] > 0

    drawn = np.asarray(kept(jax.random.split(jax.random.key(0), n)))
    assert (drawn.sum(axis=1) == 2).all()
    total = weights.sum()
    for a, b in itertools.combinations(range(4), 2):
        p = weights[a] / total * weights[b] / (total - weights[a]) + weights[b] / total * weights[a] / (
            total - weights[b]
        )
        share = (drawn[:, a] & drawn[:, b]).mean()
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / n), (a, b)


def test_uniform_pruning_treats_all_edges_alike() -> None:
    edges, n = small_edges(), 20_000

    def kept(key: Any) -> Any:
        return prune_edges(key, edges, 1, weighted=False).todense()[edges.users, 3 + edges.items] > 0

    share = np.asarray(jax.jit(jax.vmap(kept))(jax.random.split(jax.random.key(1), n))).mean(axis=0)
    assert np.all(np.abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / n))


def test_kept_edges_are_normalised_by_their_own_degrees() -> None:
    graph = keep_edges(small_edges(), jnp.array([True, True, False, True]), 3)
    expected = normalized_bipartite(np.array([0, 0, 2]), np.array([0, 1, 1]), 3, 2).todense()
    np.testing.assert_allclose(graph.todense(), expected, atol=1e-6)


def test_dropped_entries_are_unbiased_and_have_the_right_derivative() -> None:
    dense = np.abs(CASES["symmetric"])
    graph = with_transpose(as_graph(dense, symmetric=True))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: drop_entries(key, graph, 0.4).todense()))(keys)
    np.testing.assert_allclose(np.mean(drawn, axis=0), dense, atol=0.15 * dense.max())
    dropped = drop_entries(keys[0], graph, 0.4)
    pulled = jax.jit(lambda graph: jax.vjp(lambda x: propagate(graph, x), jnp.ones((8, 2)))[1](jnp.eye(8, 2))[0])
    np.testing.assert_allclose(pulled(dropped), np.asarray(dropped.todense()).T @ np.eye(8, 2), rtol=1e-5)
    with pytest.raises(ValueError, match="call with_transpose on it once"):
        replace_values(as_graph(dense, symmetric=True), graph.data)


# Attention over edges


def user_item_graph() -> SparseGraph:
    users, items = np.nonzero(CASES["rectangular"])  # one user has no item
    return mean_bipartite(users, items, *CASES["rectangular"].shape, dtype=jnp.float64)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_attention_over_edges_equals_dense_attention_alone_and_under_vmap() -> None:
    graph = user_item_graph()
    stored = graph.todense() != 0
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, graph.shape[0], 4)))

    def ours(x: Any) -> Any:
        return propagate(replace_values(graph, edge_softmax(graph, edge_dot(graph, x))), x)

    def theirs(x: Any) -> Any:
        logits = jnp.where(stored, x @ x.T, -jnp.inf)
        top = jnp.where(stored.any(axis=1), logits.max(axis=1), 0.0)[:, None]
        weights = jnp.where(stored, jnp.exp(logits - top), 0.0)
        return weights / (weights.sum(axis=1, keepdims=True) + 1e-16) @ x

    values, gradients = ([jax.vmap(g)(x) for g in forms] for forms in ((ours, theirs), map(_squared, (ours, theirs))))
    np.testing.assert_allclose(*values, atol=1e-12)
    np.testing.assert_allclose(*gradients, atol=1e-11)
    np.testing.assert_allclose(ours(x[0]), values[1][0], atol=1e-12)
    np.testing.assert_allclose(_squared(ours)(x[0]), gradients[1][0], atol=1e-11)


def value_and_pullback(function: Any, x: Any, cotangent: Any) -> tuple[Any, Any]:
    """The value, and the cotangent pulled back, in one program."""

    @jax.jit
    def run(x: Any, cotangent: Any) -> tuple[Any, Any]:
        value, pull = jax.vjp(function, x)
        return value, pull(cotangent)[0]

    return run(x, cotangent)


def _squared(form: Any) -> Any:
    return jax.grad(lambda x: jnp.sum(form(x) ** 2))


@pytest.mark.usefixtures("x64")
def test_edge_softmax_of_a_rectangular_graph_equals_the_dense_one() -> None:
    dense = CASES["rectangular"]
    graph, stored = as_graph(dense, dtype=jnp.float64), np.nonzero(dense)
    logits, pull = jnp.asarray(np.random.default_rng(0).normal(size=(2, graph.nnz)))

    def theirs(logits: Any) -> Any:
        weights = jnp.zeros(dense.shape).at[stored].set(jnp.exp(logits))
        return (weights / (weights.sum(axis=1, keepdims=True) + 1e-16))[stored]

    ours, back = value_and_pullback(lambda logits: edge_softmax(graph, logits), logits, pull)
    expected, expected_back = value_and_pullback(theirs, logits, pull)
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    np.testing.assert_allclose(back, expected_back, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("width", [0, 1, 3, 4, 11])
def test_the_directions_of_an_edge_pass_their_own_gradients(width: int) -> None:
    graph = user_item_graph()
    rng = np.random.default_rng(1)
    x, pull = jnp.asarray(rng.normal(size=(graph.shape[0], width))), jnp.asarray(rng.normal(size=graph.nnz))

    def expected(x: Any) -> Any:
        return jnp.sum(x[graph.rows()] * x[graph.indices], axis=1)

    dots, back = value_and_pullback(lambda x: edge_dot(graph, x), x, pull)
    expected_dots, expected_back = value_and_pullback(expected, x, pull)
    np.testing.assert_allclose(dots, expected_dots, atol=1e-12)
    np.testing.assert_allclose(back, expected_back, atol=1e-12)


def test_edge_dot_wants_a_user_item_graph_with_its_transpose() -> None:
    x = jnp.ones((3, 2))
    pairs = np.asarray([0, 1]), np.asarray([0, 0]), 2, 1
    for graph in (normalized_bipartite(*pairs), as_graph(np.eye(3))):
        with pytest.raises(ValueError, match="user-item graph with its transpose"):
            edge_dot(graph, x)


# Nearest neighbours


@pytest.mark.parametrize(("n", "k", "block"), [(30, 10, 1024), (30, 4, 7), (31, 31, 8), (5, 1, 5)])
def test_nearest_neighbours_are_exact_in_blocks_of_any_size(n: int, k: int, block: int) -> None:
    features = np.random.default_rng(n).normal(size=(n, 6)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.argsort(-(unit @ unit.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.sort(knn_indices(features, k, block), axis=1), np.sort(expected, axis=1))


def test_equal_items_are_taken_in_the_order_of_their_ids() -> None:
    np.testing.assert_array_equal(knn_indices(np.ones((4, 2), np.float32), 2), [[0, 1]] * 4)


def test_item_graphs_equal_the_recorded_ones() -> None:
    numbers = np.load(GOLDEN / "freedom.npz")
    graphs = {m: knn_graph(np.load(GOLDEN / "tiny" / f"{m}_feat.npy"), 10) for m in ("image", "text")}
    for modality, graph in graphs.items():
        np.testing.assert_allclose(graph.todense(), numbers[f"graph/{modality}_adj"], atol=1e-7)
    blended = blend_graphs([(0.1, graphs["image"]), (0.9, graphs["text"])])
    np.testing.assert_allclose(blended.todense(), numbers["graph/mm_adj"], atol=1e-7)
    assert blended.nnz == np.count_nonzero(numbers["graph/mm_adj"])


def test_neighbours_of_bad_features_are_refused() -> None:
    features = np.ones((4, 3), np.float32)
    features[2] = 0.0
    with pytest.raises(UserError, match="feature row 2 is all zero or not finite"):
        knn_indices(features, 2)
    with pytest.raises(UserError, match="knn_k is 5; it must be between 1 and the number of items, 4"):
        knn_indices(features, 5)


def bipartite_case(kind: str) -> SparseGraph:
    users, items = np.random.default_rng(3).integers(0, [6, 4], (15, 2)).T
    build = mean_bipartite if kind == "mean" else normalized_bipartite
    graph = build(users, items, 6, 4, dtype=jnp.float64)
    if kind == "dropped":
        return drop_entries(jax.random.key(0), with_transpose(graph), 0.4)
    return dataclasses.replace(graph, n_users=None) if kind == "unmarked" else graph


@pytest.mark.parametrize("kind", ["symmetric", "mean", "dropped", "unmarked"])
@pytest.mark.usefixtures("x64")
def test_bipartite_propagation_equals_propagation(kind: str) -> None:
    """In value, in the derivatives of users, items and values, and under vmap."""
    graph = bipartite_case(kind)
    rng = np.random.default_rng(0)
    users, items = jnp.asarray(rng.normal(size=(2, 6, 3))), jnp.asarray(rng.normal(size=(2, 4, 3)))

    def apart(values: Any, users: Any, items: Any) -> Any:
        return jnp.concatenate(propagate_bipartite(dataclasses.replace(graph, data=values), users, items))

    def whole(values: Any, users: Any, items: Any) -> Any:
        return propagate(dataclasses.replace(graph, data=values), jnp.concatenate([users, items]))

    def derivatives(function: Any) -> Any:
        return jax.grad(lambda *arguments: jnp.sum(jnp.sin(function(*arguments))), (0, 1, 2))

    def assert_close(found: Any, expected: Any) -> None:
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-14), found, expected)

    for ours, dense in ((apart, whole), (derivatives(apart), derivatives(whole))):
        mapped = jax.jit(jax.vmap(ours, (None, 0, 0)))(graph.data, users, items)
        alone, expected_alone = jax.jit(ours), jax.jit(dense)
        for member in range(2):
            expected = expected_alone(graph.data, users[member], items[member])
            assert_close(alone(graph.data, users[member], items[member]), expected)
            assert_close(jax.tree.map(lambda x, n=member: x[n], mapped), expected)


def test_bipartite_graphs_keep_their_promise() -> None:
    graph = normalized_bipartite(np.array([0, 1]), np.array([1, 0]), 2, 2)
    with pytest.raises(ValueError, match="users and items are not 3 and 1"):
        propagate_bipartite(graph, jnp.ones((3, 2)), jnp.ones((1, 2)))
    for rows, columns in (([0, 1], [1, 0]), ([0, 1], [2, 3]), ([0, 2, 3], [2, 3, 0])):
        with pytest.raises(ValueError, match="in both directions"):
            sparse_graph(np.asarray(rows), np.asarray(columns), np.ones(len(rows)), (4, 4), n_users=2)
