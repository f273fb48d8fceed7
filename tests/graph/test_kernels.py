"""The products of a GPU, its Pallas kernels by interpreter; gradients of gathered rows; derivatives of second order."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from mgrad_jax.graph import (
    SparseGraph,
    edge_dot,
    edge_softmax,
    gather_rows,
    gpu_product,
    kernels,
    mean_bipartite,
    propagate,
    propagate_bipartite,
    replace_values,
    sparse_graph,
    with_transpose,
)


def power_law(n_rows: int, n_columns: int, longest: int, seed: int = 0) -> np.ndarray:
    """Rows of very different lengths, the first full, the second empty."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(longest, longest // (1 + np.arange(n_rows)) + 1)
    lengths[1:2] = 0
    dense = np.zeros((n_rows, n_columns))
    for row, length in enumerate(lengths):
        columns = rng.choice(n_columns, min(length, n_columns), replace=False)
        dense[row, columns] = rng.normal(size=len(columns))
    return dense


def as_graph(dense: np.ndarray, **options: Any) -> SparseGraph:
    rows, columns = np.nonzero(dense)
    return sparse_graph(rows, columns, dense[rows, columns], dense.shape, **options)


PRODUCTS = {
    "segment": kernels.segment,
    "rows": partial(kernels.rows, interpret=True),
    "split": partial(kernels.split_rows, piece=8, interpret=True),
    "cusparse": kernels.cusparse,
}
GRAPHS = {
    "long and empty rows": power_law(9, 40, 40),
    "one node": np.ones((1, 1)),
    "no entries": np.zeros((4, 3)),
}
WIDTHS = [(jnp.float32, 5), (jnp.float64, 1), (jnp.bfloat16, 8), (jnp.float32, 130)]


@pytest.mark.parametrize("case", GRAPHS)
@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.usefixtures("x64")
def test_every_product_equals_the_dense_one_in_every_width_and_type(kernel: str, case: str) -> None:
    dense = GRAPHS[case]
    product = jax.jit(PRODUCTS[kernel], static_argnums=0)
    for dtype, width in WIDTHS if case == "long and empty rows" else WIDTHS[:1]:
        graph = as_graph(dense, dtype=dtype)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(dense.shape[1], width)), dtype)
        y = product(graph.shape, graph.data, graph.indices, graph.indptr, x)
        assert (y.dtype, y.shape) == (dtype, (dense.shape[0], width))
        expected = np.asarray(graph.todense(), np.float64) @ np.asarray(x, np.float64)
        # Half precision: the row kernels add in float32, `segment` in the type itself.
        tolerance = {jnp.float32: 1e-5, jnp.float64: 1e-12, jnp.bfloat16: 0.3 if kernel == "segment" else 0.05}[dtype]
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=tolerance)


def test_a_product_that_does_not_exist_is_refused() -> None:
    with gpu_product("fast"), pytest.raises(ValueError, match="gpu_product is 'fast'; choose one of segment, rows"):
        propagate(as_graph(np.eye(2)), jnp.ones((2, 1)))


def test_the_chosen_product_is_the_one_in_the_program_for_a_gpu(for_cuda: Any) -> None:
    """And the same function, traced again under another choice, is another program."""
    graph, x = as_graph(power_law(6, 6, 6)), jnp.ones((6, 3))
    gradient = jax.jit(jax.grad(lambda x: propagate(graph, x).sum()))
    for kernel, call in (("segment", "stablehlo.scatter"), ("rows", "xla.gpu.triton"), ("split", "xla.gpu.triton")):
        with gpu_product(kernel):
            assert call in for_cuda(gradient, x)
    with gpu_product("cusparse"):
        assert "csr_matmat" in str(jax.make_jaxpr(lambda x: kernels.cusparse(graph.shape, *leaves(graph), x))(x))


def leaves(graph: SparseGraph) -> tuple[Array, Array, Array]:
    return graph.data, graph.indices, graph.indptr


