"""Rows of a table, whose gradient is a sparse product instead of a scatter.

The gradient of `table[ids]` adds up the rows of equal ids. XLA does that by a scatter, on a GPU with atomics: the order
of the additions, and so the last digits, change from run to run. Sorted by id the same sum is a product with a sparse
matrix of ones, by the kernel that `mgrad_jax.graph.kernels.gpu_product` names. The models index their tables the plain
way, which a CPU does faster.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrad_jax.graph.kernels import gpu_product, multiply
from mgrad_jax.graph.multilinear import Arguments, Multilinear, Others


def gather_rows(table: Float[Array, "rows dim"], ids: Int[Array, " n"]) -> Float[Array, "n dim"]:
    """`table[ids]`, differentiable any number of times, with a gradient that sorts and adds.

    Args:
        table: (n_rows, dim).
        ids: (n,) in [0, n_rows), in any order, repeated or not.

    >>> import jax, jax.numpy as jnp
    >>> jax.grad(lambda t: gather_rows(t, jnp.array([1, 1])).sum())(jnp.zeros((2, 1))).tolist()
    [[0.0], [2.0]]
    """
    return _gather(((table,),), ids, n_rows=table.shape[0])[0]


def _rows_of(arguments: Arguments, ids: Array, *, n_rows: int) -> tuple[Array]:
    return (arguments[0][0][ids],)


def _added(arguments: Arguments, ids: Array, *, n_rows: int, kernel: str) -> tuple[Array]:
    (rows,) = arguments[0]
    order = jnp.argsort(ids).astype(jnp.int32)
    starts = jnp.searchsorted(ids[order], jnp.arange(n_rows + 1, dtype=ids.dtype)).astype(jnp.int32)
    ones = jnp.ones(ids.shape[0], rows.dtype)
    return (multiply(kernel, (n_rows, ids.shape[0]), ones, order, starts, rows),)


def _pull_table(results: list[Array], arguments: Others, ids: Array, *, n_rows: int) -> tuple[Array, ...]:
    return _add((tuple(results),), ids, n_rows=n_rows, kernel=gpu_product.value)


def _pull_rows(results: list[Array], arguments: Others, ids: Array, *, n_rows: int, kernel: Any) -> Any:
    return _gather((tuple(results),), ids, n_rows=n_rows)


_gather = Multilinear("gather_rows", _rows_of, {0: _pull_table})
_add = Multilinear("add_rows", _added, {0: _pull_rows})
