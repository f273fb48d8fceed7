"""The learning rate's decay from epoch to epoch: the last link of an optimizer's chain.

Inside the optimizer every form meets the decayed rate: the second pass of `mgrad_jax.mirrored` starts from where the
decayed first one went. The link counts epochs, and is told of each by the training loop: how often an optimizer is
updated in an epoch depends on the form around it and on what it skips.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgrad_jax.errors import UserError
from mgrad_jax.iterates import evaluation_params
from mgrad_jax.mirror import Wrapping, update_with

# Epochs whose factor is looked up; 64 KiB.
_TABULATED = 2**14


class DecayState(NamedTuple):
    """State of the link.

    Attributes:
        epoch: the epoch under way, from 0. Shape (), int32.
        per_epoch: what the learning rate is multiplied by from one epoch to the next. Shape (), float32.
    """

    epoch: jax.Array
    per_epoch: jax.Array


@functools.lru_cache(maxsize=64)
def rate_factors(decay: tuple[float, float]) -> np.ndarray | None:
    """The factor on the learning rate in each of the first epochs.

    Args:
        decay: (g, s): epoch e, from 0, trains at g ** (e / s) times the learning rate.

    Returns:
        (16384,) float32, rounded from double precision; None where the rate stays as it is.

    >>> rate_factors((0.5, 2.0))[:3]
    array([1.        , 0.70710677, 0.5       ], dtype=float32)
    """
    if decay[0] == 1.0:
        return None
    with np.errstate(over="ignore"):
        factors = np.asarray([_power(decay, epoch) for epoch in range(_TABULATED)]).astype(np.float32)
    factors.flags.writeable = False
    return factors


def decayed(optimizer: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """An optimizer whose learning rate is multiplied by the epoch's factor.

    Args:
        optimizer: any Optax optimizer. Where it is a form around another one (`mgrad_jax.mirrored`, `replayed`, `sam`,
            `ssam_f`, `ssam_d`), the result is the same form around that one, decayed.
        factors: of the first epochs, from `rate_factors`, also traced; later ones go on by the same rule in float32.
            None: no decay.

    Returns:
        A transformation whose state holds a `DecayState`. `next_epoch` moves it on; `fit` does that by itself.
    """
    if factors is None:
        return optimizer
    if isinstance(optimizer, Wrapping):
        return optimizer.around(decayed(optimizer.inner, factors))
    return optax.chain(optimizer, _scale_by_epoch(factors))


def with_decay(
    optimizer: optax.GradientTransformation, decay: tuple[float, float], params: Any
) -> optax.GradientTransformation:
    """A ready-made optimizer with the decay that a training asks for; as it is where it brings that decay along.

    Raises:
        UserError: the optimizer brings another decay along, or has acted on its update before it returns it, so that it
            would do so at the undecayed rate.
    """
    factors = rate_factors(decay)
    if factors is None:
        return optimizer
    states = optax.tree_utils.tree_get_all_with_path(optimizer.init(params), DecayState.__name__)
    own = [np.float32(state.per_epoch) for _, state in states]
    if any(per_epoch != factors[1] for per_epoch in own):
        raise UserError(
            f"learning_rate_decay is {decay}, but the optimizer's own decay multiplies its learning rate by {own[0]:g} "
            "per epoch; leave one of them out."
        )
    if own:
        return optimizer
    if _acts_on_its_updates(optimizer, params):
        raise UserError(
            "learning_rate_decay cannot reach the learning rate inside this optimizer, which evaluates the loss or "
            f"keeps parameters by itself; put decayed(optimizer, rate_factors({decay})), of mgrad_jax.training.decay, "
            "inside it."
        )
    return decayed(optimizer, factors)


def next_epoch(opt_state: Any) -> Any:
    """The state with the next epoch's learning rate; one without decay as it is."""
    return jax.tree.map(
        lambda node: node._replace(epoch=optax.safe_increment(node.epoch)) if isinstance(node, DecayState) else node,
        opt_state,
        is_leaf=lambda node: isinstance(node, DecayState),
    )


def _scale_by_epoch(factors: Any) -> optax.GradientTransformation:
    def init_fn(params: Any) -> DecayState:
        del params
        return DecayState(jnp.zeros([], jnp.int32), jnp.asarray(factors[1], jnp.float32))

    def update_fn(updates: Any, state: DecayState, params: Any = None) -> tuple[Any, DecayState]:
        del params
        last = len(factors) - 1
        beyond = jnp.maximum(state.epoch - last, 0).astype(jnp.float32)
        factor = jnp.asarray(factors)[jnp.minimum(state.epoch, last)] * state.per_epoch**beyond
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def _power(decay: tuple[float, float], epoch: int) -> float:
    try:
        return float(decay[0] ** (epoch / decay[1]))
    except OverflowError:  # a rate that grows without bound ends the training where it gets there
        return float("inf")


def _acts_on_its_updates(optimizer: optax.GradientTransformation, params: Any) -> bool:
    """Whether an optimizer evaluates the loss or its gradient where it goes, or keeps parameters of its own."""
    if isinstance(optimizer, Wrapping):
        return _acts_on_its_updates(optimizer.inner, params)
    signs: list[Any] = []

    def grad_fn(params: Any, index: Any) -> Any:
        signs.append(index)
        return params

    def value_fn(params: Any) -> Any:
        signs.append(params)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    def update(params: Any) -> Any:
        state = optimizer.init(params)
        if evaluation_params(state, params) is not params:
            signs.append(state)
        offered = {"value": jnp.zeros(()), "grad": params, "value_fn": value_fn, "obj_fn": value_fn}
        offered |= {"grad_fn": grad_fn, "sample_grad_fn": grad_fn, "n_samples": 1}
        return update_with(optimizer.update, params, state, params, **offered)

    jax.eval_shape(update, params)
    return bool(signs)
