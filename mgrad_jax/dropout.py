"""Dropout masks at half the price: random numbers are what dropout costs, and a mask needs only 16 bits an entry."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def keep_mask(key: Array, shape: tuple[int, ...], rate: Float[Array, ""] | float) -> Bool[Array, "..."]:
    """True with probability 1 - rate, each entry by itself; the rate is met to within 2**-17.

    Args:
        key: a PRNG key.
        shape: of the mask.
        rate: in [0, 1); may be traced.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, ((size + 1) // 2,), jnp.uint32)
    # Two entries a word.
    bits = jnp.concatenate([words >> 16, words & 0xFFFF])[:size].reshape(shape)
    return bits >= jnp.round(jnp.asarray(rate, jnp.float32) * 2**16).astype(jnp.uint32)


def dropout(
    key: Array, x: Float[Array, "rows dim"], rate: Float[Array, ""] | float, ids: Int[Array, " rows"] | None = None
) -> Float[Array, "rows dim"]:
    """Inverted dropout: entries kept with probability 1 - rate and scaled by 1 / (1 - rate).

    Args:
        key: a PRNG key.
        x: rows, e.g. of a batch.
        rate: in [0, 1); may be traced.
        ids: of the rows; rows of one id share one mask, as if the whole table had been dropped out before the rows
            were taken. None: every row has its own.
    """
    if ids is None:
        keep = keep_mask(key, x.shape, rate)
    else:
        keep = jax.vmap(lambda row_id: keep_mask(jax.random.fold_in(key, row_id), x.shape[1:], rate))(ids)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