def test_the_choice_changes_nothing_on_a_cpu() -> None:
    graph, x = as_graph(power_law(6, 6, 6)), jnp.ones((6, 3))
    run = jax.jit(lambda x: propagate(graph, x))
    plain = run(x)
    with gpu_product("split"):
        np.testing.assert_array_equal(run(x), plain)


# Derivatives of second order


def second_derivatives(loss: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """Forward over reverse along one direction, and reverse over reverse, in all arguments."""
    numbers = tuple(range(len(arguments)))
    gradient = jax.grad(loss, numbers)
    moved = jax.tree.map(lambda x: jnp.cos(7 * jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), arguments)

    def along(*arguments: Any) -> Any:
        return sum(jnp.vdot(g, m) for g, m in zip(gradient(*arguments), moved, strict=True))

    return [jax.jvp(gradient, arguments, moved)[1], jax.grad(along, numbers)(*arguments)]


def assert_second_derivatives(ours: Any, dense: Any, *arguments: Any) -> None:
    mixed, expected = (jax.jit(lambda *a, f=f: second_derivatives(f, a))(*arguments) for f in (ours, dense))
    for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kind", ["rectangular", "symmetric", "symmetric with its transpose"])
@pytest.mark.usefixtures("x64")
def test_propagation_has_second_derivatives_by_vectors_and_values(kind: str) -> None:
    dense = power_law(6, 5, 5)
    if kind != "rectangular":
        dense = dense @ dense.T
    graph = as_graph(dense, symmetric=kind != "rectangular", dtype=jnp.float64)
    graph = with_transpose(graph) if "with" in kind else graph
    places = np.nonzero(dense)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(dense.shape[1], 3)))

    def ours(values: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(propagate(dataclasses.replace(graph, data=values), x)))

    def theirs(values: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(jnp.zeros(dense.shape).at[places].set(values) @ x))

    assert_second_derivatives(ours, theirs, graph.data, x)


@pytest.mark.usefixtures("x64")
def test_bipartite_propagation_with_attention_has_second_derivatives() -> None:
    users, items = np.nonzero(power_law(5, 4, 4))
    graph = mean_bipartite(users, items, 5, 4, dtype=jnp.float64)
    stored = graph.todense() != 0
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3)))

    def ours(x: Any) -> Any:
        attentive = replace_values(graph, edge_softmax(graph, edge_dot(graph, x)))
        return jnp.sum(jnp.sin(jnp.concatenate(propagate_bipartite(attentive, x[:5], x[5:]))))

    def theirs(x: Any) -> Any:
        weights = jnp.where(stored, jnp.exp(x @ x.T), 0.0)
        return jnp.sum(jnp.sin(weights / (weights.sum(axis=1, keepdims=True) + 1e-16) @ x))

    assert_second_derivatives(ours, theirs, x)


# Rows of a table


@pytest.mark.usefixtures("x64")
def test_gathered_rows_have_the_derivatives_of_indexing() -> None:
    """Repeated ids, rows that nobody asks for, both orders, alone and under vmap."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    ids = jnp.asarray([4, 0, 4, 4, 2], jnp.int32)
    np.testing.assert_array_equal(gather_rows(table, ids), table[ids])
    assert_second_derivatives(
        lambda t: jnp.sum(jnp.sin(gather_rows(t, ids))), lambda t: jnp.sum(jnp.sin(t[ids])), table
    )
    gradient = jax.vmap(jax.grad(lambda t: jnp.sum(gather_rows(t, ids) ** 2)))
    together = jax.jit(gradient)(jnp.stack([table, 2 * table]))
    expected = jax.jit(jax.grad(lambda t: jnp.sum(t[ids] ** 2)))(table)
    np.testing.assert_allclose(together, jnp.stack([expected, 2 * expected]), atol=1e-12)


def test_the_gradient_of_gathered_rows_is_the_chosen_product_on_a_gpu(for_cuda: Any) -> None:
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(gather_rows(t, jnp.arange(4)) ** 2)))
    with gpu_product("rows"):
        program = for_cuda(gradient, jnp.ones((6, 3)))
    assert "xla.gpu.triton" in program
    assert "stablehlo.scatter" not in program
