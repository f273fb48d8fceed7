"""Flatness in numbers against closed forms: quadratics, dense Hessians, rescaled tables, stopped gradients."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from scipy.optimize import brentq

from mgrad_jax import models
from mgrad_jax.analysis import flatness as module
from mgrad_jax.analysis.flatness import (
    CORRECTED,
    RAW,
    Flatness,
    curvature_product,
    flatness,
    lanczos,
    losses_on_plane,
    table_scales,
)
from mgrad_jax.analysis.landscape import direction, norm, objective, parameters, surface
from mgrad_jax.data import Interactions, demo_interactions

pytestmark = pytest.mark.usefixtures("x64")
KEY = 5


# --- L = theta' A theta / 2 - c' theta --------------------------------------------------------------------------------


def quadratic(params: Any, fixed: Any) -> jax.Array:
    flat = ravel_pytree(params)[0]
    matrix, linear = fixed
    return flat @ matrix @ flat / 2 - linear @ flat


@dataclasses.dataclass(frozen=True)
class Problem:
    """Parameters of 10 numbers, A and c, and everything in the units of D as dense arrays."""

    params: dict[str, jax.Array]
    matrix: np.ndarray
    linear: np.ndarray

    @classmethod
    def make(cls, diagonal: bool) -> Problem:
        rng = np.random.default_rng(0)
        params = {"bias": jnp.asarray(rng.normal(size=4)), "table": jnp.asarray(0.1 * rng.normal(size=(3, 2)))}
        matrix = rng.normal(size=(10, 10))
        matrix = np.diag(np.diag(matrix)) if diagonal else matrix + matrix.T
        return cls(params, matrix, rng.normal(size=10))

    @property
    def fixed(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.matrix), jnp.asarray(self.linear)

    def dense(self, scale: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """D, D A D and D g."""
        kind = "none" if scale == RAW else "table"
        d = table_scales(self.params, kind)  # type: ignore[arg-type]
        flat = np.asarray(ravel_pytree(jax.tree.map(lambda x, s: jnp.broadcast_to(s, x.shape), self.params, d))[0])
        theta = np.asarray(ravel_pytree(self.params)[0])
        gradient = self.matrix @ theta - self.linear
        return flat, flat[:, None] * self.matrix * flat, flat * gradient

    def flatness(self, **options: Any) -> Flatness:
        return flatness(quadratic, self.fixed, self.params, jax.random.key(KEY), **options)


@pytest.fixture(scope="module")
def general() -> Problem:
    with jax.enable_x64(True):
        return Problem.make(diagonal=False)


@pytest.fixture(scope="module")
def found(general: Problem) -> Flatness:
    with jax.enable_x64(True):
        return general.flatness(probes=40, ascent_steps=400)


@pytest.mark.parametrize("scale", [RAW, CORRECTED])
def test_smoothed_rise_and_trace_are_the_quadratic_forms_of_their_probes(
    general: Problem, found: Flatness, scale: str
) -> None:
    _, matrix, _ = general.dense(scale)
    rise_key, trace_key, _ = jax.random.split(jax.random.key(KEY), 3)

    def forms(kind: str, key: jax.Array) -> np.ndarray:
        drawn = [module._direction(kind, jax.random.fold_in(key, i), general.params) for i in range(40)]
        flat = np.stack([np.asarray(ravel_pytree(z)[0]) for z in drawn])
        return np.einsum("ni,ij,nj->n", flat, matrix, flat)

    normal, signs = forms("normal", rise_key), forms("signs", trace_key)
    for s in (0.1, 0.25, 0.5):
        np.testing.assert_allclose(found.numbers[f"smoothed rise {s:g}", scale].values, s**2 / 2 * normal, rtol=1e-7)
    trace = found.numbers["trace", scale]
    np.testing.assert_allclose(trace.values, signs, rtol=1e-5, atol=1e-8)
    assert trace.check == pytest.approx(trace.value, rel=1e-5)
    # Both are right on average.
    for forms_of in (normal, signs):
        assert abs(forms_of.mean() - np.trace(matrix)) < 4 * forms_of.std(ddof=1) / math.sqrt(40)


def test_signs_give_the_trace_of_a_diagonal_matrix_without_variance() -> None:
    problem = Problem.make(diagonal=True)
    numbers = problem.flatness(probes=3).numbers
    for scale in (RAW, CORRECTED):
        expected = np.trace(problem.dense(scale)[1])
        np.testing.assert_allclose(numbers["trace", scale].values, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [RAW, CORRECTED])
def test_eigenvalues_worst_rise_and_slope_are_those_of_the_quadratic(
    general: Problem, found: Flatness, scale: str
) -> None:
    d, matrix, gradient = general.dense(scale)
    eigenvalues = np.linalg.eigvalsh(matrix)
    for name, expected in (("largest eigenvalue", eigenvalues[-1]), ("smallest eigenvalue", eigenvalues[0])):
        number = found.numbers[name, scale]
        assert number.value == pytest.approx(expected, rel=1e-5)
        assert number.check is not None
        assert number.check < 1e-8
    slope = np.linalg.norm(gradient)
    assert found.numbers["slope", scale].value == pytest.approx(slope, rel=1e-10)
    theta = np.asarray(ravel_pytree(general.params)[0])
    radius = 0.05 if scale == RAW else 0.01 * np.linalg.norm(theta / d)
    worst = found.numbers["worst rise", scale]
    along = gradient / slope
    assert worst.check == pytest.approx(radius * slope + radius**2 / 2 * along @ matrix @ along, rel=1e-8)
    assert worst.value == pytest.approx(largest_in_ball(matrix, gradient, radius), rel=1e-5)
    assert found.loss == pytest.approx(float(quadratic(general.params, general.fixed)), rel=1e-12)


def largest_in_ball(matrix: np.ndarray, gradient: np.ndarray, radius: float) -> float:
    """max g'e + e'B e / 2 with |e| <= radius, on the sphere: (m I - B) e = g for the m that gives that norm."""

    def step(m: float) -> np.ndarray:
        return np.linalg.solve(m * np.eye(len(matrix)) - matrix, gradient)

    top = np.linalg.eigvalsh(matrix)[-1]
    m = brentq(lambda m: np.linalg.norm(step(m)) - radius, top + 1e-9, top + 1e6, xtol=1e-12)
    e = step(m)
    return float(gradient @ e + e @ matrix @ e / 2)


@pytest.mark.parametrize("kind", ["filter", "table", "raw"])
def test_the_surface_is_the_quadratic_over_its_plane(general: Problem, kind: Any) -> None:
    key = jax.random.key(1)
    made = surface(quadratic, general.fixed, general.params, key, kind=kind, points=5, reach=2.0)
    first, second = (np.asarray(ravel_pytree(direction(kind, k, general.params))[0]) for k in jax.random.split(key))
    theta = np.asarray(ravel_pytree(general.params)[0])
    assert made.a.tolist() == made.b.tolist() == [-2, -1, 0, 1, 2]
    for i, a in enumerate(made.a):
        for j, b in enumerate(made.b):
            at = theta + a * first + b * second
            assert made.losses[i, j] == pytest.approx(at @ general.matrix @ at / 2 - general.linear @ at, rel=1e-5)
    assert made.losses[2, 2] == made.centre
    even = surface(quadratic, general.fixed, general.params, key, kind=kind, points=2)
    assert even.a.tolist() == [-1, 1]
    assert even.centre == made.centre


def test_directions_have_the_size_of_what_they_are_made_for() -> None:
    rng = np.random.default_rng(1)
    params = {
        "table": jnp.asarray(rng.normal(size=(5, 3)) * np.arange(5)[:, None]),
        "linear": {"kernel": jnp.asarray(rng.normal(size=(4, 2))), "bias": jnp.asarray(rng.normal(size=2))},
    }
    made = direction("filter", jax.random.key(0), params)
    rows = np.linalg.norm(params["table"], axis=1)
    np.testing.assert_allclose(np.linalg.norm(made["table"], axis=1), rows)
    np.testing.assert_allclose(
        np.linalg.norm(made["linear"]["kernel"], axis=0), np.linalg.norm(params["linear"]["kernel"], axis=0)
    )
    assert not made["linear"]["bias"].any()
    raw, table = (direction(kind, jax.random.key(0), params) for kind in ("raw", "table"))  # type: ignore[arg-type]
    size = math.sqrt(float(jnp.mean(params["table"] ** 2)))
    np.testing.assert_allclose(table["table"], size * raw["table"])
    # Other parameters, the same numbers.
    other = direction("raw", jax.random.key(0), jax.tree.map(lambda x: 2 * x, params))
    np.testing.assert_array_equal(other["table"], raw["table"])


def test_points_side_by_side_are_those_one_after_the_other(general: Problem) -> None:
    z = module._direction("normal", jax.random.key(0), general.params)
    points = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)))
    alone = losses_on_plane(quadratic, general.fixed, general.params, z, z, points)
    together = losses_on_plane(quadratic, general.fixed, general.params, z, z, points, batch_size=3)
    np.testing.assert_allclose(alone, together, rtol=1e-12)


def test_lanczos_stops_at_an_invariant_space_and_tells_how_far_it_is_off() -> None:
    matrix = np.diag([3.0, 1.0, -2.0, *np.linspace(-0.5, 0.5, 37)])
    start = np.zeros(40)
    start[:2] = 1  # only two eigenvectors are in it
    (largest, r), (smallest, _) = lanczos(lambda v: matrix @ v, start, 20)
    assert (largest, smallest) == (pytest.approx(3), pytest.approx(1))
    assert r < 1e-12
    assert lanczos(lambda v: 0 * v, np.ones(40), 20) == ((0.0, 0.0), (0.0, 0.0))
    (few, residual), _ = lanczos(lambda v: matrix @ v, np.random.default_rng(0).normal(size=40), 3)
    assert np.abs(np.diag(matrix) - few).min() <= residual  # some eigenvalue is as near as that
    assert residual > 1e-3


def test_rows_and_arrays_of_zeros_do_not_move() -> None:
    params = {"table": jnp.asarray([[3.0, 4.0], [0.0, 0.0]]), "bias": jnp.zeros(2)}
    rows = table_scales(params, "row")
    np.testing.assert_allclose(rows["table"], [[math.sqrt(12.5)], [0]])
    assert float(module._relative_norm(params, rows)) == pytest.approx(math.sqrt(2))
    moved = module._scaled(rows, jax.tree.map(jnp.ones_like, params))
    np.testing.assert_allclose(moved["table"], [[math.sqrt(12.5)] * 2, [0, 0]])
    assert not moved["bias"].any()
    assert not direction("filter", jax.random.key(0), params)["table"][1].any()


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Interactions:
    small = demo_interactions(n_users=16, n_items=12, n_groups=4, per_user=5)
    features = {name: table[:, :2] for name, table in small.features.items()}
    return dataclasses.replace(small, features=features)


@pytest.mark.parametrize("name", ["vbpr", "lightgcn", pytest.param("freedom", marks=pytest.mark.slow)])
def test_products_are_those_of_the_dense_hessian(data: Interactions, name: str) -> None:
    """With and without graphs; the Hessian by differences of gradients."""
    model = models.create(name, data, seed=1, dtype=jnp.float64, embedding_dim=1)
    loss, fixed = objective(model, data, 40, jax.random.key(0))
    params = parameters(model)
    flat, unravel = ravel_pytree(params)
    assert 20 < len(flat) < 100
    gradient = jax.jit(lambda v, fixed: ravel_pytree(jax.grad(loss)(unravel(v), fixed))[0])
    steps = 1e-5 * np.eye(len(flat))
    dense = np.stack([np.asarray(gradient(flat + e, fixed) - gradient(flat - e, fixed)) / 2e-5 for e in steps])
    ones = table_scales(params, "none")
    vector = jax.random.normal(jax.random.key(2), flat.shape, flat.dtype)
    product = ravel_pytree(curvature_product(loss, fixed, params, ones, unravel(vector)))[0]
    np.testing.assert_allclose(product, dense @ vector, rtol=1e-5, atol=1e-8)
    assert np.abs(dense).max() > 1e-4


@pytest.mark.slow
def test_scale_corrected_numbers_do_not_see_a_kernel_scaled_up_and_its_features_down(data: Interactions) -> None:
    model = models.create("vbpr", data, seed=1, dtype=jnp.float64, embedding_dim=3)
    scaled = nnx.clone(model)
    scaled.item_linear.kernel.set_value(model.item_linear.kernel[...] * 10)
    scaled.item_features.set_value(model.item_features[...] / 10)
    found = []
    for one in (model, scaled):
        loss, fixed = objective(one, data, 40, jax.random.key(0))
        found.append(flatness(loss, fixed, parameters(one), jax.random.key(1), probes=2))
    before, after = found
    assert after.loss == pytest.approx(before.loss, rel=1e-12)
    for (name, scale), number in before.numbers.items():
        same = after.numbers[name, scale].value == pytest.approx(number.value, rel=1e-5)
        assert same == (scale == CORRECTED), (name, scale)


def test_a_stopped_target_is_seen_by_values_and_not_by_products() -> None:
    """-cos(a, b) with b stopped: the values bend by (n - 1) cos / |a|² + (n - 1) cos / |b|², products see the first."""

    def loss(params: dict[str, jax.Array], fixed: tuple[()]) -> jax.Array:
        a, b = params["a"], jax.lax.stop_gradient(params["b"])
        return -a @ b / jnp.sqrt((a @ a) * (b @ b))

    params = {"a": jnp.asarray([1.0, 2.0, 0.5]), "b": jnp.asarray([2.0, 1.0, -1.0])}
    a, b = params.values()
    cosine = float(a @ b / jnp.sqrt((a @ a) * (b @ b)))
    seen, hidden = 2 * cosine / float(a @ a), 2 * cosine / float(b @ b)
    ones = table_scales(params, "none")
    flat, unravel = ravel_pytree(params)
    columns = [ravel_pytree(curvature_product(loss, (), params, ones, unravel(e)))[0] for e in jnp.eye(len(flat))]
    product = np.stack([np.asarray(column) for column in columns])
    np.testing.assert_allclose(product, product.T, atol=1e-12)  # symmetry does not reveal it
    assert np.trace(product) == pytest.approx(seen, rel=1e-10)
    # By values, whose cross terms average out over all signs.
    plane = partial(losses_on_plane, loss, (), params)
    sizes = {RAW: np.asarray([0.01]), CORRECTED: np.asarray([0.01])}
    rises, _ = module._rises(plane, params, ones, "signs", jax.random.key(0), 200, sizes)
    traces = 2 * rises[RAW][:, 0] / 0.01**2
    error = traces.std(ddof=1) / math.sqrt(200)
    assert traces.mean() == pytest.approx(seen + hidden, abs=4 * error)
    assert 4 * error < hidden


def test_narrow_tables_are_moved_in_the_models_own_type(data: Interactions) -> None:
    model = models.create("vbpr", data, embedding_dim=3)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    params = parameters(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("bfloat16")}
    assert norm(params) == pytest.approx(math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(params))), rel=1e-6)
