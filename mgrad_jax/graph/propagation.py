"""Propagation, the product of a graph with the vectors of its nodes.

The product knows its transpose, a product with the transposed matrix by the same fast kernel, where the automatic one
would scatter; and it has a batching rule of its own, so that members of a grid share one wide product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrad_jax.devices import (
    AXIS,
    COLUMNS,
    WHOLE,
    held_by_rows,
    mesh_in_force,
    over_devices,
    padded_columns,
    turned_to_columns,
)
from mgrad_jax.graph.kernels import gpu_product, multiply
from mgrad_jax.graph.multilinear import Arguments, Multilinear, Others
from mgrad_jax.graph.sparse import SparseGraph, row_ids, structure_of


def propagate(graph: SparseGraph, x: Float[Array, "cols dim"]) -> Float[Array, "rows dim"]:
    """One step of propagation, y = A x: the product of a sparse and a dense matrix (SpMM).

    Differentiable any number of times, forwards and backwards, in `x` and in `graph.data` (whose derivative the
    compiler drops where nobody asks for it). In a symmetric graph the stored values count as independent entries.

    Args:
        graph: (n_rows, n_cols).
        x: (n_cols, dim).

    Returns:
        (n_rows, dim) in x's dtype.
    """
    if x.ndim != 2 or x.shape[0] != graph.shape[1]:
        raise ValueError(f"propagate: x has shape {x.shape}; the graph needs ({graph.shape[1]}, dim).")
    return held_by_rows(product(graph.shape, graph.data.astype(x.dtype), structure_of(graph), held_by_rows(x)))


def product(
    shape: tuple[int, int],
    values: Float[Array, " nnz"],
    structure: tuple[Any, ...],
    x: Float[Array, "cols dim"],
    symmetric: bool | None = None,
) -> Float[Array, "rows dim"]:
    """`propagate` with other values; `symmetric`: whether they equal their mirror images, if no transpose is stored."""
    static = _static(shape, structure, symmetric=symmetric)
    return _product(((values,), (x,)), structure, **static)[0]


def _static(
    shape: tuple[int, int],
    structure: tuple[Any, ...],
    sizes: tuple[int, int] | None = None,
    symmetric: bool | None = None,
) -> dict[str, Any]:
    """What is fixed about a product: `symmetric` promises that the values equal their mirror images."""
    promised = structure[2] is None if symmetric is None else symmetric
    return {
        "shape": shape,
        "sizes": sizes,
        "symmetric": promised,
        "transposed": False,
        "kernel": gpu_product.value,
        "mesh": mesh_in_force(),
    }


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
    structure = structure_of(graph)
    static = _static(graph.shape, structure, sizes)
    to_users, to_items = _product(((graph.data.astype(users.dtype),), (users, items)), structure, **static)
    return to_users, to_items


def lightgcn_mean(
    graph: SparseGraph, users: Float[Array, "users dim"], items: Float[Array, "items dim"], n_layers: int
) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
    """Mean over layers 0..L of the propagated embeddings, `1 / (L + 1) sum_l A^l x` (He et al. 2020, LightGCN).

    Args:
        graph: A, the normalised user-item graph over users, then items.
        users, items: layer 0.
        n_layers: L; 0 gives layer 0 back.
    """
    user_sum, item_sum = sum_of_layers(graph, users, items, n_layers)
    return user_sum / (n_layers + 1), item_sum / (n_layers + 1)


def sum_of_layers(
    graph: SparseGraph, users: Float[Array, "users dim"], items: Float[Array, "items dim"], n_layers: int
) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
    """The sum over layers 0..L of the propagated embeddings, sum_l A^l x; on several devices by columns.

    Args:
        graph, users, items, n_layers: as for `lightgcn_mean`.
    """
    users, items = turned_to_columns((users, items))
    user_sum, item_sum = users, items
    for _ in range(n_layers):
        users, items = propagate_bipartite(graph, users, items)
        user_sum, item_sum = user_sum + users, item_sum + items
    return turned_to_columns((user_sum, item_sum))


# The product is linear in the values and in the vectors; the vectors are one array, or users and items apart.


def _compute(
    arguments: Arguments,
    structure: tuple[Any, ...],
    *,
    shape: tuple[int, int],
    sizes: tuple[int, int] | None,
    symmetric: bool,
    transposed: bool,
    kernel: str,
    mesh: Any,
) -> tuple[Array, ...]:
    (values,), vectors = arguments
    indices, indptr, transpose = structure
    if transposed and transpose is None and not symmetric:
        return _scattered(values, indices, indptr, vectors, shape)
    if transposed:
        shape = shape[::-1]
    if transposed and transpose is not None:
        values, indices, indptr = values[transpose.permutation], transpose.indices, transpose.indptr
    by_kernel = partial(_by_columns, mesh, kernel)
    if sizes is None:
        return (by_kernel(shape, values, indices, indptr, vectors[0]),)
    return _halves(sizes, by_kernel, values, indices, indptr, *vectors)


def _by_columns(
    mesh: Any, kernel: str, shape: tuple[int, int], values: Array, indices: Array, indptr: Array, x: Array
) -> Array:
    """The product, of its own columns on each of several devices: nothing is sent, and no sum is split."""
    if mesh is None:
        return multiply(kernel, shape, values, indices, indptr, x)
    own, specs = partial(multiply, kernel, shape), (WHOLE, WHOLE, WHOLE, COLUMNS)
    wide = padded_columns(x, mesh.size)
    return over_devices(mesh, own, specs, COLUMNS, values, indices, indptr, wide)[:, : x.shape[1]]


def _halves(
    sizes: tuple[int, int],
    by_kernel: Callable[..., Array],
    values: Float[Array, " nnz"],
    indices: Int[Array, " nnz"],
    indptr: Int[Array, " nodes_plus_1"],
    users: Float[Array, "users dim"],
    items: Float[Array, "items dim"],
) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
    """Both products of one step; half of the entries lie in the rows of users."""
    n_users, n_items = sizes
    half = indices.shape[0] // 2
    to_users = by_kernel(sizes, values[:half], indices[:half] - n_users, indptr[: n_users + 1], items)
    to_items = by_kernel((n_items, n_users), values[half:], indices[half:], indptr[n_users:] - half, users)
    return to_users, to_items


def _scattered(
    values: Array, indices: Array, indptr: Array, vectors: tuple[Array, ...], shape: tuple[int, int]
) -> tuple[Array, ...]:
    """With the transposed matrix whose structure is not stored; only second derivatives by values come here."""
    x = jnp.concatenate(vectors)
    rows = row_ids(indptr, indices.shape[0])
    y = jax.ops.segment_sum(values[:, None] * x[rows], indices, shape[1])
    return _parted(y, [part.shape[0] for part in vectors])


def _parted(y: Array, sizes: list[int]) -> tuple[Array, ...]:
    return (y,) if len(sizes) == 1 else (y[: sizes[0]], y[sizes[0] :])


def _pull_values(results: list[Array], arguments: Others, structure: tuple[Any, ...], **static: Any) -> Any:
    pulls, vectors = jnp.concatenate(results), jnp.concatenate(arguments[1])
    pair = (vectors, pulls) if static["transposed"] else (pulls, vectors)
    return (entry_dots(static["shape"], structure, *pair),)


def _pull_vectors(results: list[Array], arguments: Others, structure: tuple[Any, ...], **static: Any) -> Any:
    transposed = {**static, "transposed": not static["transposed"]}
    return _product((arguments[0], tuple(results)), structure, **transposed)


def _along_values(moved: Any, arguments: Arguments, structure: tuple[Any, ...], **static: Any) -> tuple[Array, ...]:
    # Tangents of the values may be any numbers, whatever the values promise.
    return _product((moved, arguments[1]), structure, **{**static, "symmetric": False})


def _batch(operands: Any, axes: Any, *, tree: Any, static: tuple[Any, ...]) -> tuple[Any, Any]:
    """Members as columns of one wide product where only the vectors differ, otherwise one product a member."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    fixed = dict(static)
    n_vectors = 1 if fixed["sizes"] is None else 2
    if all(axis is None for place, axis in enumerate(axes) if not 1 <= place <= n_vectors):
        arguments, structure = jax.tree.unflatten(tree, operands)
        wide = tuple(_columns(x, axis, size) for x, axis in zip(arguments[1], axes[1 : 1 + n_vectors], strict=True))
        results = _product((arguments[0], wide), structure, **fixed)
        return [jnp.moveaxis(y.reshape(y.shape[0], size, -1), 1, 0) for y in results], [0] * n_vectors
    stacked = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    results = jax.lax.map(lambda member: _product(*jax.tree.unflatten(tree, member), **fixed), stacked)
    return list(results), [0] * n_vectors


