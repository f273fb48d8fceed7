"""Masks have the rate they promise and belong to what they promise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.dropout import dropout, keep_mask


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("shape", [(100_000,), (401, 251)])
def test_entries_are_kept_at_the_rate_and_independently(rate: float, shape: tuple[int, ...]) -> None:
    keep = np.asarray(jax.jit(keep_mask, static_argnums=1)(jax.random.key(0), shape, rate)).ravel()
    n = len(keep)
    assert abs(keep.mean() - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / n) + 2**-17
    # Both halves of a word are of one draw; they must not go together.
    both = (keep[: n // 2] & keep[(n + 1) // 2 :]).mean()
    assert abs(both - (1 - rate) ** 2) <= 5 * np.sqrt(0.25 / (n // 2)) * (rate > 0)


def test_dropout_keeps_the_mean_and_scales() -> None:
    x = jnp.ones((1000, 64))
    y = np.asarray(dropout(jax.random.key(1), x, 0.25))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    assert abs(y.mean() - 1) < 5 * np.sqrt(1 / 3 / y.size)


def test_rows_of_one_id_share_a_mask() -> None:
    x, ids = jnp.ones((4, 64)), jnp.asarray([5, 3, 5, 8])
    y = np.asarray(dropout(jax.random.key(2), x, 0.5, ids))
    np.testing.assert_array_equal(y[0], y[2])
    assert (y[0] != y[1]).any()
    assert (y[1] != y[3]).any()
    reordered = np.asarray(dropout(jax.random.key(2), x, 0.5, ids[::-1]))
    np.testing.assert_array_equal(reordered, y[::-1])
