"""A sparse matrix in compressed rows, built once on the host and passed to compiled functions as an argument."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=["columns", "row_starts", "entries"], meta_fields=[])
@dataclass(frozen=True)
class Transpose:
    """Structure of a transposed graph.

    Attributes:
        columns: (nnz,) int32.
        row_starts: (n_cols + 1,) int32.
        entries: (nnz,) int32; entry e of the transposed matrix is entry `entries[e]` of the matrix.
    """

    columns: Int[Array, " nnz"]
    row_starts: Int[Array, " cols_plus_1"]
    entries: Int[Array, " nnz"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "columns", "row_starts", "transpose"],
    meta_fields=["shape", "n_users"],
)
@dataclass(frozen=True)
class SparseGraph:
    """A sparse matrix in compressed rows.

    Attributes:
        values: (nnz,) float, row by row.
        columns: (nnz,) int32, ascending within a row.
        row_starts: (n_rows + 1,) int32; row r owns the entries row_starts[r] to row_starts[r + 1].
        shape: (n_rows, n_cols), static.
        transpose: structure of the transposed matrix; None where the matrix is symmetric.
        n_users: of a user-item graph that stores every edge in both directions, nodes being users, then items; else None.
    """

    values: Float[Array, " nnz"]
    columns: Int[Array, " nnz"]
    row_starts: Int[Array, " rows_plus_1"]
    shape: tuple[int, int]
    transpose: Transpose | None = None
    n_users: int | None = None

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.columns.shape[0]

    def rows(self) -> Int[Array, " nnz"]:
        """The row of every entry."""
        return row_ids(self.row_starts, self.nnz)

    def todense(self) -> Float[Array, "rows cols"]:
        """The dense matrix, (n_rows, n_cols); for tests and small graphs."""
        return jnp.zeros(self.shape, self.values.dtype).at[self.rows(), self.columns].add(self.values)


def sparse_graph(
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int],
    *,
    symmetric: bool = False,
    n_users: int | None = None,
    dtype: Any = jnp.float32,
) -> SparseGraph:
    """Build a graph on the host from its entries, in any order; repeated entries add up.

    Args:
        rows, columns, values: (n,) each.
        shape: (n_rows, n_cols).
        symmetric: promises that the matrix equals its transpose, which is then not stored.
        n_users: promises a user-item graph with every edge in both directions (see `propagate_bipartite`).
        dtype: of the values.

    Raises:
        ValueError: an id outside the shape, or a promise that does not hold.
    """
    rows, columns = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    for ids, size, what in ((rows, shape[0], "row"), (columns, shape[1], "column")):
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            raise ValueError(f"{what} ids run from {ids.min()} to {ids.max()}; the graph has {size} {what}s.")
    codes, place = np.unique(rows * shape[1] + columns, return_inverse=True)
    summed = np.bincount(place, np.asarray(values, np.float64), len(codes))
    rows, columns = codes // shape[1], codes % shape[1]
    of_users = np.count_nonzero(rows < (n_users or 0))
    if n_users is not None and (((rows < n_users) == (columns < n_users)).any() or 2 * of_users != len(rows)):
        raise ValueError(f"with n_users={n_users} every edge must join a user and an item, in both directions.")
    transpose = None
    if not symmetric:
        order = np.lexsort((rows, columns))
        transpose = Transpose(
            jnp.asarray(rows[order], jnp.int32), starts_of(columns, shape[1]), jnp.asarray(order, jnp.int32)
        )
    return SparseGraph(
        jnp.asarray(summed, dtype),
        jnp.asarray(columns, jnp.int32),
        starts_of(rows, shape[0]),
        shape,
        transpose,
        n_users,
    )


def _mirror_entries(graph: SparseGraph) -> Transpose:
    """The transpose of a structurally symmetric graph: same rows, entries exchanged with their mirror images."""
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(np.asarray(graph.row_starts)))
    order = np.lexsort((rows, np.asarray(graph.columns)))
    return Transpose(graph.columns, graph.row_starts, jnp.asarray(order, jnp.int32))


def replace_values(graph: SparseGraph, values: Float[Array, " nnz"]) -> SparseGraph:
    """The same structure with other values; a symmetric graph needs its transpose first (`with_transpose`)."""
    if graph.transpose is None:
        raise ValueError("replace_values: a symmetric graph stores no transpose; call with_transpose on it once.")
    return dataclasses.replace(graph, values=values)


def with_transpose(graph: SparseGraph) -> SparseGraph:
    """A symmetric graph with its transpose spelled out, so that its values may become unsymmetric. Host side."""
    return graph if graph.transpose is not None else dataclasses.replace(graph, transpose=_mirror_entries(graph))


def structure_of(graph: SparseGraph) -> tuple[Any, ...]:
    """Columns, row starts and transpose: what no derivative is taken of."""
    return graph.columns, graph.row_starts, graph.transpose


def row_ids(row_starts: Array, nnz: int) -> Int[Array, " nnz"]:
    """The row of every entry, (nnz,)."""
    n_rows = row_starts.shape[0] - 1
    return jnp.repeat(jnp.arange(n_rows, dtype=jnp.int32), jnp.diff(row_starts), total_repeat_length=nnz)


def starts_of(ids: np.ndarray, size: int) -> Int[Array, " size_plus_1"]:
    """Where the entries of each of `size` rows begin, and the last ends, given the row of every entry. Host side."""
    return jnp.asarray(np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=size))]), jnp.int32)