def _columns(x: Array, axis: int | None, size: int) -> Float[Array, "nodes wide"]:
    """All members' vectors of a node in one row."""
    members = jnp.broadcast_to(x[:, None], (x.shape[0], size, x.shape[1])) if axis is None else jnp.moveaxis(x, axis, 1)
    return members.reshape(members.shape[0], -1)


_product = Multilinear("graph_product", _compute, {0: _pull_values, 1: _pull_vectors}, _batch, {0: _along_values})


# The derivative of a product by the matrix's values: linear in the vectors on either side.


def entry_dots(
    shape: tuple[int, int], structure: tuple[Any, ...], a: Float[Array, "rows dim"], b: Float[Array, "cols dim"]
) -> Float[Array, " nnz"]:
    """<a[row], b[column]> of every entry (a sampled dense-dense product, SDDMM); a (n_rows, dim), b (n_cols, dim)."""
    return _entry_dots(((a,), (b,)), structure, shape=shape, mesh=mesh_in_force())[0]


def _dots_of_entries(
    arguments: Arguments, structure: tuple[Any, ...], *, shape: tuple[int, int], mesh: Any
) -> tuple[Array]:
    indices, indptr, _ = structure
    return (dots(mesh, indices, row_ids(indptr, indices.shape[0]), arguments[0][0], arguments[1][0]),)


