"""Ranks among sampled candidates are as AMR's authors define them; one sentence for every file that does not fit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.data import demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.candidates import Candidates, candidate_metrics, read_candidates, scores_of

DATA = demo_interactions(n_users=60, n_items=40, n_groups=4)


def table() -> np.ndarray:
    return np.stack([np.random.default_rng(u).permutation(DATA.n_items)[:12] for u in range(DATA.n_users)])


def test_ranks_count_candidates_that_score_at_least_as_high(tmp_path: Path) -> None:
    items = table()
    items[3, 7:] = -1
    np.save(tmp_path / "candidates.npy", items)
    candidates = read_candidates(tmp_path / "candidates.npy", DATA)
    scores = np.random.default_rng(0).integers(0, 6, (DATA.n_users, DATA.n_items)).astype(np.float32)  # many ties
    users, found = candidate_metrics(candidates, lambda ids: scores[ids])
    np.testing.assert_array_equal(users, np.arange(DATA.n_users))
    for u in users:
        rank = sum(scores[u, i] >= scores[u, items[u, 0]] for i in items[u, 1:] if i >= 0)
        for k in (5, 10, 20):
            assert found[f"candidates_hr@{k}"][u] == (rank < k)
            expected = math.log(2) / math.log(rank + 2) if rank < k else 0.0
            assert found[f"candidates_ndcg@{k}"][u] == pytest.approx(expected, abs=1e-6)


def test_products_of_vectors_are_the_scores() -> None:
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    found = scores_of(jnp.asarray(users), jnp.asarray(items))(np.array([4, 1]))
    np.testing.assert_allclose(found, users[[4, 1]] @ items.T, rtol=1e-5)


def test_a_score_that_is_no_number_ranks_last() -> None:
    candidates = Candidates(np.array([0]), np.array([[0, 1, 2]]), "")
    _, found = candidate_metrics(candidates, lambda users: np.array([[np.nan, 0.0, 1.0]]), (2, 3))
    assert (found["candidates_hr@2"][0], found["candidates_hr@3"][0]) == (0, 1)


def test_users_without_a_held_out_item_or_training_are_left_out(tmp_path: Path) -> None:
    items = table()
    items[5] = -1
    np.save(tmp_path / "candidates.npy", items)
    kept = DATA.train[DATA.train[:, 0] != 7]
    data = dataclasses.replace(DATA, train=kept)
    users = read_candidates(tmp_path / "candidates.npy", data).users
    assert set(range(60)) - set(users.tolist()) == {5, 7}


def test_bad_files(tmp_path: Path) -> None:
    file, items = tmp_path / "candidates.npy", table()
    with pytest.raises(UserError, match="does not exist; `mgrad-jax prepare --amr` writes"):
        read_candidates(file, DATA)
    wrong = {
        "has 59 rows and .* 60 users": items[:59],
        "no candidates beside": items[:, :1],
        "row 2, column 1 is 40, no item id": np.where((np.arange(60)[:, None] == 2) & (np.arange(12) == 1), 40, items),
        "row 2, column 1 is 0.5, no item id": np.where(
            (np.arange(60)[:, None] == 2) & (np.arange(12) == 1), 0.5, items
        ),
        "holds out no item": np.full_like(items, -1),
        "row 0 has a held-out item and no candidates": np.where(np.arange(12) > 0, -1, items),
    }
    for sentence, content in wrong.items():
        np.save(file, content)
        with pytest.raises(UserError, match=sentence):
            read_candidates(file, DATA)
