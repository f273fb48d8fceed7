"""Recommenders without training equal their definitions, and are ranked by the code that ranks models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from mgrad_jax.analysis.baselines import (
    BASELINES,
    NEIGHBOURS,
    SHRINKS,
    baselines,
    itemknn,
    make_baseline,
    nearest_items,
    popularity,
)
from mgrad_jax.cli import main
from mgrad_jax.data import Interactions, demo_interactions, load_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import make_eval_split, metrics_of_scores, per_user_metrics

DATA = demo_interactions(n_users=60, n_items=40, n_groups=4)


def history(data: Interactions) -> np.ndarray:
    dense = np.zeros((data.n_users, data.n_items))
    dense[data.train[:, 0], data.train[:, 1]] = 1
    return dense


def knn_scores(similarity: np.ndarray, data: Interactions, k: int) -> np.ndarray:
    """The definition: every training item of the user votes for its k nearest items."""
    similarity = similarity.copy()
    np.fill_diagonal(similarity, -1)
    for row in similarity:
        row[np.argsort(-row, kind="stable")[k:]] = 0
    return history(data) @ np.maximum(similarity, 0)


def test_popularity_counts_training_interactions() -> None:
    scores = popularity(DATA)(np.array([3, 0]))
    np.testing.assert_array_equal(scores, np.tile(history(DATA).sum(axis=0), (2, 1)))


@pytest.mark.parametrize("shrink", [0.0, 10.0])
def test_item_neighbours_by_interactions(shrink: float) -> None:
    dense = history(DATA)
    norms = np.sqrt(dense.sum(axis=0))
    expected = knn_scores(dense.T @ dense / (np.outer(norms, norms) + shrink + 1e-9), DATA, 5)
    found = itemknn(DATA, nearest_items(DATA, 8, shrink=shrink), 5)(np.arange(DATA.n_users))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_item_neighbours_by_features() -> None:
    unit = [table / np.linalg.norm(table, axis=1, keepdims=True) for table in DATA.features.values()]
    expected = knn_scores(sum(table @ table.T for table in unit) / 2, DATA, 5)
    found = itemknn(DATA, nearest_items(DATA, 5, DATA.features), 5)(np.arange(DATA.n_users))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_scores_are_ranked_as_vectors_are() -> None:
    scores = np.random.default_rng(0).integers(0, 4, (DATA.n_users, DATA.n_items)).astype(np.float32)  # many ties
    eval_split = make_eval_split(DATA, "test", (5, 20), block=7)
    users, found = metrics_of_scores(eval_split, lambda ids: scores[ids])
    expected_users, expected = per_user_metrics(eval_split, jnp.asarray(scores), jnp.eye(DATA.n_items))
    np.testing.assert_array_equal(users, expected_users)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_the_setting_is_the_best_on_validation_and_features_are_used_where_there_are_any() -> None:
    found = baselines(DATA, "recall@5")
    assert list(found) == ["popularity", "itemknn", "itemknn-features"]
    valid, test = (make_eval_split(DATA, split, (5, 20)) for split in ("valid", "test"))
    best = -1.0
    for shrink in SHRINKS:
        for k in NEIGHBOURS:
            scores = itemknn(DATA, nearest_items(DATA, k, shrink=shrink), k)
            value = metrics_of_scores(valid, scores)[1]["recall@5"].mean()
            if value > best:
                best, expected = value, metrics_of_scores(test, scores)[1]
                setting = f"{k} neighbours, shrink {shrink:g}, the best of 15 settings by validation recall@5"
    ours = metrics_of_scores(test, found["itemknn"].scores)[1]
    np.testing.assert_array_equal(ours["recall@20"], expected["recall@20"])
    assert found["itemknn"].setting == setting
    assert list(baselines(dataclasses.replace(DATA, features={}), "recall@5")) == ["popularity", "itemknn"]


def test_popularity_is_evaluated_user_by_user(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "users.csv"
    assert main(["evaluate", "popularity", "--data", "demo", "--per-user", str(file)]) == 0
    printed = capfd.readouterr().out
    data = load_interactions("demo")
    counts = np.bincount(data.train[:, 1], minlength=data.n_items)
    owned: dict[int, set[int]] = {}
    for user, item in data.train.tolist():
        owned.setdefault(user, set()).add(item)
    order = np.argsort(-counts, kind="stable")
    expected = {}
    for user in np.unique(data.test[:, 0]).tolist():
        first = [item for item in order.tolist() if item not in owned[user]][:20]
        positives = set(data.test[data.test[:, 0] == user, 1].tolist())
        expected[user] = len(positives & set(first)) / len(positives)
    table = pd.read_csv(file)
    assert table["user"].tolist() == list(expected)
    np.testing.assert_allclose(table["recall@20"], list(expected.values()), atol=1e-6)
    assert f"{np.mean(list(expected.values())):.4f}" in printed
    assert "no training" in printed


def test_what_needs_no_training_needs_data_and_is_listed_with_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "itemknn"]) == 2
    assert capfd.readouterr().err == ("itemknn needs no run and has no data of its own; name a dataset with --data.\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "popularity").mkdir()
    assert main(["evaluate", "popularity"]) == 2  # a directory of that name is a run
    assert "popularity holds no run" in capfd.readouterr().err
    assert main(["models"]) == 0
    printed = capfd.readouterr().out
    assert all(f" {name} " in printed for name in BASELINES)
    assert printed.count("no training") == 3
    without = dataclasses.replace(DATA, features={})
    with pytest.raises(UserError, match=r"itemknn-features compares features, and .* has none; choose itemknn"):
        make_baseline("itemknn-features", without, "recall@5")
    with pytest.raises(UserError, match="unknown recommender 'x'; choose one of popularity, itemknn"):
        make_baseline("x", DATA, "recall@5")