def _pull_rows(
    results: list[Array], arguments: Others, structure: tuple[Any, ...], *, shape: Any, mesh: Any
) -> tuple[Array]:
    return (product(shape, results[0], structure, arguments[1][0], symmetric=False),)


def _pull_columns(
    results: list[Array], arguments: Others, structure: tuple[Any, ...], *, shape: Any, mesh: Any
) -> tuple[Array, ...]:
    static = _static(shape, structure, symmetric=False)
    return _product(((results[0],), arguments[0]), structure, **{**static, "transposed": True})


_entry_dots = Multilinear("graph_entry_dots", _dots_of_entries, {0: _pull_rows, 1: _pull_columns})


def dots(
    mesh: Any,
    indices: Int[Array, " n"],
    rows: Int[Array, " n"],
    a: Float[Array, "rows dim"],
    b: Float[Array, "cols dim"],
) -> Float[Array, " n"]:
    """<a[row], b[column]> of some entries; of their own columns on several devices, which then send n numbers each."""
    if mesh is None:
        return _dots(indices, rows, a, b)

    def own(indices: Array, rows: Array, a: Array, b: Array) -> Array:
        sums: Array = jax.lax.psum(_dots(indices, rows, a, b), AXIS)
        return sums

    wide = padded_columns(a, mesh.size), padded_columns(b, mesh.size)
    return over_devices(mesh, own, (WHOLE, WHOLE, COLUMNS, COLUMNS), WHOLE, indices, rows, *wide)


def _dots(indices: Array, rows: Array, a: Array, b: Array) -> Array:
    products = a[rows] * b[indices]
    sums: Array = jax.lax.platform_dependent(products, cpu=_sum_by_halves, default=lambda x: jnp.sum(x, axis=-1))
    return sums


def _sum_by_halves(x: Float[Array, "*places dim"]) -> Float[Array, "*places"]:
    # On a CPU a sum fused with the gather of its rows adds number by number; halves added to halves take a twentieth.
    width, rest = x.shape[-1], jnp.zeros(x.shape[:-1], x.dtype)
    while width > 1:
        if width % 2:
            rest = rest + x[..., width - 1]
        width //= 2
        x = x[..., :width] + x[..., width : 2 * width]
    return x[..., 0] + rest if width else rest
