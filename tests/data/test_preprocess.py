"""Raw ratings in, a valid dataset out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mgrad_jax.data import load_interactions, prepare
from mgrad_jax.data.preprocess import _split
from mgrad_jax.errors import UserError


def ratings(n_users: int = 40, n_items: int = 25, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    pairs = [(f"u{u:03}", f"i{i:03}") for u in range(n_users) for i in rng.choice(n_items, 12, replace=False)]
    table = pd.DataFrame(pairs, columns=["reviewerID", "asin"])
    return table.assign(overall=rng.integers(1, 6, len(table)).astype(float))


def write(table: pd.DataFrame, file: Path) -> Path:
    if ".json" in file.suffixes:
        lines = "".join(json.dumps(row) + "\n" for row in table.to_dict("records"))
        file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
    else:
        table.to_csv(file, index=False, sep="," if file.suffix == ".csv" else "\t")
    return file


@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.json", "r.json.gz"])
def test_every_format_gives_the_same_dataset(tmp_path: Path, name: str) -> None:
    done = prepare(write(ratings(), tmp_path / name), tmp_path / "out")
    reference = prepare(write(ratings(), tmp_path / "ref.csv"), tmp_path / "ref")
    assert pd.read_csv(done.file, sep="\t").equals(pd.read_csv(reference.file, sep="\t"))


def test_the_result_loads_and_keeps_every_interaction(tmp_path: Path) -> None:
    raw = ratings()
    done = prepare(write(raw, tmp_path / "r.csv"), tmp_path / "out")
    data = load_interactions(tmp_path / "out")
    assert (data.n_users, data.n_items) == (done.users, done.items) == (40, 25)
    users, items = (pd.read_csv(tmp_path / "out" / f"{kind}_map.tsv", sep="\t")["raw"] for kind in ("user", "item"))
    pairs = np.concatenate([data.train, data.valid, data.test])
    assert set(zip(users[pairs[:, 0]], items[pairs[:, 1]], strict=True)) == set(
        zip(raw["reviewerID"], raw["asin"], strict=True)
    )


def test_ratings_without_a_header_and_a_minimum(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    raw = ratings()
    raw.to_csv(file, index=False, header=False)
    done = prepare(file, tmp_path / "out", min_rating=2.0, k_core=3)
    assert done.interactions == (raw["overall"] >= 2).sum()


def test_k_core_holds_for_users_and_items(tmp_path: Path) -> None:
    rare = pd.DataFrame({"reviewerID": ["u000", "x", "x"], "asin": ["rare", "i000", "i001"], "overall": 5.0})
    done = prepare(write(pd.concat([ratings(), rare]), tmp_path / "r.csv"), tmp_path / "out", k_core=6)
    table = pd.read_csv(done.file, sep="\t")
    assert table.groupby("userID").size().min() >= 6
    assert table.groupby("itemID").size().min() >= 6
    assert done.users == 40


def test_split_follows_the_published_rule() -> None:
    users = np.repeat([0, 1, 2], [5, 10, 31])
    labels = _split(users, np.random.default_rng(0))
    assert [np.bincount(labels[users == u]).tolist() for u in range(3)] == [[3, 1, 1], [8, 1, 1], [25, 3, 3]]


def test_a_seed_gives_one_dataset(tmp_path: Path) -> None:
    source = write(ratings(), tmp_path / "r.csv")
    one, same, other = (prepare(source, tmp_path / n, name="d", seed=s).file for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert one.read_text() == same.read_text() != other.read_text()


@pytest.mark.parametrize(
    ("content", "name", "options", "message"),
    [
        (None, "missing.csv", {}, "does not exist"),
        ("a,b\n1,2\n", "r.xlsx", {}, "ends in '.xlsx'"),
        ("user,item\nu1,i1\n", "r.csv", {"user": "buyer"}, "no column 'buyer'; it has user, item"),
        ("user,item\nu1,\n", "r.csv", {}, "data row 1 has an empty user or item"),
        ("user,item,rating\nu1,i1,good\n", "r.csv", {"min_rating": 3.0}, "'good', not a number"),
        ("user,item\nu1,i1\n", "r.csv", {}, "no user and item has 5 interactions"),
        ("user,item\nu1,i1\n", "r.csv", {"k_core": 2}, "at least 3"),
        ('{"user": "a", "item": "b"}\n{"user": \n', "r.json", {}, "line 2 is not JSON"),
        ("[1, 2]\n", "r.jsonl", {}, "line 1 is no JSON object"),
        ("", "r.csv", {}, "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, content: str | None, name: str, options: dict, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare(file, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def test_an_existing_dataset_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    source = write(ratings(), tmp_path / "r.csv")
    prepare(source, tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        prepare(source, tmp_path / "out")
    assert prepare(source, tmp_path / "out", overwrite=True).users == 40
