"""Sparse graphs: built once on the host, passed to compiled functions as arguments, propagated with `propagate`.

A graph is a matrix in compressed rows. `propagate` has a derivative of its own, a product with the transposed matrix by
the same fast kernel, where the automatic one would scatter; and a batching rule of its own, so that members of a grid
share one wide product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jaxtyping import Array, Bool, Float, Int

from mgrad_jax.dropout import keep_mask
from mgrad_jax.errors import UserError


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
        return _row_ids(self.row_starts, self.nnz)

    def todense(self) -> Float[Array, "rows cols"]:
        """The dense matrix, (n_rows, n_cols); for tests and small graphs."""
        return jnp.zeros(self.shape, self.values.dtype).at[self.rows(), self.columns].add(self.values)


def _row_ids(row_starts: Array, nnz: int) -> Int[Array, " nnz"]:
    n_rows = row_starts.shape[0] - 1
    return jnp.repeat(jnp.arange(n_rows, dtype=jnp.int32), jnp.diff(row_starts), total_repeat_length=nnz)


def propagate(graph: SparseGraph, x: Float[Array, "cols dim"]) -> Float[Array, "rows dim"]:
    """One step of propagation, y = A x.

    Differentiable in `x` and in `graph.values` (whose derivative the compiler drops where nobody asks for it). In a
    symmetric graph the stored values count as independent entries.

    Args:
        graph: (n_rows, n_cols).
        x: (n_cols, dim).

    Returns:
        (n_rows, dim) in x's dtype.
    """
    if x.ndim != 2 or x.shape[0] != graph.shape[1]:
        raise ValueError(f"propagate: x has shape {x.shape}; the graph needs ({graph.shape[1]}, dim).")
    return _propagate(graph.shape, graph.values.astype(x.dtype), _structure(graph), x)


def _structure(graph: SparseGraph) -> tuple[Any, ...]:
    return graph.columns, graph.row_starts, graph.transpose


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _propagate(shape: tuple[int, int], values: Array, structure: tuple[Any, ...], x: Array) -> Array:
    columns, row_starts, _ = structure
    return _product(shape)(values, columns, row_starts, x)


def _propagate_forward(
    shape: tuple[int, int], values: Array, structure: tuple[Any, ...], x: Array
) -> tuple[Array, tuple[Any, ...]]:
    return _propagate(shape, values, structure, x), (values, structure, x)


def _propagate_backward(
    shape: tuple[int, int], saved: tuple[Any, ...], dy: Array
) -> tuple[Array, tuple[Any, ...], Array]:
    values, structure, x = saved
    columns, row_starts, transpose = structure
    if transpose is None:
        dx = _product(shape)(values, columns, row_starts, dy)
    else:
        dx = _product(shape[::-1])(values[transpose.entries], transpose.columns, transpose.row_starts, dy)
    dvalues = _value_gradients(columns, row_starts, dy, x)
    return dvalues.astype(values.dtype), _no_tangent(structure), dx


_propagate.defvjp(_propagate_forward, _propagate_backward)


def propagate_bipartite(
    graph: SparseGraph, users: Float[Array, "users dim"], items: Float[Array, "items dim"]
) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
    """`propagate` over a user-item graph, the two kinds of nodes apart: (R x_items, R' x_users) for [[0, R], [R', 0]].

    Two products that do not wait for each other, and no concatenation: a quarter faster in training than one product
    over all nodes. Differentiable like `propagate`.

    Args:
        graph: over the nodes users, then items; without `n_users` it is propagated as one.
        users, items: (n_users, dim) and (n_items, dim).
    """
    sizes = users.shape[0], items.shape[0]
    if graph.n_users is None:
        nodes = propagate(graph, jnp.concatenate([users, items]))
        return nodes[: sizes[0]], nodes[sizes[0] :]
    if sizes != (graph.n_users, graph.shape[0] - graph.n_users):
        raise ValueError(f"propagate_bipartite: the graph's users and items are not {sizes[0]} and {sizes[1]}.")
    return _bipartite(sizes, graph.values.astype(users.dtype), _structure(graph), users, items)


def _halves(
    sizes: tuple[int, int], values: Array, columns: Array, row_starts: Array, users: Array, items: Array
) -> tuple[Array, Array]:
    """Both products of one step; half of the entries lie in the rows of users."""
    n_users, n_items = sizes
    half = columns.shape[0] // 2
    to_users = _product(sizes)(values[:half], columns[:half] - n_users, row_starts[: n_users + 1], items)
    to_items = _product((n_items, n_users))(values[half:], columns[half:], row_starts[n_users:] - half, users)
    return to_users, to_items


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bipartite(
    sizes: tuple[int, int], values: Array, structure: tuple[Any, ...], users: Array, items: Array
) -> tuple[Array, Array]:
    columns, row_starts, _ = structure
    return _halves(sizes, values, columns, row_starts, users, items)


def _bipartite_forward(
    sizes: tuple[int, int], values: Array, structure: tuple[Any, ...], users: Array, items: Array
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    return _bipartite(sizes, values, structure, users, items), (values, structure, users, items)


def _bipartite_backward(
    sizes: tuple[int, int], saved: tuple[Any, ...], gradients: tuple[Array, Array]
) -> tuple[Array, tuple[Any, ...], Array, Array]:
    values, structure, users, items = saved
    columns, row_starts, transpose = structure
    if transpose is None:
        dusers, ditems = _halves(sizes, values, columns, row_starts, *gradients)
    else:
        back = values[transpose.entries], transpose.columns, transpose.row_starts
        dusers, ditems = _halves(sizes, *back, *gradients)
    dvalues = _value_gradients(columns, row_starts, jnp.concatenate(gradients), jnp.concatenate([users, items]))
    return dvalues.astype(values.dtype), _no_tangent(structure), dusers, ditems


_bipartite.defvjp(_bipartite_forward, _bipartite_backward)


def _value_gradients(columns: Array, row_starts: Array, dy: Array, x: Array) -> Array:
    return _dots(columns, _row_ids(row_starts, columns.shape[0]), dy, x)


def _dots(columns: Array, rows: Array, a: Array, b: Array) -> Array:
    """<a[row], b[column]> of every entry."""
    products = a[rows] * b[columns]
    return jax.lax.platform_dependent(products, cpu=_sum_by_halves, default=lambda x: jnp.sum(x, axis=-1))


def _sum_by_halves(x: Array) -> Array:
    # On a CPU a sum fused with the gather of its rows adds number by number; halves added to halves take a twentieth.
    width, rest = x.shape[-1], jnp.zeros(x.shape[:-1], x.dtype)
    while width > 1:
        if width % 2:
            rest = rest + x[..., width - 1]
        width //= 2
        x = x[..., :width] + x[..., width : 2 * width]
    return x[..., 0] + rest if width else rest


def _no_tangent(structure: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), structure)


@cache
def _product(shape: tuple[int, int]) -> Callable[..., Array]:
    """The product of a matrix of this shape with a dense one; the only place that chooses kernels and batching."""

    @jax.custom_batching.custom_vmap
    def product(values: Array, columns: Array, row_starts: Array, x: Array) -> Array:
        return jax.lax.platform_dependent(
            values, columns, row_starts, x, cpu=partial(_bcsr_product, shape), default=partial(_segment_product, shape)
        )

    @product.def_vmap
    def batched(
        axis_size: int, in_batched: list[bool], values: Array, columns: Array, row_starts: Array, x: Array
    ) -> tuple[Array, bool]:
        if in_batched == [False, False, False, True]:
            wide = jnp.moveaxis(x, 0, 1).reshape(shape[1], axis_size * x.shape[2])
            y = product(values, columns, row_starts, wide)
            return jnp.moveaxis(y.reshape(shape[0], axis_size, x.shape[2]), 1, 0), True
        operands = [
            a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            for a, is_batched in zip((values, columns, row_starts, x), in_batched, strict=True)
        ]
        return jax.lax.map(lambda member: product(*member), tuple(operands)), True

    return product


def _bcsr_product(shape: tuple[int, int], values: Array, columns: Array, row_starts: Array, x: Array) -> Array:
    # The kernel knows float32 and float64; half precision is summed in float32, which is better anyway.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    graph = sparse.BCSR((values.astype(wide), columns, row_starts), shape=shape)
    return (graph @ x.astype(wide)).astype(x.dtype)


def _segment_product(shape: tuple[int, int], values: Array, columns: Array, row_starts: Array, x: Array) -> Array:
    rows = _row_ids(row_starts, columns.shape[0])
    return jax.ops.segment_sum(values[:, None] * x[columns], rows, shape[0], indices_are_sorted=True)


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
            jnp.asarray(rows[order], jnp.int32), _starts(columns, shape[1]), jnp.asarray(order, jnp.int32)
        )
    return SparseGraph(
        jnp.asarray(summed, dtype), jnp.asarray(columns, jnp.int32), _starts(rows, shape[0]), shape, transpose, n_users
    )


def _starts(ids: np.ndarray, size: int) -> Int[Array, " size_plus_1"]:
    return jnp.asarray(np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=size))]), jnp.int32)


def _both_directions(
    users: np.ndarray, items: np.ndarray, n_users: int, n_items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns of both directions of the unique pairs over users + items nodes, and the nodes' degrees."""
    codes = np.unique(np.asarray(users, np.int64) * n_items + np.asarray(items, np.int64))
    users, items = codes // n_items, codes % n_items + n_users
    rows, columns = np.concatenate([users, items]), np.concatenate([items, users])
    return rows, columns, np.bincount(rows, minlength=n_users + n_items)


