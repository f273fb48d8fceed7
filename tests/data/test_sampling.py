"""Sampling on the device: exact negatives and uniform orders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.data import demo_interactions
from mgrad_jax.data.interactions import Interactions
from mgrad_jax.data.sampling import sample_negatives, shuffle, user_history


def small() -> Interactions:
    """Items 1, 3, 4, 6, 7 occur in training; user 1 has all but item 6."""
    train = np.array([[0, 3], [1, 1], [1, 3], [1, 4], [1, 7], [2, 6], [2, 1], [2, 6]], np.int32)
    return Interactions("small", 3, 8, train, train[:0], train[:0])


def test_negatives_are_uniform_over_what_the_user_does_not_have() -> None:
    data, n = small(), 20_000
    drawn = np.asarray(sample_negatives(jax.random.key(0), jnp.repeat(jnp.arange(3), n), user_history(data)))
    for user, allowed in enumerate(([1, 4, 6, 7], [6], [3, 4, 7])):
        items, counts = np.unique(drawn[user * n : (user + 1) * n], return_counts=True)
        assert items.tolist() == allowed
        expected = n / len(allowed)
        assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


def test_negatives_never_meet_the_history_and_always_occur_in_training() -> None:
    data = demo_interactions()
    users = data.train[:, 0]
    history = user_history(data)
    drawn = jax.jit(sample_negatives)(jax.random.key(1), jnp.asarray(users), history)
    have = {tuple(pair) for pair in data.train.tolist()}
    assert not any(pair in have for pair in zip(users.tolist(), np.asarray(drawn).tolist(), strict=True))
    assert np.isin(drawn, data.train[:, 1]).all()


def test_the_search_finds_every_free_item_for_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """All histories over six items, and all draws: the r-th draw is the r-th free item, ascending."""
    histories = [[i for i in range(6) if mask >> i & 1] for mask in range(63)]
    train = np.array([(u, i) for u, items in enumerate(histories) for i in items], np.int32)
    history = user_history(Interactions("all", 64, 6, train, train[:0], train[:0]))
    draws = [(u, r) for u, items in enumerate(histories) for r in range(6 - len(items))]
    users, positions = (jnp.asarray(column, jnp.int32) for column in zip(*draws, strict=True))
    monkeypatch.setattr(jax.random, "randint", lambda *args: positions)
    expected = [sorted(set(range(6)) - set(histories[u]))[r] for u, r in draws]
    np.testing.assert_array_equal(sample_negatives(jax.random.key(0), users, history), expected)


def test_negatives_under_vmap_equal_single_draws() -> None:
    history, users = user_history(small()), jnp.array([0, 1, 2, 2])
    keys = jax.random.split(jax.random.key(2), 5)
    together = jax.jit(jax.vmap(lambda key: sample_negatives(key, users, history)))(keys)
    single = jax.jit(sample_negatives)
    np.testing.assert_array_equal(together, [single(key, users, history) for key in keys])


def test_shuffle_is_a_uniform_permutation() -> None:
    drawn = jax.jit(jax.vmap(lambda key: shuffle(key, 3)))(jax.random.split(jax.random.key(0), 6000))
    orders = np.asarray(drawn)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(3), (6000, 1)))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000))


def test_a_long_shuffle_leaves_no_trace_of_the_order() -> None:
    """Long enough for two rounds of tags: each tenth holds ids from everywhere, half of the neighbours ascend."""
    n = 150_000
    order = np.asarray(shuffle(jax.random.key(1), n))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    tenth = n // 10
    counts = [np.bincount(part // tenth, minlength=10) for part in np.split(order, 10)]
    assert np.all(np.abs(np.asarray(counts) - tenth / 10) < 5 * np.sqrt(tenth / 10))
    assert abs(np.mean(np.diff(order) > 0) - 0.5) < 5 * np.sqrt(1 / 12 / n)
