"""Lists of new items as a table."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from mgrad_jax import models
from mgrad_jax.data import Interactions, demo_interactions
from mgrad_jax.data.id_maps import in_raw_ids, raw_ids, write_id_map
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation import recommend

# The score of a user and an item is the item's column.
USERS = jnp.ones((3, 1))
ITEMS = jnp.array([[0.25], [2.0], [1.0], [0.5]])
TRAIN = np.array([[0, 1], [1, 0], [1, 2], [1, 3], [2, 0], [2, 1], [2, 2], [2, 3]])


def data_of(source: str = "memory") -> Interactions:
    return Interactions("tiny", 3, 4, TRAIN, TRAIN[:0], TRAIN[:0], source=source)


def rows(table: pd.DataFrame) -> list[list[Any]]:
    return [list(row) for row in table.itertuples(index=False)]


def test_best_first_without_training_items_and_shorter_where_few_are_left() -> None:
    table = recommend(USERS, ITEMS, data_of(), k=2)
    assert rows(table) == [[0, 1, 2, 1.0], [0, 2, 3, 0.5], [1, 1, 1, 2.0]]
    assert table.columns.tolist() == ["user", "rank", "item", "score"]
    assert table.index.tolist() == [0, 1, 2]
    assert [np.issubdtype(table[name].dtype, np.integer) for name in ("user", "rank", "item")] == [True] * 3


def test_users_come_in_the_order_asked_for() -> None:
    table = recommend(USERS, ITEMS, data_of(), users=[1, 0])
    assert rows(table) == [[1, 1, 1, 2.0], [0, 1, 2, 1.0], [0, 2, 3, 0.5], [0, 3, 0, 0.25]]
    for nobody in ([2], []):
        assert rows(recommend(USERS, ITEMS, data_of(), users=nobody)) == []


def test_a_model_recommends_what_it_scores_highest() -> None:
    data = demo_interactions(n_users=30, n_items=40)
    model = models.create("vbpr", data, embedding_dim=8)
    table = recommend(*model.embed(), data, users=[7], k=5)
    scores = np.array(model.scores(np.array([7])))[0]
    scores[data.train[data.train[:, 0] == 7, 1]] = -np.inf
    np.testing.assert_array_equal(table["item"], np.argsort(-scores, kind="stable")[:5])
    np.testing.assert_allclose(table["score"], np.sort(scores)[::-1][:5], rtol=1e-6)


def test_raw_names_take_the_place_of_ids_where_they_are_known(tmp_path) -> None:
    write_id_map(tmp_path / "item_map.tsv", ["a", "b", "c", "d"])
    data = data_of(str(tmp_path))
    table = in_raw_ids(recommend(USERS, ITEMS, data, k=1), raw_ids(data))
    assert rows(table) == [[0, 1, "c", 1.0], [1, 1, "b", 2.0]]
    write_id_map(tmp_path / "user_map.tsv", ["x", "y", "z"])
    assert in_raw_ids(table[["user"]], raw_ids(data))["user"].tolist() == ["x", "y"]


def test_a_directory_of_the_name_of_the_demo_data_is_not_read_and_of_any_other_name_is(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("demo", "memory"):
        (tmp_path / source).mkdir()
        write_id_map(tmp_path / source / "item_map.tsv", ["a", "b", "c", "d"])
    assert raw_ids(data_of("demo")) == {}
    assert raw_ids(data_of("memory"))["item"].tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"users": [3]}, "3 is no user of memory; give ids from 0 to 2."),
        ({"users": [0, -1]}, "-1 is no user of memory; give ids from 0 to 2."),
        ({"users": np.array([0.0])}, "0.0 is no user of memory; give ids from 0 to 2."),
        ({"users": np.array(["0"])}, "'0' is no user of memory; give ids from 0 to 2."),
        ({"k": 0}, "k is 0; it must be at least 1."),
        ({"user_vectors": jnp.ones((2, 1))}, "the vectors are of 2 users and 4 items, and memory has 3 and 4"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        recommend(**{"user_vectors": USERS, "item_vectors": ITEMS, "data": data_of(), **arguments})
    assert sentence in str(refused.value)