def normalized_bipartite(
    users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, eps: float = 1e-7, dtype: Any = jnp.float32
) -> SparseGraph:
    """D^-1/2 A D^-1/2 over the nodes users, then items, with D the degrees plus `eps`; isolated rows are zero.

    Args:
        users, items: (n,) training pairs; repeated pairs count once.
        n_users, n_items: sizes.
        eps: added to every degree, as published (1e-7; SLMRec 1e-8; DualGNN and DRAGON 0).
        dtype: of the values.
    """
    rows, columns, degrees = _both_directions(users, items, n_users, n_items)
    values = 1.0 / np.sqrt((degrees[rows] + eps) * (degrees[columns] + eps))
    n_nodes = n_users + n_items
    return sparse_graph(rows, columns, values, (n_nodes, n_nodes), symmetric=True, n_users=n_users, dtype=dtype)


def mean_bipartite(
    users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, dtype: Any = jnp.float32
) -> SparseGraph:
    """D^-1 A over the nodes users, then items: every node averages its neighbours (MMGCN)."""
    rows, columns, degrees = _both_directions(users, items, n_users, n_items)
    n_nodes = n_users + n_items
    return sparse_graph(rows, columns, 1.0 / degrees[rows], (n_nodes, n_nodes), n_users=n_users, dtype=dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["users", "items", "log_weights", "columns", "row_starts", "edge_ids"],
    meta_fields=["n_users", "n_items", "eps"],
)
@dataclass(frozen=True)
class BipartiteEdges:
    """What sampling edges inside jit needs, built once.

    Attributes:
        users, items: (E,) int32, the edges in the order given.
        log_weights: (E,) logarithm of 1 / sqrt((d_u + eps)(d_i + eps)).
        columns, row_starts: the full graph with both directions of every edge, (2E,) and (n_nodes + 1,).
        edge_ids: (2E,) int32, the edge of every entry.
        n_users, n_items, eps: static.
    """

    users: Int[Array, " edges"]
    items: Int[Array, " edges"]
    log_weights: Float[Array, " edges"]
    columns: Int[Array, " entries"]
    row_starts: Int[Array, " nodes_plus_1"]
    edge_ids: Int[Array, " entries"]
    n_users: int
    n_items: int
    eps: float


