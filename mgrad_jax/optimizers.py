"""Optimizers by name; those with a namesake in PyTorch have its defaults and its rules.

Adam, SGD, RMSprop and Adagrad of the published runs differ from Optax's in defaults and in where epsilon stands:
RMSprop forgets with 0.99 and adds 1e-8 outside the square root, Adagrad starts at 0 and adds 1e-10 outside it. Weight
decay is coupled there: `weight_decay * parameter` joins the gradient before the moments see it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mgrad_jax.declaration import check_choice, check_names
from mgrad_jax.errors import UserError, shown


class AccumulatorState(NamedTuple):
    """Running second moments, shaped and typed like the parameters."""

    squares: optax.Updates


def adam(learning_rate: Any, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam with bias correction, `eps` outside the square root (Kingma and Ba 2015)."""
    return optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)


def sgd(learning_rate: Any, momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    """Gradient descent, without momentum unless asked for."""
    return optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov)


def rmsprop(learning_rate: Any, decay: float = 0.99, eps: float = 1e-8) -> optax.GradientTransformation:
    """RMSprop: v = decay v + (1 - decay) g^2 from 0, step g / (sqrt(v) + eps)."""
    return optax.chain(
        _scale_by_accumulator(lambda v, g: decay * v + (1 - decay) * g * g, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def adagrad(learning_rate: Any, initial: float = 0.0, eps: float = 1e-10) -> optax.GradientTransformation:
    """Adagrad: v = v + g^2 from `initial`, step g / (sqrt(v) + eps) (Duchi et al. 2011)."""
    return optax.chain(
        _scale_by_accumulator(lambda v, g: v + g * g, eps, initial),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_accumulator(
    accumulate: Callable[[jax.Array, jax.Array], jax.Array], eps: float, initial: float = 0.0
) -> optax.GradientTransformation:
    """Divide by the root of a running second moment, with `eps` outside the root as PyTorch has it."""

    def init_fn(params: optax.Params) -> AccumulatorState:
        return AccumulatorState(jax.tree.map(lambda p: jnp.full_like(p, initial), params))

    def update_fn(
        updates: optax.Updates, state: AccumulatorState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AccumulatorState]:
        del params
        squares = jax.tree.map(lambda v, g: accumulate(v, g).astype(v.dtype), state.squares, updates)
        updates = jax.tree.map(lambda g, v: (g / (jnp.sqrt(v) + eps)).astype(g.dtype), updates, squares)
        return updates, AccumulatorState(squares)

    return optax.GradientTransformation(init_fn, update_fn)


# Those of PyTorch's semantics take coupled weight decay; the others bring their own `weight_decay` argument, if any.
_COUPLED: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": adam,
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
}
_OPTAX: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adabelief": optax.adabelief,
    "adamax": optax.adamax,
    "adamw": optax.adamw,
    "lamb": optax.lamb,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
    "nadam": optax.nadam,
    "radam": optax.radam,
}


def register_optimizer(
    name: str, *, coupled: bool = False
) -> Callable[[Callable[..., optax.GradientTransformation]], Callable[..., optax.GradientTransformation]]:
    """Make a function an optimizer that `make_optimizer`, and so every configuration, knows by its name.

    Args:
        name: what it is called.
        coupled: whether weight decay joins the gradient before the function's optimizer sees it, as for `adam`;
            otherwise it is handed to the function's own `weight_decay`, if it has one.

    Returns:
        A decorator for a function of the learning rate and named arguments with defaults; it returns the function.

    Raises:
        ValueError: a name that is taken.

    >>> @register_optimizer("slow-sgd")
    ... def slow_sgd(learning_rate, divisor=10.0):
    ...     return optax.sgd(learning_rate / divisor)
    >>> updates, _ = make_optimizer("slow-sgd", 0.1, divisor=2.0).update(1.0, (optax.EmptyState(), optax.EmptyState()))
    >>> float(updates)
    -0.05
    """
    if name in optimizer_names():
        raise ValueError(f"There is an optimizer {name!r} already; choose another name.")

    def register(build: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
        (_COUPLED if coupled else _OPTAX)[name] = build
        return build

    return register


def clip(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)), PyTorch's rule for clipping by global norm.

    >>> clip(1.0).update(jnp.array([3.0, 4.0]), optax.EmptyState())[0].round(3)
    Array([0.6, 0.8], dtype=float32)
    """

    def update(updates: Any, params: Any) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)

    return optax.stateless(update)


def optimizer_names() -> list[str]:
    """The names `make_optimizer` knows, in alphabetical order."""
    return sorted({*_COUPLED, *_OPTAX})


def make_optimizer(
    name: str, learning_rate: Any, *, weight_decay: Any = 0.0, **arguments: Any
) -> optax.GradientTransformation:
    """An optimizer by name.

    Args:
        name: one of `optimizer_names()`.
        learning_rate: a number, a traced scalar (a grid under `jax.vmap`) or an Optax schedule.
        weight_decay: coupled (added to the gradient) for adam, sgd, rmsprop and adagrad, as in PyTorch; handed to the
            optimizer's own `weight_decay` otherwise.
        **arguments: the optimizer's other arguments, e.g. `momentum=0.9`.

    Raises:
        UserError: unknown name or argument, or weight decay where the optimizer has none.

    >>> make_optimizer("sgd", 0.1, momentum=0.9).init(0.0) is not None
    True
    """
    known = {**_OPTAX, **_COUPLED}
    check_choice("unknown optimizer", name, optimizer_names())
    accepted = [p for p in inspect.signature(known[name]).parameters if p != "learning_rate"]
    check_names(f"{name} has no argument", arguments, accepted)
    for argument in arguments:
        _check_value(name, argument, arguments[argument], inspect.signature(known[name]).parameters[argument].default)
    decays = isinstance(weight_decay, jax.Array) or weight_decay > 0
    if name in _COUPLED:
        optimizer = known[name](learning_rate, **arguments)
        return optax.chain(optax.add_decayed_weights(weight_decay), optimizer) if decays else optimizer
    if decays:
        if "weight_decay" not in accepted:
            raise UserError(f"{name} has no weight decay; leave it out or choose adamw.")
        arguments["weight_decay"] = weight_decay
    return known[name](learning_rate, **arguments)


def _check_value(name: str, argument: str, value: Any, default: Any) -> None:
    """Refuse what the optimizer would compute with, but nobody can mean."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"the argument {argument} of {name} is {value}; it must be finite.")
    if isinstance(default, (bool, int, float)) and isinstance(value, bool) != isinstance(default, bool):
        kind = "true or false" if isinstance(default, bool) else "a number"
        raise UserError(f"the argument {argument} of {name} is {shown(value)}; it must be {kind}.")
