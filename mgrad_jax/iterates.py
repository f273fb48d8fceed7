"""The parameters to evaluate with, for optimizers that train others.

This file needs JAX and Optax only, so that it can be copied into any project.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

_SHARED = "Two optimizers, one inside the other, keep parameters of their own to evaluate with: choose one of them."


def evaluation_params(opt_state: Any, params: Any) -> Any:
    r"""Find the parameters that one evaluates, where the trained iterate is not them.

    ==================================================  ==============================================================
    ``optax.contrib.schedule_free`` and its shortcuts   the average, as ``schedule_free_eval_params`` has it
    `optax.lookahead`                                   the slow parameters
    ``optax.contrib.sam`` without ``opaque_mode``       those before the perturbation, between its steps
    every other optimizer                               ``params`` themselves, the same object
    ==================================================  ==============================================================

    Args:
        opt_state: any optimizer state, also traced; what it holds is found however it is nested, in
            `optax.partition` and `optax.masked` for the parameters of that group.
        params: the trained parameters, as given to ``update``; for `optax.lookahead` its pair.

    Returns:
        Parameters to evaluate with, in the dtypes of ``params``.

    Raises:
        ValueError: if two such optimizers share a parameter, or `optax.lookahead` comes without its pair.

    Notes:
        An average that the loop itself keeps (`optax.ema` of the parameters, say) is in no optimizer state; evaluate
        with that one.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from mgrad_jax import evaluation_params, mirror_gradient
        >>> tx = optax.chain(mirror_gradient(), optax.contrib.schedule_free_sgd(0.5))
        >>> params = jnp.array([1.0])
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params, evaluation_params(state, params))
        [0.42949995] [0.44541663]

    References:
        Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682.
        Zhang et al., *Lookahead Optimizer: k steps forward, 1 step back*, https://arxiv.org/abs/1907.08610.
    """
    kinds = optax.contrib.ScheduleFreeState | optax.contrib.SAMState | optax.LookaheadState
    found = _found(opt_state, kinds)
    if any(isinstance(node, optax.LookaheadState) for node in found):
        if not isinstance(params, optax.LookaheadParams):
            raise ValueError("optax.lookahead trains a pair of parameters: pass its optax.LookaheadParams.")
        if len(found) > 1:
            raise ValueError(_SHARED)
        return params.slow
    result, times = params, jax.tree.map(lambda leaf: 0, params)
    for node in found:
        average = isinstance(node, optax.contrib.ScheduleFreeState)
        own, function = (node.z, _average) if average else (node.cache, _unperturbed)
        result = _replaced(result, own, partial(function, node))
        times = _replaced(times, own, lambda count, _: count + 1)
    if any(count > 1 for count in jax.tree.leaves(times)):
        raise ValueError(_SHARED)
    return result


def _found(opt_state: Any, kinds: Any) -> list[Any]:
    """Every state of these kinds, those inside others included, that has parameters of its own."""
    found: list[Any] = []

    def look(node: Any) -> bool:
        if isinstance(node, kinds) and getattr(node, "cache", node) is not None:  # an opaque SAM caches nothing
            found.append(node)
        return False

    jax.tree.leaves(opt_state, is_leaf=look)
    return found


def _average(state: Any, trained: Any, z: Any) -> jax.Array:
    b1 = _beside(state.b1, z)
    with jax.numpy_dtype_promotion("standard"):
        average: jax.Array = optax.contrib.schedule_free_eval_params(state._replace(b1=b1, z=z), trained)
        return average.astype(trained.dtype)


def _unperturbed(state: Any, trained: Any, cached: Any) -> jax.Array:
    return jnp.where(_beside(state.steps_since_sync, cached) == 0, trained, cached)


def _beside(scalar: Any, leaf: Any) -> jax.Array:
    """A state's scalar, one for each member in a stack of states, so that it broadcasts against a parameter."""
    scalar = jax.tree.leaves(scalar)[0]  # a framework may have wrapped it in a variable
    return jnp.reshape(scalar, (*scalar.shape, *[1] * (leaf.ndim - scalar.ndim)))


def _replaced(params: Any, own: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Parameters with ``function(parameter, x)`` wherever ``own``, which may be masked, holds an x."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if any(masked(node) for node in jax.tree.leaves(own, is_leaf=masked)):
        return jax.tree.map(lambda x, p: p if masked(x) else function(p, x), own, params, is_leaf=masked)
    # By leaves, for a framework may have wrapped them in variables of one class here and of another there.
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [function(p, x) for p, x in zip(leaves, jax.tree.leaves(own), strict=True)])