def bipartite_edges(
    users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, eps: float = 1e-7, dtype: Any = jnp.float32
) -> BipartiteEdges:
    """Prepare a bipartite graph for `prune_edges`; the pairs must be unique."""
    users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
    user_degrees, item_degrees = np.bincount(users, minlength=n_users), np.bincount(items, minlength=n_items)
    log_weights = -0.5 * np.log((user_degrees[users] + eps) * (item_degrees[items] + eps))
    rows, columns = np.concatenate([users, items + n_users]), np.concatenate([items + n_users, users])
    order = np.lexsort((columns, rows))
    edge_ids = np.tile(np.arange(len(users)), 2)[order]
    as_ids = partial(jnp.asarray, dtype=jnp.int32)
    return BipartiteEdges(
        as_ids(users),
        as_ids(items),
        jnp.asarray(log_weights, dtype),
        as_ids(columns[order]),
        _starts(rows, n_users + n_items),
        as_ids(edge_ids),
        n_users,
        n_items,
        eps,
    )


def keep_edges(edges: BipartiteEdges, kept: Int[Array, " kept"]) -> SparseGraph:
    """The graph of some edges, normalised by their own degrees plus eps; static shapes, no sorting.

    Args:
        edges: from `bipartite_edges`.
        kept: (n_keep,) distinct edge ids.
    """
    dtype, n_nodes = edges.log_weights.dtype, edges.n_users + edges.n_items
    keep = jnp.zeros(edges.users.shape, bool).at[kept].set(True)[edges.edge_ids]
    (places,) = jnp.nonzero(keep, size=2 * kept.shape[0])
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(keep, dtype=jnp.int32)])
    row_starts = before[edges.row_starts]
    columns = edges.columns[places]
    scale = jax.lax.rsqrt(jnp.diff(row_starts).astype(dtype) + edges.eps)
    values = scale[_row_ids(row_starts, columns.shape[0])] * scale[columns]
    return SparseGraph(values, columns, row_starts, (n_nodes, n_nodes), n_users=edges.n_users)


