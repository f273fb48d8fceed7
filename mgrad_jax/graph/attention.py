"""Attention over the edges of a user-item graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgrad_jax.graph.propagation import dots, no_tangent, product_of
from mgrad_jax.graph.sparse import SparseGraph, row_ids, structure_of


def edge_dot(graph: SparseGraph, x: Float[Array, "nodes dim"]) -> Float[Array, " nnz"]:
    """<x[row], x[column]> of every stored entry of a user-item graph; both directions of an edge share one product.

    Args:
        graph: with `n_users` and its transpose (`mean_bipartite`, `with_transpose`).
        x: (n_nodes, dim), users first.

    Raises:
        ValueError: a graph without `n_users` or transpose.
    """
    if graph.n_users is None or graph.transpose is None:
        raise ValueError("edge_dot: the graph must be a user-item graph with its transpose spelled out.")
    return _edge_dot(graph.shape, structure_of(graph), x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _edge_dot(shape: tuple[int, int], structure: tuple[Any, ...], x: Array) -> Array:
    columns, row_starts, transpose = structure
    half = columns.shape[0] // 2
    once = dots(columns[:half], row_ids(row_starts, 2 * half)[:half], x, x)
    return jnp.concatenate([once, once[transpose.entries[half:]]])


def _edge_dot_forward(shape: tuple[int, int], structure: tuple[Any, ...], x: Array) -> tuple[Array, tuple[Any, ...]]:
    return _edge_dot(shape, structure, x), (structure, x)


def _edge_dot_backward(shape: tuple[int, int], saved: tuple[Any, ...], g: Array) -> tuple[Any, Array]:
    # An entry and its mirror image pull at the same two rows, so that their sum does in one product.
    structure, x = saved
    columns, row_starts, transpose = structure
    return no_tangent(structure), product_of(shape)(g + g[transpose.entries], columns, row_starts, x)


_edge_dot.defvjp(_edge_dot_forward, _edge_dot_backward)


def edge_softmax(graph: SparseGraph, logits: Float[Array, " nnz"]) -> Float[Array, " nnz"]:
    """Softmax over the entries of every row, with 1e-16 in the denominator as published (GRCN)."""
    return _edge_softmax(graph.shape[0], graph.rows(), logits)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _edge_softmax(n_rows: int, rows: Array, logits: Array) -> Array:
    top = jax.ops.segment_max(logits, rows, n_rows, indices_are_sorted=True)
    weights = jnp.exp(logits - top[rows])
    return weights / (_row_sums(n_rows, rows, weights)[rows] + 1e-16)


def _edge_softmax_forward(n_rows: int, rows: Array, logits: Array) -> tuple[Array, tuple[Array, Array]]:
    attention = _edge_softmax(n_rows, rows, logits)
    return attention, (rows, attention)


def _edge_softmax_backward(n_rows: int, saved: tuple[Array, Array], g: Array) -> tuple[Any, Array]:
    rows, attention = saved
    pull = attention * g
    return no_tangent(rows), pull - attention * _row_sums(n_rows, rows, pull)[rows]


_edge_softmax.defvjp(_edge_softmax_forward, _edge_softmax_backward)


def _row_sums(n_rows: int, rows: Array, values: Array) -> Array:
    return jax.ops.segment_sum(values, rows, n_rows, indices_are_sorted=True)
