"""Statistics of comparisons: spread over seeds, paired tests, bands over users and seeds, several tests at once.

Everything is paired: two trainings meet the same seeds and the same users. What cannot be tested says so and has no p.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

REPLICATES = 2000
LEAST, ENOUGH = 3, 5  # seeds: below the first there is no test, below the second it is flagged
_CHUNK = 100  # replicates drawn at a time


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over seeds; the latter is None for a single one."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class PairedTest:
    """A two-sided paired t-test of a - b.

    Attributes:
        n: pairs.
        difference: mean of a - b.
        t, p: None where there is no test.
        d_z: mean difference in its own standard deviations; None where they are too few or do not vary.
        note: what to know about p; "" where nothing.
    """

    n: int
    difference: float
    t: float | None = None
    p: float | None = None
    d_z: float | None = None
    note: str = ""


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Mean and standard deviation of some numbers.

    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, sd=1.0, n=3)
    """
    numbers = np.asarray(values, np.float64)
    sd = float(numbers.std(ddof=1)) if len(numbers) > 1 else None
    return Spread(float(numbers.mean()), sd, len(numbers))


def paired_test(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, unit: str = "seeds", enough: int = ENOUGH
) -> PairedTest:
    """Test whether a - b differs from 0 on average.

    Args:
        a, b: (n,) numbers, paired.
        unit: what a pair is, for the note.
        enough: with fewer pairs the note warns; with fewer than three there is no test.

    >>> paired_test([1.0, 2.0], [0.0, 0.0]).note
    'not tested: 2 seeds, at least 3 are needed'
    """
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n, mean = len(differences), float(differences.mean()) if len(differences) else math.nan
    if n < LEAST:
        word = unit if n != 1 else unit.removesuffix("s")
        return PairedTest(n, mean, note=f"not tested: {n} {word}, at least {LEAST} are needed")
    note = f"{n} {unit} only" if n < enough else ""
    if not differences.any():
        return PairedTest(n, 0.0, 0.0, 1.0, 0.0, note)
    sd = float(differences.std(ddof=1))
    if sd == 0:
        return PairedTest(n, mean, note="not tested: all differences are the same")
    t = mean / (sd / math.sqrt(n))
    return PairedTest(n, mean, t, float(2 * stats.t.sf(abs(t), n - 1)), mean / sd, note)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p adjusted for all the tests in the list (Holm 1979); None stays None and does not count.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def resampled_means(values: np.ndarray, *, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """Means over users, draws and seeds, each resampled with replacement in every replicate.

    The same sizes meet the same resamples whatever the values, so that means of two trainings are paired.

    Args:
        values: (..., seeds, draws, users).
        replicates: how many.
        seed: of the resamples.

    Returns:
        (..., replicates), in the type of the values.
    """
    *lead, n_seeds, n_draws, n_users = values.shape
    flat = values.reshape(-1, n_users)
    # A stream each: how many users there are must not change which seeds are drawn.
    seed_weights = _all_weights(np.random.default_rng([seed, 0, n_seeds]), n_seeds, replicates).astype(values.dtype)
    draw_weights = _all_weights(np.random.default_rng([seed, 1, n_draws]), n_draws, replicates).astype(values.dtype)
    rng = np.random.default_rng([seed, 2, n_users])
    means = np.empty((*lead, replicates), values.dtype)
    for start in range(0, replicates, _CHUNK):
        stop = min(start + _CHUNK, replicates)
        user_weights = _all_weights(rng, n_users, stop - start).astype(values.dtype)
        by_run = (flat @ user_weights.T).reshape(*lead, n_seeds, n_draws, stop - start)
        rows = slice(start, stop)
        means[..., rows] = np.einsum("...sdb,bs,bd->...b", by_run, seed_weights[rows], draw_weights[rows])
    return means


def band(samples: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentile band of resampled numbers (..., replicates), whose two ends are (...).

    A resample that is NaN, for it divided 0 by 0, is left out; where all are, so are the ends.
    """
    tail = 50 * (1 - level)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanpercentile(samples, [tail, 100 - tail], axis=-1)
    return low, high


def relative_difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> tuple[float, float, float] | None:
    """mean(a) / mean(b) - 1 with its 95% band over users and seeds; None where mean(b) is 0.

    Args:
        a, b: (seeds, users) metrics of two trainings, paired.
        seed: of the resamples.
    """
    base = float(b.mean(dtype=np.float64))
    if base == 0:
        return None
    # Of the differences, not of both means: equal runs then differ by exactly 0.
    stacked = np.stack([a.astype(np.float64) - b, b.astype(np.float64)])[:, :, None, :]
    difference, means = resampled_means(stacked, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = band(difference / means)
    return float((a.astype(np.float64) - b).mean()) / base, float(low), float(high)


def _all_weights(rng: np.random.Generator, size: int, replicates: int) -> np.ndarray:
    """How often each of `size` things is drawn in a resample of them, as shares; (replicates, size)."""
    counts = [np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(replicates)]
    return np.stack(counts) / size
