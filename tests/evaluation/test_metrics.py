"""The metrics equal the published evaluator's, before its rounding."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.evaluation.metrics import METRICS, ranking_metrics

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")
CASES = ("test", "valid", "dense")


def means(hits: np.ndarray, counts: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    values = jax.jit(ranking_metrics, static_argnums=2)(jnp.asarray(hits), jnp.asarray(counts), ks)
    return {name: float(value.mean()) for name, value in values.items()}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_published_evaluator(case: str) -> None:
    hits, counts = GOLDEN[f"{case}/hits"], GOLDEN[f"{case}/positive_count"]
    ours = means(hits, counts, tuple(range(1, 21)))
    for name in METRICS:
        curve = [ours[f"{name}@{k}"] for k in range(1, 21)]
        np.testing.assert_allclose(curve, GOLDEN[f"{case}/curve/{name}"], rtol=0, atol=1e-12)
        for k in (1, 5, 10, 20):
            assert ours[f"{name}@{k}"] == pytest.approx(float(GOLDEN[f"{case}/metric/{name}@{k}"]), abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_published_evaluator_in_float32(case: str) -> None:
    ours = means(GOLDEN[f"{case}/hits"], GOLDEN[f"{case}/positive_count"], (1, 5, 10, 20))
    for name, value in ours.items():
        assert value == pytest.approx(float(GOLDEN[f"{case}/metric/{name}"]), abs=1e-6)


def test_user_without_positives_gets_zero() -> None:
    values = ranking_metrics(jnp.zeros((1, 5), bool), jnp.zeros(1, jnp.int32), (5,))
    assert all(float(value[0]) == 0.0 for value in values.values())


def test_perfect_list_gets_one() -> None:
    values = ranking_metrics(jnp.ones((1, 5), bool), jnp.array([5]), (5,))
    assert all(float(value[0]) == pytest.approx(1.0) for value in values.values())


@pytest.mark.parametrize("ks", [(), (0,), (6,)])
def test_cut_off_out_of_range(ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cut-offs"):
        ranking_metrics(jnp.ones((1, 5), bool), jnp.array([5]), ks)
