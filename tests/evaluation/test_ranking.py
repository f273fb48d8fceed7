"""The on-device evaluator equals sorting in numpy: ties, padding, blocks that do not divide, k beyond the items."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.data import Interactions
from mgrad_jax.evaluation.metrics import ranking_metrics
from mgrad_jax.evaluation.ranking import full_sort_metrics, make_eval_split, per_user_metrics, top_items

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")
KS = (1, 5, 20)


def interactions(n_users: int, n_items: int, train: np.ndarray, test: np.ndarray) -> Interactions:
    train, test = np.asarray(train, np.int32), np.asarray(test, np.int32)
    return Interactions("made-up", n_users, n_items, train, test[:0], test)


def random_data(seed: int, n_users: int = 37, n_items: int = 23, density: float = 0.3) -> Interactions:
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, size=(n_users, n_items), p=[1 - density, 0.6 * density, 0.4 * density])
    return interactions(n_users, n_items, np.argwhere(kind == 1), np.argwhere(kind == 2))


def sorted_hits(data: Interactions, scores: np.ndarray, max_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, hits and counts by a stable sort of every row."""
    scores = scores.copy()
    scores[data.train[:, 0], data.train[:, 1]] = -np.inf
    positive = np.zeros(scores.shape, bool)
    positive[data.test[:, 0], data.test[:, 1]] = True
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = np.take_along_axis(positive, order, axis=1)[:, :max_k]
    hits = np.pad(hits, [(0, 0), (0, max_k - hits.shape[1])])
    users = np.flatnonzero(positive.any(axis=1))
    return users, hits[users], positive.sum(axis=1)[users]


@pytest.mark.parametrize("case", ["test", "valid", "dense"])
@pytest.mark.parametrize("block", [7, 512])
def test_equal_to_the_published_evaluator(case: str, block: int) -> None:
    scores = GOLDEN[f"{case}/masked_scores"].astype(np.float32)
    data = interactions(
        *scores.shape, np.argwhere(GOLDEN[f"{case}/train_mask"]), np.argwhere(GOLDEN[f"{case}/positives"])
    )
    assert len(np.unique(data.test[:, 0])) == len(scores)
    eval_split = make_eval_split(data, "test", (1, 5, 10, 20), block=block)
    # The scores themselves as user vectors: their dot products with unit vectors are exact.
    metrics = jax.jit(full_sort_metrics)(eval_split, jnp.asarray(scores), jnp.eye(scores.shape[1]))
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(GOLDEN[f"{case}/metric/{name}"]), abs=1e-6)
    items, _ = top_items(jnp.asarray(scores), jnp.eye(scores.shape[1]), data.train, np.arange(len(scores)), 20)
    np.testing.assert_array_equal(items, GOLDEN[f"{case}/topk_index"])


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(("block", "ks"), [(1, KS), (5, KS), (5, (3, 50)), (37, KS), (64, KS)])
def test_equal_to_sorting(levels: int, block: int, ks: tuple[int, ...]) -> None:
    data = random_data(seed=block)
    rng = np.random.default_rng(block)
    scores = rng.integers(0, levels, size=(data.n_users, data.n_items)).astype(np.float32)
    users, hits, counts = sorted_hits(data, scores, max(ks))
    expected = jax.jit(ranking_metrics, static_argnums=2)(jnp.asarray(hits), jnp.asarray(counts), ks)

    eval_split = make_eval_split(data, "test", ks, block=block)
    vectors = jnp.asarray(scores), jnp.eye(data.n_items)
    ids, values = per_user_metrics(eval_split, *vectors)
    np.testing.assert_array_equal(ids, users)
    means = jax.jit(full_sort_metrics)(eval_split, *vectors)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6)
        np.testing.assert_allclose(means[name], np.mean(value), rtol=1e-5)


def test_one_evaluated_user_and_a_cold_item() -> None:
    data = interactions(3, 4, np.array([[0, 0], [1, 1], [2, 2]]), np.array([[1, 3]]))
    metrics = full_sort_metrics(
        make_eval_split(data, "test", (1, 2)), jnp.ones((3, 1)), jnp.array([[3.0], [9.0], [1.0], [2.0]])
    )
    assert float(metrics["recall@1"]) == 0.0  # item 0 is before it, item 1 is masked
    assert float(metrics["recall@2"]) == 1.0


def test_validation_items_are_not_masked_in_test() -> None:
    train, valid, test = (np.array([pair], np.int32) for pair in ((0, 0), (0, 1), (0, 2)))
    data = Interactions("made-up", 1, 3, train, valid, test)
    vectors = jnp.ones((1, 1)), jnp.array([[3.0], [2.0], [1.0]])
    assert float(full_sort_metrics(make_eval_split(data, "test", (1, 2)), *vectors)["recall@1"]) == 0.0
    assert float(full_sort_metrics(make_eval_split(data, "valid", (1, 2)), *vectors)["recall@1"]) == 1.0


def test_scores_that_are_nan_rank_last() -> None:
    data = interactions(1, 60, np.array([[0, 0]]), np.array([[0, 5]]))
    metrics = full_sort_metrics(make_eval_split(data, "test", (50,)), jnp.full((1, 1), jnp.nan), jnp.ones((60, 1)))
    assert float(metrics["recall@50"]) == 0.0


def test_repeated_pairs_count_once() -> None:
    data = interactions(1, 3, np.array([[0, 0], [0, 0]]), np.array([[0, 1], [0, 1]]))
    metrics = full_sort_metrics(make_eval_split(data, "test", (1,)), jnp.ones((1, 1)), jnp.array([[3.0], [2.0], [1.0]]))
    assert float(metrics["recall@1"]) == 1.0


def test_ranker_is_an_argument_and_compiles_once() -> None:
    data = random_data(0)
    compiled = jax.jit(lambda *arguments: full_sort_metrics(*arguments))  # a cache of its own
    eval_split = make_eval_split(data, "test", KS, block=8)
    for seed in range(3):
        vectors = jax.random.normal(jax.random.key(seed), (data.n_users, 4))
        compiled(eval_split, vectors, jnp.ones((data.n_items, 4)))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("block", [1, 4, 512])
def test_top_items_equal_sorting(block: int) -> None:
    data = random_data(3)
    scores = np.random.default_rng(0).integers(0, 4, size=(data.n_users, data.n_items)).astype(np.float32)
    masked = scores.copy()
    masked[data.train[:, 0], data.train[:, 1]] = -np.inf
    users = np.array([5, 2, 36, 2])
    items, values = top_items(jnp.asarray(scores), jnp.eye(data.n_items), data.train, users, 99, block=block)
    order = np.argsort(-masked[users], axis=1, kind="stable")
    assert items.shape == (4, data.n_items)
    np.testing.assert_array_equal(items, order)
    np.testing.assert_array_equal(values, np.take_along_axis(masked[users], order, axis=1))
