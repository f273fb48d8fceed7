"""A check for loops of one's own: were both passes of a mirror batch made with the same batch?

This file needs JAX, Optax and `mgrad_jax.mirror` only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgrad_jax.mirror import second_pass_pending


class CheckedState(NamedTuple):
    """State of `checked`.

    Attributes:
        inner_state: state of the checked transformation.
        fingerprint: of the batch of the last pass. Shape (), uint32.
    """

    inner_state: Any
    fingerprint: jax.Array


def checked(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Have a mirror compare the batches of its two passes; for a loop that calls ``update`` itself.

    A loop that was written for other optimizers calls ``update`` once a batch. With `mirror_gradient` in the chain it
    then takes every next batch for the second pass, that is, it climbs the loss of one batch out of four at interval 3,
    and still seems to train. With this wrapper ``update`` wants to know its batch.

    Args:
        optimizer: `mirror_gradient` or `replay`, alone or with what follows in the chain.

    Returns:
        A transformation with a `CheckedState`, whose ``update`` needs ``batch=``: the batch or anything that tells
        batches apart, such as its number; a tree of arrays and numbers. Further arguments are handed on. If a second
        pass comes with another batch than the first, ``update`` raises ValueError where the values are known, outside
        `jax.jit`; inside, where nothing can be raised, the updates become NaN, so that the loss does. `mirror_step`
        hands its batch over by itself.

    Raises:
        ValueError: by ``update``, without ``batch`` or as said.

    Notes:
        The state holds 32 bits of every batch, which two of them share once in four billion pairs. Without the check
        nothing is computed or stored: switch it on to test a loop, and off again.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from mgrad_jax import checked, mirror_gradient
        >>> tx = optax.chain(checked(mirror_gradient(interval=3)), optax.sgd(0.1))
        >>> state = tx.init(jnp.zeros(2))
        >>> for number in range(2):  # one pass a batch
        ...     try:
        ...         updates, state = tx.update(jnp.ones(2), state, batch=number)
        ...     except ValueError as error:
        ...         print(str(error)[:61])
        The second pass of a mirror batch was made with another batch

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1, both passes on the same batch.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: Any) -> CheckedState:
        return CheckedState(inner.init(params), jnp.zeros([], jnp.uint32))

    def update_fn(
        updates: Any, state: CheckedState, params: Any = None, *, batch: Any = None, **extra_args: Any
    ) -> tuple[Any, CheckedState]:
        if batch is None:
            raise ValueError(
                "A checked mirror compares the batches of its passes: pass `batch=`, the batch or its number. A caller "
                "that cannot, such as flax's TrainState.apply_gradients, makes no second pass: use mirror_step."
            )
        seen = _fingerprint(batch)
        differs = second_pass_pending(state.inner_state) & (seen != state.fingerprint)
        if not isinstance(differs, jax.core.Tracer) and np.any(differs):
            raise ValueError(
                "The second pass of a mirror batch was made with another batch than the first: call `update` once more "
                "on the same batch while second_pass_pending(opt_state), or train with mirror_step or mirrored."
            )
        updates, inner_state = inner.update(updates, state.inner_state, params, batch=batch, **extra_args)
        poisoned = jax.tree.map(lambda leaf: _nan_where(differs, leaf), updates)
        return poisoned, CheckedState(inner_state, seen)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _nan_where(bad: jax.Array, leaf: Any) -> Any:
    return jnp.where(bad, jnp.nan, leaf).astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _fingerprint(batch: Any) -> jax.Array:
    """32 bits that depend on every value in the batch and on its place; only arrays and numbers count."""
    total: jax.Array = jnp.uint32(0)
    for leaf in jax.tree.leaves(batch):
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            bits = jnp.ravel(_bits(jnp.asarray(leaf)))
            places = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
            total = _mixed(total + jnp.uint32(1)) + jnp.sum(_mixed(bits + places), dtype=jnp.uint32)
    return total


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of an array, as uint32."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    return leaf.astype(jnp.uint32)


def _mixed(bits: jax.Array) -> jax.Array:
    """MurmurHash3's last step: every bit of the result depends on every bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    mixed: jax.Array = bits ^ (bits >> jnp.uint32(16))
    return mixed