def prune_edges(key: Array, edges: BipartiteEdges, n_keep: int, weighted: bool | Bool[Array, ""] = True) -> SparseGraph:
    """Sample edges without replacement and normalise what is left (FREEDOM, LayerGCN).

    Sampling in proportion to the edge weights 1 / sqrt(d_u d_i), one after another, equals taking the largest of log
    weight + Gumbel noise.

    Args:
        key: a PRNG key.
        edges: from `bipartite_edges`.
        n_keep: edges to keep; static.
        weighted: False samples uniformly; may be traced.
    """
    noise = jax.random.gumbel(key, edges.log_weights.shape, edges.log_weights.dtype)
    _, kept = jax.lax.top_k(noise + jnp.where(weighted, edges.log_weights, 0.0), n_keep)
    return keep_edges(edges, kept)


def mirror_entries(graph: SparseGraph) -> Transpose:
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
    return graph if graph.transpose is not None else dataclasses.replace(graph, transpose=mirror_entries(graph))


def drop_entries(key: Array, graph: SparseGraph, rate: Float[Array, ""] | float) -> SparseGraph:
    """Keep every stored entry by itself with probability 1 - rate, scaled by 1 / (1 - rate) (SelfCF, BUIR).

    Args:
        key: a PRNG key.
        graph: with its transpose (`with_transpose`): the result is not symmetric.
        rate: in [0, 1); may be traced.
    """
    keep = keep_mask(key, graph.values.shape, rate)
    return replace_values(graph, jnp.where(keep, graph.values / (1.0 - rate), 0.0))


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
    return _edge_dot(graph.shape, _structure(graph), x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _edge_dot(shape: tuple[int, int], structure: tuple[Any, ...], x: Array) -> Array:
    columns, row_starts, transpose = structure
    half = columns.shape[0] // 2
    once = _dots(columns[:half], _row_ids(row_starts, 2 * half)[:half], x, x)
    return jnp.concatenate([once, once[transpose.entries[half:]]])


def _edge_dot_forward(shape: tuple[int, int], structure: tuple[Any, ...], x: Array) -> tuple[Array, tuple[Any, ...]]:
    return _edge_dot(shape, structure, x), (structure, x)


def _edge_dot_backward(shape: tuple[int, int], saved: tuple[Any, ...], g: Array) -> tuple[Any, Array]:
    # An entry and its mirror image pull at the same two rows, so that their sum does in one product.
    structure, x = saved
    columns, row_starts, transpose = structure
    return _no_tangent(structure), _product(shape)(g + g[transpose.entries], columns, row_starts, x)


_edge_dot.defvjp(_edge_dot_forward, _edge_dot_backward)


def edge_softmax(graph: SparseGraph, logits: Float[Array, " nnz"]) -> Float[Array, " nnz"]:
    """Softmax over the entries of every row, with 1e-16 in the denominator as published (GRCN)."""
    return _edge_softmax(graph.row_starts, logits)


@jax.custom_vjp
def _edge_softmax(row_starts: Array, logits: Array) -> Array:
    rows, n_rows = _row_ids(row_starts, logits.shape[0]), row_starts.shape[0] - 1
    top = jax.ops.segment_max(logits, rows, n_rows, indices_are_sorted=True)
    weights = jnp.exp(logits - top[rows])
    return weights / (jax.ops.segment_sum(weights, rows, n_rows, indices_are_sorted=True)[rows] + 1e-16)


def _edge_softmax_forward(row_starts: Array, logits: Array) -> tuple[Array, tuple[Array, Array]]:
    attention = _edge_softmax(row_starts, logits)
    return attention, (row_starts, attention)


def _edge_softmax_backward(saved: tuple[Array, Array], g: Array) -> tuple[Any, Array]:
    row_starts, attention = saved
    rows, n_rows = _row_ids(row_starts, attention.shape[0]), row_starts.shape[0] - 1
    pull = attention * g
    total = jax.ops.segment_sum(pull, rows, n_rows, indices_are_sorted=True)
    return _no_tangent(row_starts), pull - attention * total[rows]


_edge_softmax.defvjp(_edge_softmax_forward, _edge_softmax_backward)


def knn_indices(features: np.ndarray | Array, k: int, block: int = 1024) -> Int[Array, "n k"]:
    """The k nearest rows of every row by cosine similarity, itself included; ties go to the lower index.

    Exact, on the device, in blocks of rows: no (n, n) array in memory.

    Args:
        features: (n, dim), finite, no zero row.
        k: neighbours, at most n.
        block: rows at a time.

    Raises:
        UserError: k above n, or a row that has no direction.
    """
    table = jnp.asarray(features)
    n = table.shape[0]
    if not 1 <= k <= n:
        raise UserError(f"knn_k is {k}; it must be between 1 and the number of items, {n}.")
    norms = jnp.linalg.norm(table, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.asarray((norms[:, 0] > 0) & jnp.isfinite(norms[:, 0])))
    if len(bad):
        raise UserError(f"feature row {bad[0]} is all zero or not finite, so it has no nearest items; fill it.")
    return _knn(table / norms, k, min(block, n))


@partial(jax.jit, static_argnums=(1, 2))
def _knn(table: Array, k: int, block: int) -> Array:
    n = table.shape[0]
    starts = jnp.arange(0, n, block)

    def neighbours(start: Array) -> Array:
        # The last block is shifted back so that every block has the same shape.
        rows = jax.lax.dynamic_slice_in_dim(table, jnp.minimum(start, n - block), block)
        similarity = jnp.matmul(rows, table.T, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.top_k(similarity, k)[1]

    found = jax.lax.map(neighbours, starts)
    tail = n - block * (starts.shape[0] - 1)
    return jnp.concatenate([found[:-1].reshape(-1, k), found[-1, block - tail :]]).astype(jnp.int32)


def knn_graph(features: np.ndarray | Array, k: int, dtype: Any = jnp.float32) -> SparseGraph:
    """The directed graph of `knn_indices`, both ends normalised by the row degree k: every entry is 1 / (k + 1e-7)."""
    neighbours = np.asarray(knn_indices(features, k))
    n = len(neighbours)
    values = np.full(n * k, 1.0 / (k + 1e-7))
    return sparse_graph(np.repeat(np.arange(n), k), neighbours.ravel(), values, (n, n), dtype=dtype)


def blend_graphs(weighted: Sequence[tuple[float, SparseGraph]]) -> SparseGraph:
    """The weighted sum of graphs of one shape, as one graph. Host side."""
    shape, dtype = weighted[0][1].shape, weighted[0][1].values.dtype
    rows = np.concatenate([np.asarray(graph.rows()) for _, graph in weighted])
    columns = np.concatenate([np.asarray(graph.columns) for _, graph in weighted])
    values = np.concatenate([weight * np.asarray(graph.values, np.float64) for weight, graph in weighted])
    return sparse_graph(rows, columns, values, shape, dtype=dtype)
