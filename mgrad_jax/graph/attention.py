"""Attention over the edges of a user-item graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrad_jax.devices import mesh_in_force
from mgrad_jax.graph.multilinear import Arguments, Multilinear, Others
from mgrad_jax.graph.propagation import dots, product
from mgrad_jax.graph.sparse import SparseGraph, row_ids, structure_of


def edge_dot(graph: SparseGraph, x: Float[Array, "nodes dim"]) -> Float[Array, " nnz"]:
    """<x[row], x[column]> of every stored entry of a user-item graph: a sampled dense-dense product (SDDMM).

    Both directions of an edge share one product.

    Args:
        graph: with `n_users` and its transpose (`mean_bipartite`, `with_transpose`).
        x: (n_nodes, dim), users first.

    Raises:
        ValueError: a graph without `n_users` or transpose.
    """
    if graph.n_users is None or graph.transpose is None:
        raise ValueError("edge_dot: the graph must be a user-item graph with its transpose spelled out.")
    return _edge_dot(graph.shape, structure_of(graph), x)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _edge_dot(shape: tuple[int, int], structure: tuple[Any, ...], x: Float[Array, "nodes dim"]) -> Float[Array, " nnz"]:
    return _both_directions(mesh_in_force(), structure, x, x)


@_edge_dot.defjvp
def _edge_dot_jvp(
    shape: tuple[int, int], structure: tuple[Any, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    (moved,) = _edge_dots_both_ways(((x,), (tangent,)), structure, shape=shape, mesh=mesh_in_force())
    return _edge_dot(shape, structure, x), moved


def _both_directions(
    mesh: Any, structure: tuple[Any, ...], users: Float[Array, "nodes dim"], items: Float[Array, "nodes dim"]
) -> Float[Array, " nnz"]:
    """<users[u], items[i]> of every edge (u, i), for both of its entries."""
    indices, indptr, transpose = structure
    half = indices.shape[0] // 2
    once = dots(mesh, indices[:half], row_ids(indptr, 2 * half)[:half], users, items)
    return jnp.concatenate([once, once[transpose.permutation[half:]]])


def _both_ways(arguments: Arguments, structure: tuple[Any, ...], *, shape: tuple[int, int], mesh: Any) -> tuple[Array]:
    (a,), (b,) = arguments
    return (_both_directions(mesh, structure, a, b) + _both_directions(mesh, structure, b, a),)


def _pull_either(
    results: list[Array], arguments: Others, structure: tuple[Any, ...], *, shape: tuple[int, int], mesh: Any
) -> tuple[Array]:
    # An entry and its mirror image pull at the same two rows, so that their sum does in one product.
    (other,) = next(argument for argument in arguments if argument is not None)
    (g,) = results
    return (product(shape, g + g[structure[2].permutation], structure, other),)


_edge_dots_both_ways = Multilinear("graph_edge_dots", _both_ways, {0: _pull_either, 1: _pull_either})


def edge_softmax(graph: SparseGraph, logits: Float[Array, " nnz"]) -> Float[Array, " nnz"]:
    """Softmax over the entries of every row, with 1e-16 in the denominator as in the reference code of GRCN."""
    return _edge_softmax(graph.shape[0], graph.rows(), logits)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _edge_softmax(n_rows: int, rows: Int[Array, " nnz"], logits: Float[Array, " nnz"]) -> Float[Array, " nnz"]:
    top = jax.ops.segment_max(logits, rows, n_rows, indices_are_sorted=True)
    weights = jnp.exp(logits - top[rows])
    return weights / (_row_sums(n_rows, rows, weights)[rows] + 1e-16)


@_edge_softmax.defjvp
def _edge_softmax_jvp(n_rows: int, rows: Array, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    attention = _edge_softmax(n_rows, rows, *primals)
    (moved,) = _softmax_derivative(((attention,), tangents), rows, n_rows=n_rows)
    return attention, moved


def _row_sums(n_rows: int, rows: Int[Array, " nnz"], values: Float[Array, " nnz"]) -> Float[Array, " rows"]:
    return jax.ops.segment_sum(values, rows, n_rows, indices_are_sorted=True)


# Two functions that are their own transposes: the derivative of the softmax, and the sum over its row for every entry.


def _derivative(arguments: Arguments, rows: Array, *, n_rows: int) -> tuple[Array]:
    (attention,), (tangent,) = arguments
    pull = attention * tangent
    return (pull - attention * _row_sums(n_rows, rows, pull)[rows],)


def _derivative_along_attention(moved: Any, arguments: Arguments, rows: Array, *, n_rows: int) -> tuple[Array]:
    (attention,), (tangent,) = arguments
    (shared,) = _sum_of_row(((attention * tangent,),), rows, n_rows=n_rows)
    (shared_moved,) = _sum_of_row(((moved[0] * tangent,),), rows, n_rows=n_rows)
    return (moved[0] * tangent - moved[0] * shared - attention * shared_moved,)


def _transposed_derivative(results: list[Array], arguments: Others, rows: Array, *, n_rows: int) -> Any:
    return _softmax_derivative((arguments[0], tuple(results)), rows, n_rows=n_rows)


def _of_own_row(arguments: Arguments, rows: Array, *, n_rows: int) -> tuple[Array]:
    return (_row_sums(n_rows, rows, arguments[0][0])[rows],)


def _transposed_sum(results: list[Array], arguments: Others, rows: Array, *, n_rows: int) -> Any:
    return _sum_of_row((tuple(results),), rows, n_rows=n_rows)


_sum_of_row = Multilinear("graph_row_sums", _of_own_row, {0: _transposed_sum})
_softmax_derivative = Multilinear(
    "graph_softmax_derivative",
    _derivative,
    {1: _transposed_derivative},
    tangents={0: _derivative_along_attention},
)
