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
from mgrad_jax.preparation import Preparation


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


def test_what_is_asked_for_is_given_as_a_whole_or_by_name(tmp_path: Path) -> None:
    file = write(ratings(), tmp_path / "r.tsv")
    how = Preparation(seed=3, min_rating=2, separator="tab")
    whole = prepare(file, tmp_path / "whole", how)
    named = prepare(file, tmp_path / "named", Preparation(separator="\t"), seed=3, min_rating=2)
    assert pd.read_csv(whole.file, sep="\t").equals(pd.read_csv(named.file, sep="\t"))
    other = prepare(file, tmp_path / "other", how, seed=4)
    assert not pd.read_csv(whole.file, sep="\t").equals(pd.read_csv(other.file, sep="\t"))
    with pytest.raises(TypeError, match="min_ratng"):
        prepare(file, tmp_path / "none", min_ratng=2)


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


def test_a_header_with_its_own_names_is_no_data(tmp_path: Path) -> None:
    raw = ratings().rename(columns={"reviewerID": "buyer", "asin": "thing"})[["overall", "buyer", "thing"]]
    done = prepare(write(raw, tmp_path / "r.csv"), tmp_path / "out", user="buyer", item="thing")
    assert (done.users, done.items, done.interactions) == (40, 25, len(raw))


def test_header_false_takes_the_first_line_for_data(tmp_path: Path) -> None:
    raw = ratings()[["reviewerID", "asin"]]
    raw.to_csv(tmp_path / "r.csv", index=False, header=False)
    assert prepare(tmp_path / "r.csv", tmp_path / "out", header=False).interactions == len(raw)


def feature_files(folder: Path, names: list[str]) -> tuple[Path, Path]:
    np.save(folder / "raw.npy", np.array([[int(name[1:]), 7.0] for name in names]))
    (folder / "ids.txt").write_text("\n".join(names) + "\n")
    return folder / "raw.npy", folder / "ids.txt"


def test_feature_rows_follow_the_new_ids(tmp_path: Path) -> None:
    names = [f"i{i:03}" for i in np.random.default_rng(3).permutation(30)]  # five of them have no rating
    source = write(ratings(), tmp_path / "r.csv")
    prepare(source, tmp_path / "out", features={"image": feature_files(tmp_path, names)})
    table = load_interactions(tmp_path / "out").features["image"]
    raw = pd.read_csv(tmp_path / "out" / "item_map.tsv", sep="\t")["raw"]
    np.testing.assert_array_equal(table[:, 0], [int(name[1:]) for name in raw])
    with pytest.raises(UserError, match=r"image_feat\.npy follows other item ids"):
        prepare(source, tmp_path / "out", overwrite=True, k_core=6)


@pytest.mark.parametrize(
    ("names", "modality", "message"),
    [
        ([f"i{i:03}" for i in range(1, 25)], "image", r"item 'i000' has ratings but no row \(such items: 1\)"),
        ([f"i{i:03}" for i in [*range(25), 3]], "text", "line 26: item 'i003' stands there twice"),
        ([f"i{i:03}" for i in range(25)], "sound", "no 'sound' features; choose among image, text"),
    ],
)
def test_bad_features_are_one_sentence(tmp_path: Path, names: list[str], modality: str, message: str) -> None:
    source = write(ratings(), tmp_path / "r.csv")
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "out", features={modality: feature_files(tmp_path, names)})
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(ratings(), tmp_path / "r.csv")
    before = prepare(source, tmp_path / "out").file.read_text()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(source, tmp_path / "out", seed=1, overwrite=True)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["item_map.tsv", "out.inter", "user_map.tsv"]
    assert (tmp_path / "out" / "out.inter").read_text() == before


def damaged_gzip(folder: Path) -> Path:
    whole = gzip.compress(ratings().to_csv(index=False).encode())
    (folder / "r.csv.gz").write_bytes(whole[:60] + bytes(b ^ 255 for b in whole[60:90]) + whole[90:])
    return folder / "r.csv.gz"


def test_a_damaged_archive_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r\.csv\.gz cannot be read"):
        prepare(damaged_gzip(tmp_path), tmp_path / "out")


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
        ("", "r.json", {}, "has no rows"),
        ("user,item\n", "r.csv", {}, "a header and no rows"),
        ('{"user": "a", "item": "b"}\n{"user": "a"}\n', "r.json", {}, "data row 2 has an empty user or item"),
        ('{"user": "a", "item": "b"}\n{"user": "-inf", "item": "b"}\n', "r.json", {}, "data row 2 has an empty user"),
        ("when,buyer,thing\n3,u1,i1\n", "r.csv", {}, r"line 1 \(when, buyer, thing\) has neither a known column name"),
        ("user,item,stars\nu1,i1,3\n", "r.csv", {"rating": "points"}, "no column 'points'; it has user, item, stars"),
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
