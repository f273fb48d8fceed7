"""How flat a loss is around some parameters, in numbers that follow their scale ("raw") and in some that do not.

A loss is a function `loss(params, fixed)` of a pytree of parameters of one type; `fixed` is everything else that it
reads, so that it is an argument of the compiled programs. Scales D are a pytree of factors, one an array or one a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy.linalg import eigh_tridiagonal

Params: TypeAlias = Any
Loss: TypeAlias = Callable[[Params, Any], Float[Array, ""]]

RAW, CORRECTED = "raw", "scale-corrected"
# Of the smoothed rise; of the trace, raw and scale-corrected; of the worst rise, absolute and in shares of |theta / D|.
_SMOOTHING = (0.1, 0.25, 0.5)
_STEPS = {RAW: 0.01, CORRECTED: 0.03}
_RADII = {RAW: 0.05, CORRECTED: 0.01}


class Number(NamedTuple):
    """One flatness number.

    Attributes:
        values: (probes,) where it is a mean over random directions, else (1,).
        check: what says how far it can be trusted: of the trace that with half the step, of an eigenvalue its residual,
            of the worst rise that after a single step; None for the others.
    """

    values: np.ndarray
    check: float | None = None

    @property
    def value(self) -> float:
        """Its mean over the probes."""
        return float(self.values.mean())


@dataclass(frozen=True)
class Flatness:
    """The loss at some parameters and every flatness number there, by name and scale (`RAW` or `CORRECTED`)."""

    loss: float
    numbers: Mapping[tuple[str, str], Number]


def table_scales(params: Params, per: Literal["table", "row", "none"] = "table") -> Params:
    """D: the root mean square of every array, of every row of a table, or 1."""

    def scale(x: Array) -> Array:
        if per == "none":
            return jnp.ones((), x.dtype)
        axes = tuple(range(1, x.ndim)) if per == "row" and x.ndim > 1 else None
        return jnp.sqrt(jnp.mean(x**2, axis=axes, keepdims=axes is not None))

    return jax.tree.map(scale, params)


def flatness(
    loss: Loss,
    fixed: Any,
    params: Params,
    key: Array,
    *,
    scale_per: Literal["table", "row"] = "table",
    probes: int = 16,
    lanczos_steps: int = 20,
    ascent_steps: int = 5,
    batch_size: int | None = None,
) -> Flatness:
    """Every flatness number at some parameters; with H the Hessian and g the gradient,

        smoothed rise s    mean over normal z of (L(theta + s D z) + L(theta - s D z)) / 2 - L(theta)
        trace              mean over signs z of 2 rise / h², by values: the trace of D H D
        eigenvalues        largest and smallest of D H D, by Lanczos
        worst rise         max of L(theta + D e) - L(theta), |e| <= rho: a step along D g, then projected ones
        slope              |D g|

    Args:
        loss, fixed, params: see the head of this file.
        key: of the random directions; the same key gives the same ones, whatever the parameters are.
        scale_per: what D is where it is not 1, see `table_scales`.
        probes, lanczos_steps, ascent_steps: how many.
        batch_size: points evaluated side by side; None: one after the other.
    """
    scales = {RAW: table_scales(params, "none"), CORRECTED: table_scales(params, scale_per)}
    plane = partial(losses_on_plane, loss, fixed, params, batch_size=batch_size)
    rise_key, trace_key, start_key = jax.random.split(key, 3)
    found: dict[tuple[str, str], Number] = {}

    sizes = np.asarray(_SMOOTHING)
    rises, value = _rises(plane, params, scales[CORRECTED], "normal", rise_key, probes, {RAW: sizes, CORRECTED: sizes})
    for number, s in enumerate(_SMOOTHING):
        found.update({(f"smoothed rise {s:g}", scale): Number(rises[scale][:, number]) for scale in scales})

    steps = {scale: np.asarray([h, h / 2]) for scale, h in _STEPS.items()}
    rises, _ = _rises(plane, params, scales[CORRECTED], "signs", trace_key, probes, steps)
    for scale, h in steps.items():
        traces = 2 * rises[scale] / h**2
        found["trace", scale] = Number(traces[:, 0], float(traces[:, 1].mean()))

    for scale, d in scales.items():
        start, unravel = ravel_pytree(_direction("normal", start_key, params))

        def product(v: np.ndarray, d: Params = d, unravel: Any = unravel) -> np.ndarray:
            return np.asarray(ravel_pytree(curvature_product(loss, fixed, params, d, unravel(jnp.asarray(v))))[0])

        for name, (eigenvalue, residual) in zip(
            ("largest eigenvalue", "smallest eigenvalue"),
            lanczos(product, np.asarray(start), lanczos_steps),
            strict=True,
        ):
            found[name, scale] = Number(np.asarray([eigenvalue]), residual)

    for scale, d in scales.items():
        radius = _RADII[scale] * (1.0 if scale == RAW else _relative_norm(params, d))
        worst, single, slope = worst_rise(loss, fixed, params, d, radius, ascent_steps)
        found["worst rise", scale] = Number(np.asarray([worst]), single)
        found["slope", scale] = Number(np.asarray([slope]))
    names = dict.fromkeys(name for name, _ in found)
    return Flatness(value, {(name, scale): found[name, scale] for name in names for scale in scales})


@partial(jax.jit, static_argnums=0, static_argnames="batch_size")
def losses_on_plane(
    loss: Loss,
    fixed: Any,
    params: Params,
    first: Params,
    second: Params,
    points: Float[Array, "n 2"],
    *,
    batch_size: int | None = None,
) -> Float[Array, " n"]:
    """L(theta + a d1 + b d2) for every (a, b): of all points, theta and the two directions are in memory once."""

    def at(point: Array) -> Array:
        moved = jax.tree.map(lambda x, p, q: (x + point[0] * p + point[1] * q).astype(x.dtype), params, first, second)
        return loss(moved, fixed)

    losses: Array = jax.lax.map(at, points, batch_size=batch_size)
    return losses


def _rises(
    plane: Callable[..., Float[Array, " n"]],
    params: Params,
    scales: Params,
    kind: str,
    key: Array,
    probes: int,
    sizes: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], float]:
    """Mean rise to both sides, (probes, sizes) for each scale, and L(theta).

    One plane a probe, spanned by z and D z: both scales see the same directions.
    """
    places = [np.zeros((1, 2))]
    for axis, scale in enumerate((RAW, CORRECTED)):
        for sign in (1, -1):
            places.append(np.zeros((len(sizes[scale]), 2)))
            places[-1][:, axis] = sign * sizes[scale]
    points = jnp.asarray(np.concatenate(places), jax.tree.leaves(params)[0].dtype)
    found: dict[str, list[np.ndarray]] = {RAW: [], CORRECTED: []}
    for number in range(probes):
        z = _direction(kind, jax.random.fold_in(key, number), params)
        centre, *moved = np.split(
            np.asarray(plane(z, _scaled(scales, z), points), np.float64), np.cumsum([len(p) for p in places])[:-1]
        )
        for axis, scale in enumerate((RAW, CORRECTED)):
            found[scale].append((moved[2 * axis] + moved[2 * axis + 1]) / 2 - centre)
    return {scale: np.stack(rows) for scale, rows in found.items()}, float(centre[0])


@partial(jax.jit, static_argnums=0)
def _direction(kind: str, key: Array, params: Params) -> Params:
    """Independent numbers for every parameter; an array's follow from the key and its name."""
    draw = jax.random.normal if kind == "normal" else jax.random.rademacher

    def one(path: Any, x: Array) -> Array:
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        return draw(jax.random.fold_in(key, name), x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


@jax.jit
def _scaled(scales: Params, vector: Params) -> Params:
    return jax.tree.map(lambda d, v: d * v, scales, vector)


@jax.jit
def _relative_norm(params: Params, scales: Params) -> Float[Array, ""]:
    """|theta / D|; where D is 0 so is theta, and it does not count."""
    parts = [
        jnp.sum((x / jnp.where(d > 0, d, 1)) ** 2) for x, d in zip(*map(jax.tree.leaves, (params, scales)), strict=True)
    ]
    return jnp.sqrt(sum(parts))


@partial(jax.jit, static_argnums=0)
def curvature_product(loss: Loss, fixed: Any, params: Params, scales: Params, vector: Params) -> Params:
    """D H D v; of a loss that stops gradients, with the derivative of its gradient in the place of H."""
    gradient = jax.grad(lambda p: loss(p, fixed))
    return _scaled(scales, jax.jvp(gradient, (params,), (_scaled(scales, vector),))[1])


def lanczos(
    product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steps: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Largest and smallest eigenvalue of a symmetric matrix, each with its residual |A v - lambda v|.

    Every vector is made orthogonal to all earlier ones, twice; these are kept in the host's memory.

    Args:
        product: A v.
        start: (n,), any vector that is not 0.
        steps: products made; fewer where the vectors made so far span an invariant space.
    """
    basis = np.zeros((min(steps, len(start)), len(start)), start.dtype)
    diagonal: list[float] = []
    beside: list[float] = []
    vector, norm = start, float(np.linalg.norm(start))
    for step in range(len(basis)):
        basis[step] = vector / norm
        vector = product(basis[step])
        diagonal.append(float(basis[step] @ vector))
        for _ in range(2):
            vector = vector - basis[: step + 1].T @ (basis[: step + 1] @ vector)
        norm = float(np.linalg.norm(vector))
        beside.append(norm)
        if norm <= 10 * np.finfo(start.dtype).eps * max(map(abs, diagonal + beside[:-1])):
            break
    values, vectors = eigh_tridiagonal(diagonal, beside[:-1])
    residuals = abs(beside[-1] * vectors[-1])
    return (float(values[-1]), float(residuals[-1])), (float(values[0]), float(residuals[0]))


def worst_rise(
    loss: Loss, fixed: Any, params: Params, scales: Params, radius: float | Float[Array, ""], steps: int
) -> tuple[float, float, float]:
    """The largest L(theta + D e) - L(theta) found with |e| <= radius, that after one step along D g, and |D g|.

    Args:
        loss, fixed, params, scales: see the head of this file.
        radius: rho; also the length of every step.
        steps: after the first; each is projected back into the ball.
    """
    radius = jnp.asarray(radius, jax.tree.leaves(params)[0].dtype)
    change, losses, slope = jax.tree.map(jnp.zeros_like, params), [], 0.0
    for step in range(steps + 2):
        value, norm, change = _ascend(loss, fixed, params, scales, change, radius)
        losses.append(float(value))
        slope = slope if step else float(norm)
    return max(losses[1:]) - losses[0], losses[1] - losses[0], slope


@partial(jax.jit, static_argnums=0)
def _ascend(
    loss: Loss, fixed: Any, params: Params, scales: Params, change: Params, radius: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Params]:
    """Loss and slope at theta + D e, and the next e."""

    def moved(change: Params) -> Array:
        return loss(jax.tree.map(lambda x, d, e: x + d * e, params, scales, change), fixed)

    value, gradient = jax.value_and_grad(moved)(change)
    norm = _norm(gradient)
    ahead = jax.tree.map(lambda e, g: e + radius * g / jnp.where(norm > 0, norm, 1), change, gradient)
    length = _norm(ahead)
    back = jnp.where(length > radius, radius / jnp.where(length > 0, length, 1), 1)
    return value, norm, jax.tree.map(lambda e: back * e, ahead)


def _norm(tree: Params) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
