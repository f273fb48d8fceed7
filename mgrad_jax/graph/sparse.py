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

from mgrad_jax.deprecation import Formerly


@dataclass(frozen=True)
class Transpose:
    """Structure of a transposed graph.

    Attributes:
        indices: (nnz,) int32, the column of every entry.
        indptr: (n_cols + 1,) int32.
        permutation: (nnz,) int32; entry e of the transposed matrix is entry `permutation[e]` of the matrix.
    """

    indices: Int[Array, " nnz"]
    indptr: Int[Array, " cols_plus_1"]
    permutation: Int[Array, " nnz"]

    columns, row_starts, entries = Formerly("indices"), Formerly("indptr"), Formerly("permutation")


@dataclass(frozen=True)
class SparseGraph:
    """A sparse matrix in compressed rows (CSR), its arrays named as in SciPy and JAX.

    Attributes:
        data: (nnz,) float, the values row by row.
        indices: (nnz,) int32, the column of every entry, ascending within a row.
        indptr: (n_rows + 1,) int32; row r owns the entries indptr[r] to indptr[r + 1].
        shape: (n_rows, n_cols), static.
        transpose: structure of the transposed matrix; None where the matrix is symmetric.
        n_users: of a user-item graph that stores every edge in both directions, users, then items; else None.
    """

    data: Float[Array, " nnz"]
    indices: Int[Array, " nnz"]
    indptr: Int[Array, " rows_plus_1"]
    shape: tuple[int, int]
    transpose: Transpose | None = None
    n_users: int | None = None

    values, columns, row_starts = Formerly("data"), Formerly("indices"), Formerly("indptr")

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.indices.shape[0]

    def rows(self) -> Int[Array, " nnz"]:
        """The row of every entry."""
        rows: Array = row_ids(self.indptr, self.nnz)
        return rows

    def todense(self) -> Float[Array, "rows cols"]:
        """The dense matrix, (n_rows, n_cols); for tests and small graphs."""
        dense: Array = _dense(self)
        return dense


@jax.jit
def _dense(graph: SparseGraph) -> Float[Array, "rows cols"]:
    return jnp.zeros(graph.shape, graph.data.dtype).at[graph.rows(), graph.indices].add(graph.data)


# Within `with shapes_only(True):` graphs, and what else is built on the host, have shapes and no numbers, for programs
# that are compiled and never run: as many entries as there are at most.
shapes_only = jax.make_user_context(False)


def _register(cls: type[Any], keys: dict[str, str], static: tuple[str, ...] = ()) -> None:
    """Make a dataclass a pytree: its arrays, with what their paths call them, and its static fields."""

    def with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        arrays = [(jax.tree_util.GetAttrKey(key), getattr(node, field)) for field, key in keys.items()]
        return arrays, tuple(getattr(node, field) for field in static)

    def unflatten(values: tuple[Any, ...], arrays: Any) -> Any:
        return cls(**dict(zip(keys, arrays, strict=True)), **dict(zip(static, values, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, with_keys, unflatten)


# The paths keep the arrays' former names: by these the checkpoints of runs that prune a graph store it.
_register(Transpose, {"indices": "columns", "indptr": "row_starts", "permutation": "entries"})
_register(
    SparseGraph,
    {"data": "values", "indices": "columns", "indptr": "row_starts", "transpose": "transpose"},
    ("shape", "n_users"),
)


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


def blank_graph(
    nnz: int, shape: tuple[int, int], *, symmetric: bool = False, n_users: int | None = None, dtype: Any = jnp.float32
) -> SparseGraph:
    """A graph of zeros with this many entries, where `shapes_only` is on."""

    def ids(n: int) -> Array:
        return jnp.zeros(n, jnp.int32)

    transpose = None if symmetric else Transpose(ids(nnz), ids(shape[1] + 1), ids(nnz))
    return SparseGraph(jnp.zeros(nnz, dtype), ids(nnz), ids(shape[0] + 1), shape, transpose, n_users)


def _mirror_entries(graph: SparseGraph) -> Transpose:
    """The transpose of a structurally symmetric graph: same rows, entries exchanged with their mirror images."""
    order = np.lexsort((rows_on_host(graph), np.asarray(graph.indices)))
    return Transpose(graph.indices, graph.indptr, jnp.asarray(order, jnp.int32))


def replace_values(graph: SparseGraph, values: Float[Array, " nnz"]) -> SparseGraph:
    """The same structure with other values; a symmetric graph needs its transpose first (`with_transpose`)."""
    if graph.transpose is None:
        raise ValueError("replace_values: a symmetric graph stores no transpose; call with_transpose on it once.")
    return dataclasses.replace(graph, data=values)


def with_transpose(graph: SparseGraph) -> SparseGraph:
    """A symmetric graph with its transpose spelled out, so that its values may become unsymmetric. Host side."""
    if graph.transpose is not None:
        return graph
    if shapes_only.value:
        return blank_graph(graph.nnz, graph.shape, n_users=graph.n_users, dtype=graph.data.dtype)
    return dataclasses.replace(graph, transpose=_mirror_entries(graph))


def structure_of(graph: SparseGraph) -> tuple[Any, ...]:
    """Indices, row pointers and transpose: what no derivative is taken of."""
    return graph.indices, graph.indptr, graph.transpose


def rows_on_host(graph: SparseGraph) -> np.ndarray:
    """The row of every entry, (nnz,). Host side, where nothing is compiled for it."""
    return np.repeat(np.arange(graph.shape[0]), np.diff(np.asarray(graph.indptr)))


@partial(jax.jit, static_argnums=1)
def row_ids(indptr: Int[Array, " rows_plus_1"], nnz: int) -> Int[Array, " nnz"]:
    """The row of every entry, (nnz,)."""
    n_rows = indptr.shape[0] - 1
    return jnp.repeat(jnp.arange(n_rows, dtype=jnp.int32), jnp.diff(indptr), total_repeat_length=nnz)


def starts_of(ids: np.ndarray, size: int) -> Int[Array, " size_plus_1"]:
    """Where the entries of each of `size` rows begin, and the last ends, given the row of every entry. Host side."""
    return jnp.asarray(np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=size))]), jnp.int32)
