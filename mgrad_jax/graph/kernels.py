"""Ways to multiply a sparse matrix by a dense one on a GPU, and the one place that chooses.

| name | what |
|---|---|
| `segment` | gather, then `segment_sum` over sorted rows (the default); XLA may add with atomics |
| `rows` | a Pallas kernel through Triton: one program for a row and a block of columns, no atomics |
| `split` | `rows` over pieces of rows, then over the pieces of each row: a long row keeps no program waiting |
| `cusparse` | `jax.experimental.sparse.CSR`, which calls cuSPARSE |

A CPU always takes the kernel of JAX's BCSR format, other platforms `segment`. Pallas is imported where it is used: JAX
deprecates its way through Triton (0.12), and only `rows` and `split` are to go with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import sparse
from jaxtyping import Array, Float, Int

from mgrad_jax.graph.sparse import row_ids

PIECE = 512  # entries of a row that one program of `split` adds up
_CHUNK = 16  # entries read at a time
_WIDTH = 128  # columns of a program at most

Product = Callable[[tuple[int, int], Array, Array, Array, Array], Array]

# `with gpu_product("rows"):` traces with another product for CUDA; JAX keeps programs traced with different ones apart.
gpu_product = jax.make_user_context("segment")


def multiply(
    kernel: str,
    shape: tuple[int, int],
    values: Float[Array, " nnz"],
    indices: Int[Array, " nnz"],
    indptr: Int[Array, " rows_plus_1"],
    x: Float[Array, "cols dim"],
) -> Float[Array, "rows dim"]:
    """The product of a matrix of this shape with a dense one, (n_rows, dim), on CUDA by this kernel.

    Raises:
        ValueError: no kernel of this name.
    """
    if kernel not in PRODUCTS:
        raise ValueError(f"gpu_product is {kernel!r}; choose one of {', '.join(PRODUCTS)}.")
    others = {} if kernel == "segment" else {"cuda": partial(PRODUCTS[kernel], shape)}
    product: Array = jax.lax.platform_dependent(
        values, indices, indptr, x, cpu=partial(_bcsr, shape), default=partial(segment, shape), **others
    )
    return product


def _bcsr(shape: tuple[int, int], values: Array, indices: Array, indptr: Array, x: Array) -> Array:
    # The kernel knows float32 and float64; half precision is summed in float32, which is better anyway.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    graph = sparse.BCSR((values.astype(wide), indices, indptr), shape=shape)
    product: Array = graph @ x.astype(wide)
    return product.astype(x.dtype)


def segment(shape: tuple[int, int], values: Array, indices: Array, indptr: Array, x: Array) -> Array:
    """Gather and sorted segment sum."""
    rows = row_ids(indptr, indices.shape[0])
    return jax.ops.segment_sum(values[:, None] * x[indices], rows, shape[0], indices_are_sorted=True)


def cusparse(shape: tuple[int, int], values: Array, indices: Array, indptr: Array, x: Array) -> Array:
    """JAX's own compressed rows; half precision in float32, as on a CPU."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product: Array = sparse.CSR((values.astype(wide), indices, indptr), shape=shape) @ x.astype(wide)
    return product.astype(x.dtype)


def rows(
    shape: tuple[int, int],
    values: Float[Array, " nnz"],
    indices: Int[Array, " nnz"],
    indptr: Int[Array, " rows_plus_1"],
    x: Float[Array, "cols dim"],
    *,
    interpret: bool = False,
) -> Float[Array, "rows dim"]:
    """A program for every row and block of columns.

    The hardware hands out programs as others finish, so rows of different lengths balance as long as none takes longer
    than all others together; sums are taken in one order always, in float32 or better.

    Args:
        shape, values, indices, indptr: the matrix, see `SparseGraph`.
        x: (n_cols, dim), below 2**31 numbers.
        interpret: compute as Pallas's interpreter does, on any platform.
    """
    return _sums(indptr[:-1], indptr[1:], values, indices, x, interpret).astype(x.dtype)


def split_rows(
    shape: tuple[int, int],
    values: Float[Array, " nnz"],
    indices: Int[Array, " nnz"],
    indptr: Int[Array, " rows_plus_1"],
    x: Float[Array, "cols dim"],
    *,
    piece: int = PIECE,
    interpret: bool = False,
) -> Float[Array, "rows dim"]:
    """`rows` for graphs of which some rows are very long: pieces of `piece` entries, then the pieces of every row."""
    n_rows, nnz = shape[0], indices.shape[0]
    if nnz <= piece:
        return rows(shape, values, indices, indptr, x, interpret=interpret)
    counts = jnp.maximum(1, -(-jnp.diff(indptr) // piece))
    piece_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    n_pieces = n_rows + nnz // piece  # more than there are; those left over are empty
    row = row_ids(piece_starts, n_pieces)
    starts = indptr[row] + piece * (jnp.arange(n_pieces, dtype=jnp.int32) - piece_starts[row])
    ends = jnp.minimum(starts + piece, indptr[row + 1])
    sums = _sums(starts, ends, values, indices, x, interpret)
    every, ones = jnp.arange(n_pieces, dtype=jnp.int32), jnp.ones(n_pieces, sums.dtype)
    return _sums(piece_starts[:-1], piece_starts[1:], ones, every, sums, interpret).astype(x.dtype)


def _sums(starts: Array, ends: Array, values: Array, indices: Array, x: Array, interpret: bool) -> Array:
    """Row r: the sum of values[e] x[indices[e]] over the entries from starts[r] to ends[r], in float32 or better."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    n_rows, dim = starts.shape[0], x.shape[1]
    total = jax.ShapeDtypeStruct((n_rows, dim), jnp.promote_types(x.dtype, jnp.float32))
    if 0 in (n_rows, dim, indices.shape[0], x.shape[0]):
        return jnp.zeros(total.shape, total.dtype)
    width = min(_WIDTH, pl.next_power_of_2(dim))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    sums: Array = pl.pallas_call(
        partial(_row_kernel, dim=dim, width=width),
        grid=(n_rows, pl.cdiv(dim, width)),
        in_specs=[whole] * 5,
        out_specs=whole,
        out_shape=total,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=2),
        name="sparse_rows",
    )(starts, ends, values, indices, x)
    return sums


def _row_kernel(starts: Any, ends: Any, values: Any, indices: Any, x: Any, y: Any, *, dim: int, width: int) -> None:
    """One row, one block of columns; what lies outside the row or the matrix is masked."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    row, block = pl.program_id(0), pl.program_id(1)
    places = block * width + jnp.arange(width, dtype=jnp.int32)
    start, end = triton.load(starts.at[row]), triton.load(ends.at[row])

    def add(step: Array, total: Array) -> Array:
        entries = start + step * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
        real = entries < end
        factors = triton.load(values.at[entries], mask=real, other=0).astype(y.dtype)
        nodes = triton.load(indices.at[entries], mask=real, other=0)
        mask = real[:, None] & (places < dim)[None, :]
        vectors = triton.load(x.at[nodes[:, None], places[None, :]], mask=mask, other=0).astype(y.dtype)
        return total + jnp.sum(factors[:, None] * vectors, axis=0)

    n_steps = jax.lax.div(end - start + (_CHUNK - 1), jnp.int32(_CHUNK))  # not above 0 in an empty row
    total = jax.lax.fori_loop(jnp.int32(0), n_steps, add, jnp.zeros(width, y.dtype))
    triton.store(y.at[row, places], total, mask=places < dim)


PRODUCTS: Mapping[str, Product] = {"segment": segment, "rows": rows, "split": split_rows, "cusparse": cusparse}
