"""The masks of sparse sharpness-aware minimization: what they follow, and how they are renewed where that is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def refreshed(due: jax.Array, renew: Callable[[], Any], mask: Any) -> Any:
    """``renew()`` where it is due, else the mask; what is not due is not computed."""
    if not isinstance(due, jax.core.Tracer):
        # Outside jit, lax.cond would compile anew for every closure.
        return renew() if bool(due) else mask
    return jax.lax.cond(
        _for_any_member(due),
        lambda: jax.tree.map(lambda new, old: jnp.where(due, new, old), renew(), mask),
        lambda: mask,
    )


@jax.custom_batching.custom_vmap
def _for_any_member(due: jax.Array) -> jax.Array:
    """``due``; under `jax.vmap` whether it is for any member, one answer for all.

    A condition on a batched value would become a select, which computes the renewal on every batch.
    """
    return due


@_for_any_member.def_vmap
def _for_any_member_batched(axis_size: int, in_batched: list[bool], due: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _for_any_member(jnp.any(due, axis=0)), False


def fisher_information(sample_grad_fn: Callable[[Any, jax.Array], Any], params: Any, samples: jax.Array) -> Any:
    """Sum of the squared gradients of these samples, one at a time; at least float32, shaped like the parameters."""

    def add(total: Any, sample: jax.Array) -> tuple[Any, None]:
        grads = sample_grad_fn(params, sample)
        return jax.tree.map(lambda t, g: t + jnp.square(g.astype(t.dtype)), total, grads), None

    start = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, wide(leaf)), params)
    return jax.lax.scan(add, start, samples)[0]


def exchange_counts(size: int, sparsity: float, drop_rate: float, refresh_epochs: int, epochs: int) -> np.ndarray:
    """How many parameters stay in the mask and how many grow into it, at each renewal: (2, renewals) int32.

    A table, for float32 could not count the parameters of a large model exactly.
    """
    rounds = range(-(-epochs // refresh_epochs) + 1)
    rates = [drop_rate / 2 * (1 + math.cos(math.pi * min(n * refresh_epochs, epochs) / epochs)) for n in rounds]
    stay = [int(size * (1 - sparsity) * (1 - rate)) for rate in rates]
    grow = [int(min(size * (1 - sparsity) * rate, size * sparsity)) for rate in rates]
    return np.asarray([stay, grow], np.int32)


def flat(tree: Any) -> jax.Array:
    """All values in one row, real numbers in at least float32."""
    values = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(wide(leaf)), tree)
    if _is_sharding_explicit():  # a row of all values is split in no way that its parts have
        values = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, jax.sharding.PartitionSpec()), values)
    return ravel_pytree(values)[0]


def unflat(row: jax.Array, like: Any) -> Any:
    """The inverse of `flat` for a mask, shaped and split like the parameters."""
    unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.bool_), like))[1]
    mask = unravel(row)
    if _is_sharding_explicit():
        mask = jax.tree.map(lambda leaf, other: jax.sharding.reshard(leaf, jax.typeof(other).sharding), mask, like)
    return mask


def _is_sharding_explicit() -> bool:
    """Whether arrays carry their sharding in their types (JAX's explicit mode), so that operands must agree in it."""
    return jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def wide(leaf: Any) -> Any:
    """The type of an array, or float32 where that is narrower."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(leaf.dtype, jnp.float32)
