"""Item graphs: nearest neighbours by features, and blends of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mgrad_jax.devices import BLOCKS, WHOLE, everywhere, loaded, mesh_in_force, over_devices
from mgrad_jax.errors import UserError
from mgrad_jax.graph import ring
from mgrad_jax.graph.sparse import SparseGraph, blank_graph, rows_on_host, shapes_only, sparse_graph

# A table of at least so many bytes is not brought whole to each of several devices. Every smaller one, and its copy of
# unit rows, fits a device beside its share of a model, and is compared as one device compares it.
RING_BYTES = 1 << 30
BLOCK = 1024


def knn_indices(features: Float[np.ndarray | Array, "n dim"], k: int, block: int = BLOCK) -> Int[Array, "n k"]:
    """The k nearest rows of every row by cosine similarity, itself included; ties go to the lower index.

    Exact, on the device, in blocks of rows: no (n, n) array in memory. Where a mesh is set (`jax.set_mesh`), each of
    its devices has the whole table and does some of the blocks; these are the same, and so are the neighbours. A table
    of `RING_BYTES` or more stays split by rows (`mgrad_jax.graph.ring`): its neighbours are the same on any number of
    several devices, and those of one device but for ties in the last digit.

    Args:
        features: (n, dim), finite, no zero row.
        k: neighbours, at most n.
        block: rows at a time.

    Raises:
        UserError: k above n, or a row that has no direction.
    """
    if isinstance(features, np.ndarray):
        table = loaded([features], jax.dtypes.canonicalize_dtype(features.dtype))
    else:
        table = features
    n = table.shape[0]
    if not 1 <= k <= n:
        raise UserError(f"knn_k is {k}; it must be between 1 and the number of items, {n}.")
    if (mesh := mesh_in_force()) is not None:
        if _goes_round(table.nbytes, mesh.size):
            rows = ring.by_tiles(table, block)
            _check_directions(ring.norms(rows)[:n])
            nearest: Array = ring.nearest(rows, n, k, block)
            return nearest
        table = _everywhere(table)
    norms = jnp.linalg.norm(table, axis=1, keepdims=True)
    _check_directions(norms[:, 0])
    found: Array = _knn(table / norms, k, min(block, n))
    return found


def knn_bytes(n: int, dim: int, dtype: Any, devices: int) -> int:
    """What each of so many devices has, about, while the nearest rows of an (n, dim) table are found."""
    size: int = jnp.dtype(dtype).itemsize
    if _goes_round(n * dim * size, devices):
        rows = -(-n // (BLOCK * devices)) * BLOCK
        return (rows + 3 * BLOCK) * dim * size  # its rows, and of tiles one's own, the visitor and the next
    return (2 * n * dim + BLOCK * n) * size  # the table, unit rows, and products of a block


def _goes_round(n_bytes: int, devices: int) -> bool:
    """Whether a table of so many bytes stays split by rows over so many devices."""
    return devices > 1 and n_bytes >= RING_BYTES


_everywhere = jax.jit(everywhere)


def _check_directions(norms: Float[Array, " n"]) -> None:
    bad = np.flatnonzero(~np.asarray((norms > 0) & jnp.isfinite(norms)))
    if len(bad):
        raise UserError(f"feature row {bad[0]} is all zero or not finite, so it has no nearest items; fill it.")


@partial(jax.jit, static_argnums=(1, 2))
def _knn(table: Float[Array, "n dim"], k: int, block: int) -> Int[Array, "n k"]:
    n = table.shape[0]
    starts = jnp.arange(0, n, block)

    def neighbours(table: Array, start: Array) -> Array:
        # The last block is shifted back so that every block has the same shape.
        rows = jax.lax.dynamic_slice_in_dim(table, jnp.minimum(start, n - block), block)
        similarity = jnp.matmul(rows, table.T, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.top_k(similarity, k)[1]

    found = _over_blocks(neighbours, starts, table)
    tail = n - block * (starts.shape[0] - 1)
    return jnp.concatenate([found[:-1].reshape(-1, k), found[-1, block - tail :]]).astype(jnp.int32)


def _over_blocks(
    function: Callable[[Array, Array], Array], starts: Int[Array, " blocks"], table: Float[Array, "n dim"]
) -> Int[Array, "blocks block k"]:
    """Results (blocks, ...) of `function(table, start)`, block after block; of several devices, each does its own."""

    def own(starts: Array, table: Array) -> Array:
        results: Array = jax.lax.map(partial(function, table), starts)
        return results

    if (mesh := mesh_in_force()) is None:
        return own(starts, table)
    shared = jnp.pad(starts, (0, -starts.shape[0] % mesh.size), mode="edge")  # blocks done again fill up the last ones
    found = over_devices(mesh, own, (BLOCKS, WHOLE), BLOCKS, shared, table)
    return everywhere(found)[: starts.shape[0]]


def knn_graph(features: Float[np.ndarray | Array, "n dim"], k: int, dtype: Any = jnp.float32) -> SparseGraph:
    """The directed graph of `knn_indices`, both ends normalised by the row degree k: every entry is 1 / (k + 1e-7)."""
    if shapes_only.value:
        n_items = features.shape[0]
        return blank_graph(n_items * k, (n_items, n_items), dtype=dtype)
    neighbours = np.asarray(knn_indices(features, k))
    n = len(neighbours)
    values = np.full(n * k, 1.0 / (k + 1e-7))
    return sparse_graph(np.repeat(np.arange(n), k), neighbours.ravel(), values, (n, n), dtype=dtype)


def blend_graphs(weighted: Sequence[tuple[float, SparseGraph]]) -> SparseGraph:
    """The weighted sum of graphs of one shape, as one graph. Host side."""
    shape, dtype = weighted[0][1].shape, weighted[0][1].data.dtype
    if shapes_only.value:
        return blank_graph(sum(graph.nnz for _, graph in weighted), shape, dtype=dtype)
    rows = np.concatenate([rows_on_host(graph) for _, graph in weighted])
    columns = np.concatenate([np.asarray(graph.indices) for _, graph in weighted])
    values = np.concatenate([weight * np.asarray(graph.data, np.float64) for weight, graph in weighted])
    return sparse_graph(rows, columns, values, shape, dtype=dtype)
