"""The largest of many numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.selection import top_k_mask


def expected(values: Any, count: int) -> np.ndarray:
    mask = np.zeros(len(values), bool)
    mask[np.argsort(-np.asarray(values), kind="stable")[:count]] = True
    return mask


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.usefixtures("x64")
def test_they_are_the_first_of_a_stable_sort(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    cases = {
        "both signs": rng.normal(size=200),
        "many equal": rng.integers(-3, 3, 200) / 2,
        "all equal": np.full(5, -1.5),
        "none": np.zeros(0),
        "both zeros": np.array([0.0, -0.0, 1.0, -0.0, 0.0, -1.0]),
        "extremes": np.array([-np.inf, np.inf, 1e-45, -1e-45, 3e38, -3e38, 0.0]),
    }
    select = jax.jit(top_k_mask)
    for name, values in cases.items():
        values = values.astype(dtype)
        for count in {0, min(2, len(values)), len(values) // 2, max(0, len(values) - 1), len(values)}:
            chosen = select(jnp.asarray(values), count)
            np.testing.assert_array_equal(chosen, expected(values, count), err_msg=f"{name}, {count}")


def test_under_vmap_every_row_has_its_own_count() -> None:
    values = jax.random.normal(jax.random.key(0), (3, 50))
    counts = np.array([0, 7, 50])
    together = jax.jit(jax.vmap(top_k_mask))(values, jnp.asarray(counts))
    np.testing.assert_array_equal(together, [expected(*row) for row in zip(values, counts, strict=True)])
