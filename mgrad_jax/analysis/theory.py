r"""What Theorem 3.2 says of a loss, in numbers: its residual, the weight of its penalty, and the two half-steps.

Functions of a gradient, compiled or not, and parameters; nothing here compiles it again. With :math:`g` the
gradient of one batch and :math:`J` its Jacobian, the Hessian where :math:`g` is a gradient, a mirror batch of gradient
descent moves to :math:`\theta'' = \theta - \eta((\alpha_1 - \alpha_2) g + \eta \alpha_1 \alpha_2 J g) + O(\eta^3)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mgrad_jax.mirror import mirrored

Params: TypeAlias = Any
Gradient: TypeAlias = Callable[[Params], Params]

N_STEPS = 5
# The largest step's third-order part, relative to the second-order one: small enough for the fourth order to be small.
_THIRD_ORDER = 0.01
# A residual counts where it is this many times what rounding may leave of it.
_ABOVE_ROUNDING = 10
# Length of the differences that J g is made of, relative to where J g changes g by itself.
_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Residual:
    r"""What Theorem 3.2 leaves out of a mirror batch.

    .. math::
        r(\eta) = \lVert \theta'' - \theta + \eta ((\alpha_1 - \alpha_2) g + \eta \alpha_1 \alpha_2 J g) \rVert
        = \tfrac{1}{2} \eta^3 \alpha_1^2 \alpha_2 \lVert T[g, g] \rVert + O(\eta^4),

    with T the derivative of J.

    Attributes:
        steps: (5,) learning rates, each twice the one before.
        residuals: (5,) r at each.
        rounding: (5,) what rounding may contribute.
    """

    steps: np.ndarray
    residuals: np.ndarray
    rounding: np.ndarray

    @property
    def slope(self) -> float | None:
        """Of log r over log eta, 3 by the theorem; None where r is lost in rounding, as with a quadratic loss."""
        if (self.residuals <= _ABOVE_ROUNDING * self.rounding).any():
            return None
        return float(np.polyfit(np.log(self.steps), np.log(self.residuals), 1)[0])

    @property
    def coefficient(self) -> float:
        """r / eta^3 at the smallest step."""
        return float(self.residuals[0] / self.steps[0] ** 3)


def theorem_residual(
    gradient: Gradient, params: Params, alpha1: float = 1.0, alpha2: float = 0.2, largest: float | None = None
) -> Residual:
    """The residual of Theorem 3.2 at five doubling steps of gradient descent; meant for float64.

    Args:
        gradient: of one batch, every time with the same key.
        params: where it is measured.
        alpha1, alpha2: of the mirror batch.
        largest: the largest step; by default the one whose third-order part is a hundredth of the second-order one.
    """
    at = _Expansion.of(gradient, params)

    def residual(step: float) -> float:
        tx = mirrored(optax.sgd(step), alpha1, alpha2, interval=1)
        total, _ = tx.update(at.gradient, tx.init(params), params, grad_fn=lambda params, index: gradient(params))
        both = jax.tree.map(
            lambda t, g, v: t + step * ((alpha1 - alpha2) * g + step * alpha1 * alpha2 * v),
            total,
            at.gradient,
            at.product,
        )
        return float(norm(both))

    if largest is None:
        largest = 0.1 * at.length / at.product_length if at.product_length > 0 else 1.0
        for _ in range(4):
            second = largest**2 * alpha1 * alpha2 * at.product_length
            share = residual(largest) / second if second > 0 else 0.0
            # Down at once, up not at all: a residual that is small at a large step may be one by chance.
            largest *= min(1.0, _THIRD_ORDER / share) if share > 0 else 1.0
    steps = largest * 2.0 ** np.arange(1 - N_STEPS, 1)
    epsilon = float(jnp.finfo(jax.tree.leaves(at.gradient)[0].dtype).eps)
    rounding = steps * (alpha1 + alpha2) * at.length + steps**2 * alpha1 * alpha2 * at.product_length / _DIFFERENCE
    return Residual(steps, np.asarray([residual(step) for step in steps]), epsilon * rounding)


class _Expansion(NamedTuple):
    """g and J g at some parameters, and how long they are."""

    gradient: Params
    product: Params
    length: float
    product_length: float

    @classmethod
    def of(cls, gradient: Gradient, params: Params) -> _Expansion:
        """J g from differences of gradients, of fourth order: they see what g does where a loss stops gradients too."""
        g = gradient(params)
        length, size = float(norm(g)), float(norm(params))
        if length == 0:
            return cls(g, g, 0.0, 0.0)
        step = 1e-4 * max(size, 1.0) / length
        for _ in range(2):
            product = _directional(gradient, params, g, step)
            product_length = float(norm(product))
            if product_length > 0:
                step = _DIFFERENCE * length / product_length
        return cls(g, product, length, product_length)


def _directional(gradient: Gradient, params: Params, direction: Params, step: float) -> Params:
    near, far = (
        jax.tree.map(jnp.subtract, *(gradient(moved(params, direction, sign * k * step)) for sign in (1, -1)))
        for k in (1, 2)
    )
    return jax.tree.map(lambda a, b: (8 * a - b) / (12 * step), near, far)


def penalty_weight(
    loss: Any, gradient: Params, scale: Params, learning_rate: float, alpha1: float, alpha2: float
) -> float | None:
    r"""How much the penalty of Theorem 3.2 weighs beside the loss.

    .. math::
        \frac{\eta\, \alpha_1 \alpha_2\; g^\top P g}{2 (\alpha_1 - \alpha_2) L}

    Args:
        loss: L.
        gradient: g.
        scale: the diagonal of P: ones for gradient descent, 1 / (sqrt(v) + eps) for Adam.
        learning_rate: eta.
        alpha1, alpha2: of Mirror Gradient.

    Returns:
        The ratio; None where alpha1 = alpha2 or the loss is 0, and there is nothing to compare with.
    """
    below = 2 * (alpha1 - alpha2) * float(loss)
    if below == 0:
        return None
    quadratic = sum(jnp.sum(p * g**2) for g, p in zip(jax.tree.leaves(gradient), jax.tree.leaves(scale), strict=True))
    return float(learning_rate * alpha1 * alpha2 * quadratic / below)


class HalfSteps(NamedTuple):
    """The two half-steps d1 and d2 of a mirror batch.

    Attributes:
        projection: <d2, d1> / <d1, d1>; -alpha2 / alpha1 for gradient descent, to first order. Positive: the second
            goes along the first.
        cosine: of d2 with d1.
        downhill: cosine of d2 with -g, the gradient taken where d2 starts. Positive: still downhill.
        length: |d1 + d2| / |d|, with d the optimizer's step along g from the same state.
    """

    projection: float
    cosine: float
    downhill: float
    length: float


def half_steps(
    optimizer: optax.GradientTransformation,
    gradient: Gradient,
    params: Params,
    state: Any,
    alpha1: float = 1.0,
    alpha2: float = 0.2,
    *,
    ascent: bool = False,
) -> HalfSteps:
    """The half-steps of a mirror batch from some parameters and state of the optimizer.

    Args:
        optimizer: an Optax optimizer.
        gradient: of the batch.
        params, state: where it starts.
        alpha1, alpha2: of Mirror Gradient.
        ascent: the second half-step is the ascent of `mgrad_jax.mirrored(ascent=True)`.
    """
    tx = mirrored(optimizer, alpha1, alpha2, interval=1, ascent=ascent)
    g = gradient(params)
    first, _ = optimizer.update(jax.tree.map(lambda leaf: alpha1 * leaf, g), state, params)
    start = tx.init(params)
    start = start._replace(inner_state=(start.inner_state[0], state))
    total, _ = tx.update(g, start, params, grad_fn=lambda params, index: gradient(params))
    second = jax.tree.map(jnp.subtract, total, first)
    there = gradient(moved(params, first, 1.0))
    plain, _ = optimizer.update(g, state, params)
    along = inner(second, first)
    return HalfSteps(
        float(along / inner(first, first)),
        float(along / (norm(second) * norm(first))),
        float(-inner(second, there) / (norm(second) * norm(there))),
        float(norm(total) / norm(plain)),
    )


def second_moment(gradients: Iterable[Params], b2: float = 0.999) -> Params:
    """Adam's bias-corrected second moment after these gradients, of which one is held at a time."""
    total: Any = 0.0
    weight = 0.0
    for g in gradients:
        square = jax.tree.map(lambda leaf: (1 - b2) * leaf**2, g)
        total = square if weight == 0 else moved(square, total, b2)
        weight = b2 * weight + (1 - b2)
    return jax.tree.map(lambda leaf: leaf / weight, total)


