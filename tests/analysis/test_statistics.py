"""Statistics of comparisons against SciPy, worked examples and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mgrad_jax.analysis.statistics import (
    band,
    holm,
    paired_test,
    relative_difference,
    resampled_means,
    spread,
)

RNG = np.random.default_rng(0)


def test_spread_is_the_mean_and_the_standard_deviation_over_n_minus_1() -> None:
    values = RNG.normal(size=7)
    found = spread(values)
    assert found.mean == pytest.approx(values.mean(), abs=1e-15)
    assert found.sd == pytest.approx(stats.tstd(values), abs=1e-15)
    assert spread([0.5]).sd is None


@pytest.mark.parametrize("n", [3, 5, 10, 1000])
def test_the_paired_test_is_that_of_scipy(n: int) -> None:
    a, b = RNG.normal(0.2, 1, (2, n))
    found, expected = paired_test(a, b), stats.ttest_rel(a, b)
    assert found.t == pytest.approx(expected.statistic, rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-10)
    assert found.difference == pytest.approx((a - b).mean(), abs=1e-15)
    assert found.d_z == pytest.approx(found.t / math.sqrt(n), rel=1e-12)


def test_a_worked_example_of_the_paired_test() -> None:
    # Differences 1, 2, 3, 4, 5: mean 3, sd 1.5811, t = 3 / (1.5811 / sqrt 5) = 4.2426 with 4 degrees of freedom.
    found = paired_test([2, 4, 6, 8, 10], [1, 2, 3, 4, 5])
    assert (found.n, found.difference) == (5, 3.0)
    assert found.t == pytest.approx(4.2426, abs=1e-4)
    assert found.p == pytest.approx(0.01324, abs=1e-5)
    assert found.d_z == pytest.approx(1.8974, abs=1e-4)
    assert found.note == ""


def test_few_seeds_are_flagged_and_fewer_are_not_tested() -> None:
    assert paired_test([1.0, 2.0, 4.0, 3.0], [0.0] * 4).note == "4 seeds only"
    for n, words in ((2, "2 seeds"), (1, "1 seed"), (0, "0 seeds")):
        found = paired_test(range(n), [0.5] * n)
        assert found.note == f"not tested: {words}, at least 3 are needed"
        assert (found.t, found.p, found.d_z) == (None, None, None)


def test_equal_runs_differ_by_exactly_0_with_p_1() -> None:
    a = RNG.random((4, 50))
    found = paired_test(a.mean(axis=1), a.mean(axis=1))
    assert (found.difference, found.t, found.p, found.d_z) == (0.0, 0.0, 1.0, 0.0)
    assert relative_difference(a, a.copy()) == (0.0, 0.0, 0.0)


def test_differences_that_do_not_vary_cannot_be_tested() -> None:
    found = paired_test([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert found.p is None
    assert found.note == "not tested: all differences are the same"


def test_holm_on_a_worked_example() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_the_resampled_mean_spreads_as_the_mean_of_users() -> None:
    users = RNG.normal(3, 2, (1, 1, 400))
    samples = resampled_means(users)
    assert samples.shape == (2000,)
    assert samples.mean() == pytest.approx(users.mean(), abs=0.01)
    assert samples.std() == pytest.approx(users.std() / 20, rel=0.06)


def test_seeds_and_draws_are_resampled_as_well_as_users() -> None:
    by_seed, by_draw = RNG.normal(size=(6, 1, 1)), RNG.normal(size=(1, 8, 1))
    constant = np.zeros((1, 1, 30))
    for values, n in ((by_seed + constant, 6), (by_draw + constant, 8)):
        assert resampled_means(values).std() == pytest.approx(values.std() / math.sqrt(n), rel=0.06)


def test_every_training_meets_the_same_resamples() -> None:
    a = RNG.random((3, 2, 40))
    together = resampled_means(np.stack([a, 2 * a]))
    np.testing.assert_array_equal(together[1], 2 * together[0])
    np.testing.assert_array_equal(resampled_means(a), together[0])
    # Which seeds are drawn does not depend on how many users there are.
    by_seed = np.arange(3.0)[:, None, None]
    few, many = (resampled_means(np.broadcast_to(by_seed, (3, 1, n))) for n in (2, 50))
    np.testing.assert_allclose(few, many, atol=1e-12)


def test_the_band_of_a_relative_difference_holds_it() -> None:
    b = RNG.random((5, 500)) + 0.5
    a = 1.1 * b + RNG.normal(0, 0.05, b.shape)
    value, low, high = relative_difference(a, b)
    assert value == pytest.approx(a.mean() / b.mean() - 1, abs=1e-12)
    assert low < value < high
    assert 0.08 < low < 0.1 < high < 0.12
    assert relative_difference(a, np.zeros_like(b)) is None


def test_a_band_is_made_of_percentiles() -> None:
    low, high = band(np.arange(1001.0)[None])
    assert (low[0], high[0]) == pytest.approx((25.0, 975.0))
    low, high = band(np.array([[1.0, 2.0, np.nan], [np.nan] * 3]), level=1.0)
    assert (low[0], high[0]) == (1.0, 2.0)
    assert np.isnan([low[1], high[1]]).all()
