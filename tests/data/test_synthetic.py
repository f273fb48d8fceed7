"""Made-up datasets: deterministic, whole, and with the structure they promise."""

from __future__ import annotations

import numpy as np
import pytest

from mgrad_jax.data import demo_interactions, load_interactions, synthetic_interactions
from mgrad_jax.data.synthetic import SIZES, Size


def test_the_demo_is_the_same_every_time() -> None:
    one, two = load_interactions("demo"), demo_interactions()
    np.testing.assert_array_equal(one.train, two.train)
    np.testing.assert_array_equal(one.features["image"], two.features["image"])
    assert not np.array_equal(one.train, demo_interactions(seed=1).train)


def test_the_demo_has_its_planted_groups() -> None:
    data = demo_interactions()
    own = (data.test[:, 0] % 8 == data.test[:, 1] % 8).mean()
    assert own > 0.8
    for table in data.features.values():
        centred = table / np.linalg.norm(table, axis=1, keepdims=True)
        similarity = centred @ centred.T
        same = np.equal.outer(np.arange(400) % 8, np.arange(400) % 8)
        assert similarity[same].mean() > similarity[~same].mean() + 0.3
    assert len(np.unique(data.train[:, 1])) == data.n_items
    assert len(np.unique(np.concatenate([data.train, data.valid, data.test]), axis=0)) == 8400


def test_a_demo_too_small_for_its_items_says_so() -> None:
    with pytest.raises(ValueError, match="65 items have no interaction and only 60 users"):
        demo_interactions(n_users=60)


def test_synthetic_interactions_have_the_size_asked_for() -> None:
    size = Size(2_000, 700, 16_000, 12, 6)
    data = synthetic_interactions(size, seed=3)
    pairs = np.concatenate([data.train, data.valid, data.test])
    assert len(pairs) == len(np.unique(pairs, axis=0)) == size.interactions
    assert np.bincount(data.train[:, 0], minlength=size.users).min() >= 3
    assert len(np.unique(data.train[:, 1])) == size.items
    assert data.features["image"].shape == (700, 12)
    degrees = np.sort(np.bincount(pairs[:, 1]))[::-1]
    assert degrees[:70].sum() > 3 * 0.1 * len(pairs)  # the popular tenth has far more than a tenth


def test_the_papers_sizes() -> None:
    assert (SIZES["electronics"].users, SIZES["electronics"].items) == (192_403, 63_001)
    assert SIZES["baby"].interactions == 160_792