def warmed_up(
    optimizer: optax.GradientTransformation,
    gradient: Callable[[Params, Any], Params],
    params: Params,
    batches: Iterable[Any],
    alpha1: float = 1.0,
    alpha2: float = 0.2,
    *,
    interval: int = 3,
    ascent: bool = False,
) -> tuple[Params, Any]:
    """Parameters and the optimizer's state after Mirror Gradient on some batches.

    Args:
        optimizer: an Optax optimizer.
        gradient: `gradient(params, batch)`.
        params: where it starts.
        batches: what `gradient` takes.
        alpha1, alpha2, interval, ascent: of `mgrad_jax.mirrored`.
    """
    tx = mirrored(optimizer, alpha1, alpha2, interval, ascent=ascent)
    state = tx.init(params)
    for batch in batches:

        def again(params: Params, index: int, batch: Any = batch) -> Params:
            return gradient(params, batch)

        updates, state = tx.update(gradient(params, batch), state, params, grad_fn=again)
        params = moved(params, updates, 1.0)
    return params, state.inner_state[1]


def moved(params: Params, direction: Params, step: Any) -> Params:
    """params + step direction."""
    return jax.tree.map(lambda p, d: (p + step * d).astype(p.dtype), params, direction)


def inner(a: Params, b: Params) -> Float[Array, ""]:
    """The inner product of two trees."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros([]))


def norm(tree: Params) -> Float[Array, ""]:
    """The Euclidean norm of a tree."""
    return jnp.sqrt(inner(tree, tree))
