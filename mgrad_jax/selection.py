"""A mask of the largest of many numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgrad_jax.deprecation import renamed

renamed(__name__, {"largest": "top_k_mask"})


@jax.jit
def top_k_mask(values: Float[Array, " n"], count: jax.typing.ArrayLike) -> Bool[Array, " n"]:
    """Mask of the `count` largest values, of equal ones the first; `count` may be traced, as `jax.lax.top_k`'s may not.

    Sorts the bit patterns as unsigned integers: on a CPU, XLA's sort of floating-point numbers takes five times as
    long, because it checks for NaN at every comparison.

    Args:
        values: float32 or float64, no NaN.
        count: from 0 to n.
    """
    if not values.size:
        return jnp.zeros(0, jnp.bool_)
    ranks = _ordered_bits(values)
    n_smaller = jnp.asarray(values.size - count, jnp.int32)
    last = jnp.sort(ranks)[jnp.minimum(n_smaller, values.size - 1)]
    above, level = ranks > last, ranks == last
    return above | (level & (jnp.cumsum(level) <= count - jnp.sum(above)))


def _ordered_bits(values: Array) -> Array:
    """Unsigned numbers in the order of the floating-point ones, both zeros alike."""
    bits = jnp.finfo(values.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}").type
    raw = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0, values), unsigned)
    is_negative = (raw >> unsigned(bits - 1)) > 0
    return jnp.where(is_negative, ~raw, raw | unsigned(1 << (bits - 1)))
