r"""The second half-step of a mirror batch as gradient ascent with the optimizer's own step sizes.

An optimizer with momentum and second moments, such as Adam, takes most of a gradient of the other sign back in its
moments, so that the second half-step of a mirror batch goes on downhill. Here it is the step that the optimizer would
make along a gradient that has always been the wanted one, :math:`\tau`, small, and with the second moment that it has:

.. math::
    A(\tau) = \frac{d}{ds}\, U(s \tau;\ m_s, v) \Big|_{s = 0},

with :math:`U` the optimizer's update, :math:`m_s` the first moment after equally many steps along :math:`s \tau`, and
:math:`v` the second moment as the first half-step leaves it. For Adam that is
:math:`-\eta\, \tau / (\sqrt{\hat v} + \epsilon)` to rounding. Nothing of the optimizer's state changes.

This file needs JAX and Optax only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

# What states call their second moment: Adam and its relatives, RMSprop; optax.adagrad; mgrad_jax.optimizers.
_SECOND_MOMENTS = ("nu", "sum_of_squares", "squares")
# Its `mu` is no average that the step goes along: the variance is taken around it.
_CENTERED = "RStdDev"

Update = Callable[[Any, Any], tuple[Any, Any]]


def check_own_ascent(optimizer: optax.GradientTransformation, params: Any) -> None:
    """Refuse an optimizer whose step sizes cannot be read from its state.

    Raises:
        ValueError: it holds arrays like the parameters that are neither a known second moment nor momentum.
    """
    # One more axis, so that a scalar parameter's moments can be told from a counter.
    grown = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *jnp.shape(leaf)), jnp.result_type(leaf)), params)
    state = jax.eval_shape(lambda params: optimizer.init(params), grown)
    shapes = {leaf.shape for leaf in jax.tree.leaves(grown)}
    for node in jax.tree.leaves(state, is_leaf=lambda node: _is_known(node) or isinstance(node, optax.TraceState)):
        if isinstance(node, optax.TraceState):
            continue
        if _is_known(node):
            held = jax.tree.leaves(getattr(node, _name(node)))
            unknown = _CENTERED in type(node).__name__ or any(leaf.shape not in shapes for leaf in held)
        else:
            unknown = node.ndim > 0
        if unknown:
            raise ValueError(
                "No second moment is found in the state of this optimizer, so its ascent has no step sizes: pass "
                "ascent= an optimizer of its own, for example optax.sgd(learning_rate)."
            )


def own_ascent(update: Update, wanted: Any, before: Any, after: Any) -> Any:
    r"""The ascent step :math:`A(\tau)` of an optimizer.

    Args:
        update: ``update(gradient, state) -> (updates, state)`` of the optimizer, other arguments given.
        wanted: the gradient to step along, :math:`\tau = -\alpha_2 g(\theta')`.
        before, after: the optimizer's state before and after the first half-step. The counters of ``before`` hold: both
            half-steps have the same learning rate.

    Returns:
        What is to be added to the parameters.
    """
    known = _known(before)
    decays = _decay_factors(update, wanted, before)
    seconds = [
        jax.tree.map(lambda v, factor: jnp.maximum(v / factor, 4 * jnp.finfo(v.dtype).tiny), _second(node), factor)
        for node, (_, factor) in zip(_known(after), decays, strict=True)
    ]

    def along(s: jax.Array) -> Any:
        gradient = jax.tree.map(lambda leaf: _times(s, leaf), wanted)
        firsts = [_steady(first_factor, node, gradient) for (first_factor, _), node in zip(decays, known, strict=True)]
        return update(gradient, _with_moments(before, firsts, seconds))[0]

    # A float32 number even beside float64 parameters: only its derivative counts.
    at_rest, step = jax.jvp(along, (jnp.zeros([], jnp.float32),), (jnp.ones([], jnp.float32),))
    return jax.tree.map(lambda u, du: du if jnp.issubdtype(u.dtype, jnp.inexact) else u, at_rest, step)


def _decay_factors(update: Update, wanted: Any, state: Any) -> list[tuple[Any, Any]]:
    """By what each first and second moment is multiplied in a step along no gradient: b1 and b2, entry by entry."""
    nothing = jax.tree.map(jnp.zeros_like, wanted)
    known = _known(state)
    ones = [jax.tree.map(jnp.ones_like, _second(node)) for node in known]

    def moments(first: jax.Array) -> Any:
        filled = [jax.tree.map(lambda m: _times(first, jnp.ones_like(m)), _first(node)) for node in known]
        changed = _known(update(nothing, _with_moments(state, filled, ones))[1])
        return [_first(node) for node in changed], [_second(node) for node in changed]

    # The first one's as a derivative at 0: some second moments depend on the first.
    zero, one = jnp.zeros([], jnp.float32), jnp.ones([], jnp.float32)
    (_, seconds), (firsts, _) = jax.jvp(moments, (zero,), (one,))
    return list(zip(firsts, seconds, strict=True))


def _steady(first_factor: Any, node: Any, gradient: Any) -> Any:
    """The first moment after as many steps as the state has made, all along one gradient: (1 - b1^t) times it."""
    if first_factor is None:
        return None

    def moment(b1: Any, g: Any) -> Any:
        if isinstance(b1, optax.MaskedNode):
            return b1
        share = 1 - b1 ** node.count.astype(b1.dtype) if hasattr(node, "count") else jnp.ones_like(b1)
        return (share.astype(g.dtype) * g).astype(b1.dtype)

    return jax.tree.map(moment, first_factor, gradient, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))


def _times(s: jax.Array, leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    return s.astype(leaf.dtype) * leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _is_known(node: Any) -> bool:
    return hasattr(node, "_fields") and any(name in node._fields for name in _SECOND_MOMENTS)


def _known(state: Any) -> list[Any]:
    """The parts of a state that hold a second moment."""
    return [node for node in jax.tree.leaves(state, is_leaf=_is_known) if _is_known(node)]


def _name(node: Any) -> str:
    return next(name for name in _SECOND_MOMENTS if name in node._fields)


def _second(node: Any) -> Any:
    return getattr(node, _name(node))


def _first(node: Any) -> Any:
    return getattr(node, "mu", None)


def _with_moments(state: Any, firsts: Sequence[Any], seconds: Sequence[Any]) -> Any:
    """A state with these moments in place of its own."""
    moments = iter(zip(firsts, seconds, strict=True))

    def replaced(node: Any) -> Any:
        if not _is_known(node):
            return node
        first, second = next(moments)
        node = node._replace(**{_name(node): second})
        return node if first is None else node._replace(mu=first)

    return jax.tree.map(replaced, state, is_leaf=_is_known)
