"""Loading a dataset directory: what comes out, and what is said of bad input."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mgrad_jax.data import Interactions, diagnose, load_interactions
from mgrad_jax.errors import UserError

ROWS = [(u, (u + k) % 6, 0) for u in range(5) for k in range(3)]
ROWS += [(u, (u + 3) % 6, 1) for u in range(5)] + [(u, (u + 4) % 6, 2) for u in range(5)]


def make(folder: Path, rows: list[tuple[int, int, int]] = ROWS, header: str = "userID\titemID\tx_label") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "set.inter").write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n")
    return folder


def test_splits_sizes_and_features(tmp_path: Path) -> None:
    folder = make(tmp_path)
    np.save(folder / "image_feat.npy", np.ones((6, 3), np.float16))
    data = load_interactions(folder)
    assert (data.name, data.n_users, data.n_items) == ("set", 5, 6)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [15, 5, 5]
    np.testing.assert_array_equal(data.train, [row[:2] for row in ROWS if row[2] == 0])
    assert data.features["image"].dtype == np.float32
    assert list(data.features) == ["image"]
    assert data.statistics()["interactions"] == 25


def test_columns_in_any_order_and_others_ignored(tmp_path: Path) -> None:
    rows = [(0.5, label, item, user) for user, item, label in ROWS]
    swapped = load_interactions(make(tmp_path / "a", rows, "rating\tx_label\titemID\tuserID"))
    plain = load_interactions(make(tmp_path / "b"))
    np.testing.assert_array_equal(swapped.train, plain.train)


def test_cold_users_leave_and_cold_items_stay(tmp_path: Path) -> None:
    data = load_interactions(make(tmp_path, [*ROWS, (5, 0, 1), (5, 1, 2), (0, 6, 2)]))
    assert (data.n_users, data.n_items) == (6, 7)
    assert 5 not in data.valid[:, 0]
    assert 5 not in data.test[:, 0]
    assert [0, 6] in data.test.tolist()


def test_interactions_cannot_be_changed(tmp_path: Path) -> None:
    data = load_interactions(make(tmp_path))
    with pytest.raises(ValueError, match="read-only"):
        data.train[0, 0] = 1
    with pytest.raises(TypeError):
        data.features["image"] = np.ones((6, 2))  # type: ignore[index]


def test_the_callers_arrays_stay_writable() -> None:
    pairs, table = np.array([[0, 1]], np.int32), np.ones((2, 3), np.float32)
    Interactions("set", 1, 2, pairs, pairs[:0], pairs[:0], {"image": table})
    assert pairs.flags.writeable
    assert table.flags.writeable


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_interactions_can_be_copied_and_pickled(tmp_path: Path, duplicate: Callable) -> None:
    make(tmp_path)
    np.save(tmp_path / "image_feat.npy", np.eye(6, 3))
    data = load_interactions(tmp_path)
    again = duplicate(data)
    np.testing.assert_array_equal(again.test, data.test)
    np.testing.assert_array_equal(again.features["image"], data.features["image"])
    assert not again.train.flags.writeable


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.replace("\t0\n", "\t0.0\n"),
        lambda text: text.replace("userID\titemID\tx_label", "User_Id\tITEM\tlabel"),
        lambda text: text.replace("\n", '\t"\n'),
    ],
    ids=["byte order mark", "windows", "blank lines", "floats", "other names", "stray quotes in another column"],
)
def test_harmless_spellings_load(tmp_path: Path, rewrite: Callable[[str], str]) -> None:
    file = make(tmp_path) / "set.inter"
    file.write_bytes(rewrite(file.read_text()).encode())
    train = load_interactions(tmp_path).train
    np.testing.assert_array_equal(train, [row[:2] for row in ROWS if row[2] == 0])


def test_a_repeated_training_row_is_a_remark_only(tmp_path: Path) -> None:
    make(tmp_path, [*ROWS, ROWS[0]])
    assert len(load_interactions(tmp_path).train) == 16
    assert any("1 training rows repeat an earlier pair" in remark for remark in diagnose(tmp_path))


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    file = make(tmp_path) / "set.inter"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "", "", lines[1], "0\tx\t0", *lines[3:]]) + "\n")
    with pytest.raises(UserError, match="line 5: itemID is 'x'"):
        load_interactions(tmp_path)


def test_problems_names_what_is_wrong_in_every_file(tmp_path: Path) -> None:
    make(tmp_path, [*ROWS, (0, -6, 2)])
    np.save(tmp_path / "image_feat.npy", with_nan((10, 3)))
    (tmp_path / "text_feat.npy").write_text("hello")
    found = diagnose(tmp_path)
    assert [any(word in sentence for sentence in found) for word in ("itemID -6", "row 4", "damaged")] == [True] * 3
    assert len(found) == 3


def replace_row(position: int, row: tuple) -> Callable[[Path], object]:
    return lambda folder: make(folder, [*ROWS[:position], row, *ROWS[position + 1 :]])


def feature(array: np.ndarray, name: str = "image_feat.npy") -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, array)


def truncate(folder: Path) -> None:
    np.save(folder / "text_feat.npy", np.ones((6, 50), np.float32))
    whole = (folder / "text_feat.npy").read_bytes()
    (folder / "text_feat.npy").write_bytes(whole[:-100])


def break_header(folder: Path) -> None:
    np.save(folder / "image_feat.npy", np.ones((6, 3)))
    whole = (folder / "image_feat.npy").read_bytes()
    (folder / "image_feat.npy").write_bytes(whole.replace(b"(6, 3)", b"(6, 3["))


def with_nan(shape: tuple[int, int]) -> np.ndarray:
    table = np.ones(shape, np.float32)
    table[4, 1] = np.nan
    return table


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda folder: (folder / "set.inter").unlink(), r"holds no \.inter file"),
    "two files": (
        lambda folder: (folder / "b.inter").write_text("x"),
        r"several \.inter files \(b\.inter, set\.inter\)",
    ),
    "no user column": (
        lambda f: make(f, header="user?\titemID\tx_label"),
        r"set\.inter line 1: there is no userID column",
    ),
    "no label column": (
        lambda f: make(f, header="userID\titemID\tlab"),
        r"no x_label column among userID, itemID, lab",
    ),
    "negative id": (replace_row(2, (0, -1, 0)), r"line 4: itemID -1 is negative"),
    "huge id": (replace_row(2, (0, 10**12, 0)), r"line 4: itemID 1000000000000 is above .*mgrad-jax prepare"),
    "id past 64 bits": (replace_row(2, (0, 10**30, 0)), r"line 4: itemID 1\d+ is above .*mgrad-jax prepare"),
    "missing value": (replace_row(24, (4, 2, "")), r"line 26: x_label is '', not a whole number"),
    "missing field": (
        replace_row(24, (4, 2)),
        r"line 26 has 2 fields and the header 3 .*: complete or remove the line",
    ),
    "empty file": (lambda f: (f / "set.inter").write_bytes(b""), r"line 1: there is no userID column"),
    "text id": (replace_row(1, ("bob", 1, 0)), r"line 3: userID is 'bob', not a whole number"),
    "fraction": (replace_row(1, (0, 1.5, 0)), r"line 3: itemID is '1.5', not a whole number"),
    "raw ids": (replace_row(24, (7_000_000, 2, 0)), r"user ids go up to 7,000,000 and there are 25 rows; .*prepare"),
    "label 3": (replace_row(0, (0, 0, 3)), r"line 2: x_label 3 is none of 0"),
    "no rows": (lambda folder: make(folder, []), r"has a header and no rows"),
    "empty train": (
        lambda f: make(f, [r for r in ROWS if r[2]]),
        r"the train split is empty .* label at least one row",
    ),
    "empty valid": (lambda f: make(f, [r for r in ROWS if r[2] != 1]), r"the valid split is empty"),
    "empty test": (lambda f: make(f, [r for r in ROWS if r[2] != 2]), r"the test split is empty"),
    "pair in two splits": (
        lambda f: make(f, [*ROWS, (0, 0, 2)]),
        r"lines 2 and 27: user 0 and item 0 stand in two splits",
    ),
    "no negative left": (lambda f: make(f, [*ROWS, *((5, i, 0) for i in range(6))]), r"user 5 has every training item"),
    "NaN feature": (feature(with_nan((6, 3))), r"image_feat\.npy: row 4, column 1 is NaN"),
    "wrong rows": (feature(np.ones((5, 3))), r"image_feat\.npy has 5 rows and the dataset 6 items"),
    "one axis": (feature(np.ones(6)), r"image_feat\.npy has shape \(6,\)"),
    "objects": (feature(np.array([["a"] * 2] * 6, object)), r"image_feat\.npy is damaged or not a plain \.npy"),
    "truncated": (truncate, r"text_feat\.npy is damaged"),
    "no columns": (feature(np.ones((6, 0))), r"image_feat\.npy has no columns"),
    "broken header": (break_header, r"image_feat\.npy is damaged"),
    "no array": (lambda f: (f / "text_feat.npy").write_text("hello"), r"text_feat\.npy is damaged"),
    "binary": (lambda f: (f / "set.inter").write_bytes(b"\xff\xfe\x00userID"), r"set\.inter cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(make(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        load_interactions(tmp_path)
    assert "\n" not in str(caught.value)
    assert diagnose(tmp_path) == [str(caught.value)]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist; give a directory in MMRec format, or 'demo'"):
        load_interactions(tmp_path / "nowhere")


def test_problems_of_a_sound_directory_are_remarks(tmp_path: Path) -> None:
    make(tmp_path)
    np.save(tmp_path / "image_feat.npy", np.eye(6, 3))
    remarks = diagnose(tmp_path)
    assert any("no text_feat.npy" in remark for remark in remarks)
    assert any("3 rows are all zero (first: row 3)" in remark for remark in remarks)


# Interactions made in memory


def parts() -> dict:
    rows = np.array(ROWS, np.int64)
    splits = {name: rows[rows[:, 2] == label, :2] for label, name in enumerate(("train", "valid", "test"))}
    return {"name": "memory", "n_users": 5, "n_items": 6, **splits}


def test_whole_numbers_of_any_type_are_taken() -> None:
    data = Interactions(**parts(), features={"text": np.eye(6)})
    assert data.train.dtype == data.valid.dtype == np.int32
    assert dataclasses.replace(data, n_items=6).n_items == 6


def spoilt(split: str, column: int, value: object) -> Callable[[dict], dict]:
    def spoil(kept: dict) -> dict:
        rows = kept[split].copy()
        rows[1:3, column] = value
        return {split: rows}

    return spoil


WRONG: dict[str, tuple[Callable[[dict], dict], str]] = {
    "user above": (spoilt("train", 0, 5), r"train row 1 has user 5, outside of 0 to 4 \(such rows: 2\)"),
    "item below": (spoilt("test", 1, -1), r"test row 1 has item -1, outside of 0 to 5"),
    "floats": (lambda kept: {"valid": kept["valid"].astype(float)}, "valid has type float64; give whole numbers"),
    "three columns": (lambda kept: {"train": np.zeros((4, 3), int)}, r"train has shape \(4, 3\); give rows"),
    "a flat list": (lambda kept: {"train": [1, 2]}, r"train has shape \(2,\)"),
    "no training": (lambda kept: {"train": kept["train"][:0]}, "the train split is empty"),
    "test in train": (lambda kept: {"test": kept["train"][:4]}, r"user 0 and item 0 stand in two .*\(such pairs: 4\)"),
    "valid in test": (lambda kept: {"test": kept["valid"]}, r"stand in two splits \(such pairs: 5\)"),
    "no items": (lambda kept: {"n_items": 0}, "n_items is 0; give a whole number from 1"),
    "a fraction of users": (lambda kept: {"n_users": 5.0}, r"n_users is 5\.0; give a whole number"),
    "true users": (lambda kept: {"n_users": True}, "n_users is True"),
    "short features": (
        lambda kept: {"features": {"image": np.ones((5, 2))}},
        "image feature table has 5 rows and .* 6",
    ),
    "flat features": (lambda kept: {"features": {"image": np.ones(6)}}, r"image feature table has shape \(6,\)"),
    "texts": (lambda kept: {"features": {"text": np.full((6, 1), "a")}}, "text feature table has shape .* type <U1"),
    "NaN": (lambda kept: {"features": {"text": with_nan((6, 2))}}, r"text feature table: row 4, column 1 is NaN"),
    "infinity": (lambda kept: {"features": {"text": np.full((6, 2), np.inf)}}, r"row 0, column 0 .*\(such rows: 6\)"),
    "unknown features": (
        lambda kept: {"features": {"sound": np.ones((6, 2))}},
        "no 'sound' features; choose among image",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_together_is_refused_however_it_is_made(case: str) -> None:
    spoil, message = WRONG[case]
    changes = spoil(parts())
    with pytest.raises(UserError, match=message):
        Interactions(**{**parts(), **changes})
    with pytest.raises(UserError, match=message):
        dataclasses.replace(Interactions(**parts()), **changes)


def test_a_pickle_that_was_changed_is_refused() -> None:
    constructor, arguments = Interactions(**parts()).__reduce__()
    with pytest.raises(UserError, match="outside of 0 to 3"):
        constructor(*arguments[:1], 4, *arguments[2:])


def test_features_of_the_largest_floats_are_finite() -> None:
    table = np.full((6, 2), 3e38, np.float32)
    np.testing.assert_array_equal(Interactions(**parts(), features={"text": table}).features["text"], table)


# What is noteworthy


def test_unused_ids_are_accepted_with_a_remark(tmp_path: Path) -> None:
    data = load_interactions(make(tmp_path, [*ROWS, (9, 8, 0)]))
    assert (data.n_users, data.n_items) == (10, 9)
    assert any("4 of 10 user ids have no interaction at all (first: 5)" in remark for remark in diagnose(tmp_path))
    assert any("2 of 9 item ids have no interaction at all (first: 6)" in remark for remark in diagnose(tmp_path))


def test_faults_are_counted(tmp_path: Path) -> None:
    make(tmp_path, [*ROWS, *((u, u % 6, 2) for u in range(4))])
    with pytest.raises(UserError, match=r"lines 2 and 27: .*\(such pairs: 4\); .*--drop-duplicates"):
        load_interactions(tmp_path)
    make(tmp_path, [*ROWS, (0, -1, 0), (0, -2, 0)])
    with pytest.raises(UserError, match=r"line 27: itemID -1 is negative \(such rows: 2\); count from 0"):
        load_interactions(tmp_path)


def test_many_inter_files_make_no_long_sentence(tmp_path: Path) -> None:
    for n in range(300):
        (tmp_path / f"a-rather-long-name-of-a-dataset-{n}.inter").touch()
    with pytest.raises(UserError, match=r"several \.inter files .*300 in all") as caught:
        load_interactions(tmp_path)
    assert len(str(caught.value)) < 500
