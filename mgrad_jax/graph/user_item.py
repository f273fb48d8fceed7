"""User-item graphs: normalised, and with some of their edges only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mgrad_jax.deprecation import Formerly
from mgrad_jax.dropout import keep_mask
from mgrad_jax.graph.sparse import (
    SparseGraph,
    blank_graph,
    replace_values,
    row_ids,
    shapes_only,
    sparse_graph,
    starts_of,
)
from mgrad_jax.selection import top_k_mask


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
        eps: added to every degree, as in the reference code (1e-7; SLMRec 1e-8; DualGNN and DRAGON 0).
        dtype: of the values.
    """
    n_nodes = n_users + n_items
    if shapes_only.value:
        return blank_graph(2 * len(users), (n_nodes, n_nodes), symmetric=True, n_users=n_users, dtype=dtype)
    rows, columns, degrees = _both_directions(users, items, n_users, n_items)
    values = 1.0 / np.sqrt((degrees[rows] + eps) * (degrees[columns] + eps))
    return sparse_graph(rows, columns, values, (n_nodes, n_nodes), symmetric=True, n_users=n_users, dtype=dtype)


def mean_bipartite(
    users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, dtype: Any = jnp.float32
) -> SparseGraph:
    """D^-1 A over the nodes users, then items: every node averages its neighbours (MMGCN)."""
    n_nodes = n_users + n_items
    if shapes_only.value:
        return blank_graph(2 * len(users), (n_nodes, n_nodes), n_users=n_users, dtype=dtype)
    rows, columns, degrees = _both_directions(users, items, n_users, n_items)
    return sparse_graph(rows, columns, 1.0 / degrees[rows], (n_nodes, n_nodes), n_users=n_users, dtype=dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["users", "items", "log_weights", "indices", "indptr", "edge_ids"],
    meta_fields=["n_users", "n_items", "eps"],
)
@dataclass(frozen=True)
class BipartiteEdges:
    """What sampling edges inside jit needs, built once.

    Attributes:
        users, items: (E,) int32, the edges in the order given.
        log_weights: (E,) logarithm of 1 / sqrt((d_u + eps)(d_i + eps)).
        indices, indptr: the full graph with both directions of every edge, (2E,) and (n_nodes + 1,).
        edge_ids: (2E,) int32, the edge of every entry.
        n_users, n_items, eps: static.
    """

    users: Int[Array, " edges"]
    items: Int[Array, " edges"]
    log_weights: Float[Array, " edges"]
    indices: Int[Array, " entries"]
    indptr: Int[Array, " nodes_plus_1"]
    edge_ids: Int[Array, " entries"]
    n_users: int
    n_items: int
    eps: float

    columns, row_starts = Formerly("indices"), Formerly("indptr")


def bipartite_edges(
    users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, eps: float = 1e-7, dtype: Any = jnp.float32
) -> BipartiteEdges:
    """Prepare a bipartite graph for `prune_edges`; the pairs must be unique."""
    if shapes_only.value:
        one, two, starts = (jnp.zeros(n, jnp.int32) for n in (len(users), 2 * len(users), n_users + n_items + 1))
        return BipartiteEdges(one, one, jnp.zeros(len(users), dtype), two, starts, two, n_users, n_items, eps)
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
        starts_of(rows, n_users + n_items),
        as_ids(edge_ids),
        n_users,
        n_items,
        eps,
    )


def keep_edges(edges: BipartiteEdges, kept: Bool[Array, " edges"], n_keep: int) -> SparseGraph:
    """The graph of some edges, normalised by their own degrees plus eps; static shapes, no sorting.

    Args:
        edges: from `bipartite_edges`.
        kept: (E,) which edges; `n_keep` of them.
        n_keep: static.
    """
    dtype, n_nodes = edges.log_weights.dtype, edges.n_users + edges.n_items
    rows, indices, indptr = _entries_of(edges, kept, n_keep)
    scale = jax.lax.rsqrt(jnp.diff(indptr).astype(dtype) + edges.eps)
    return SparseGraph(scale[rows] * scale[indices], indices, indptr, (n_nodes, n_nodes), n_users=edges.n_users)


@partial(jax.jit, static_argnums=2)  # one program, also where a model is made operation by operation
def _entries_of(
    edges: BipartiteEdges, kept: Bool[Array, " edges"], n_keep: int
) -> tuple[Int[Array, " entries"], Int[Array, " entries"], Int[Array, " nodes_plus_1"]]:
    """Row and column of every entry of the edges that are kept, and where the rows begin."""
    keep = kept[edges.edge_ids]
    (places,) = jnp.nonzero(keep, size=2 * n_keep)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(keep, dtype=jnp.int32)])
    indptr = before[edges.indptr]
    return row_ids(indptr, 2 * n_keep), edges.indices[places], indptr


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
    kept = top_k_mask(noise + jnp.where(weighted, edges.log_weights, 0.0), n_keep)
    return keep_edges(edges, kept, n_keep)


def drop_entries(key: Array, graph: SparseGraph, rate: Float[Array, ""] | float) -> SparseGraph:
    """Keep every stored entry by itself with probability 1 - rate, scaled by 1 / (1 - rate) (SelfCF, BUIR).

    Args:
        key: a PRNG key.
        graph: with its transpose (`with_transpose`): the result is not symmetric.
        rate: in [0, 1); may be traced.
    """
    keep = keep_mask(key, graph.data.shape, rate)
    return replace_values(graph, jnp.where(keep, graph.data / (1.0 - rate), 0.0))
