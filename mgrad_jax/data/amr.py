"""The data of AMR's authors (Tang et al. 2019) as a dataset in MMRec format, with the candidates they evaluate on.

| file | holds |
|---|---|
| `pos.txt` | a training pair a line: user and item, whole numbers from 0 |
| `neg.txt` | line u: the item held out of user u, then the items it is ranked among |
| `f_resnet.npy` | features, (items, dim), row = item; divided by their largest absolute value, as the authors do |

The layout has no validation. One training item of every user with at least three different ones is held out for it,
drawn by a seed: the test items choose nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from mgrad_jax.data.dataset_files import replace_files, writing
from mgrad_jax.data.features import read_features
from mgrad_jax.data.interactions import MAX_ID, Interactions, check_negatives, distinct_pairs
from mgrad_jax.data.preprocess import (
    Prepared,
    check_destination,
    checked_name,
    dataset_files,
    write_array,
    write_map,
)
from mgrad_jax.errors import UserError, shown

FILES = ("pos.txt", "neg.txt", "f_resnet.npy")
_LEAST = 3  # different training items of a user who gives one to validation


class _Split(NamedTuple):
    """Rows (user, item) of the three splits, and what was left out of training, by reason."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    left_out: dict[str, int]


def prepare_amr(
    source: str | Path,
    destination: str | Path,
    *,
    name: str | None = None,
    seed: int = 999,
    overwrite: bool = False,
) -> Prepared:
    """Write the dataset of a directory in the layout of AMR's authors, and `candidates.npy` beside it.

    Args:
        source: the directory with `pos.txt`, `neg.txt` and `f_resnet.npy`.
        destination: directory to write `<name>.inter`, `image_feat.npy`, `candidates.npy` and the maps of ids to. Ids
            stay as they are, unless the largest one of an item has no interaction: then those without stand first.
        name: of the dataset; the directory's name by default.
        seed: of the draw of validation items.
        overwrite: replace the dataset that is there.

    Raises:
        UserError: a missing or malformed file, features that do not fit, no user for validation, a destination in use.
    """
    source, destination = Path(source), Path(destination)
    inputs = [source / file for file in FILES]
    for file in inputs:
        if not file.is_file():
            raise UserError(f"{file} does not exist; --amr reads a directory with {', '.join(FILES)}.")
    file = destination / f"{checked_name(name, destination)}.inter"
    check_destination(file, ["image"], inputs, overwrite)
    pairs, lists = _read_pairs(inputs[0]), _read_lists(inputs[1])
    split = _split(inputs[0], pairs, lists, np.random.default_rng(seed))
    n_users = max(int(pairs[:, 0].max()) + 1, len(lists))
    n_items = max(int(pairs[:, 1].max()), int(lists.max())) + 1
    features = _features(inputs[2], n_items)
    raw = _order(n_items, np.concatenate([split.train[:, 1], split.valid[:, 1], split.test[:, 1]]))
    new = np.argsort(raw)
    candidates = np.full((n_users, lists.shape[1]), -1, np.int32)
    candidates[: len(lists)] = np.where(lists >= 0, new[lists], -1)
    rows = [np.stack([part[:, 0], new[part[:, 1]]], axis=1) for part in split[:3]]
    train, valid, test = rows
    data = Interactions(file.stem, n_users, n_items, train, valid, test, {"image": features[raw]}, str(source))
    check_negatives(str(inputs[0]), distinct_pairs(data.train, n_items))
    table = pd.DataFrame(np.concatenate(rows), columns=["userID", "itemID"])
    table["x_label"] = np.repeat([0, 1, 2], [len(part) for part in rows])
    table = table.sort_values(["userID", "x_label", "itemID"], kind="stable")
    contents: dict[str, Callable[[Path], object]] = {
        "image_feat.npy": partial(write_array, features[raw]),
        "candidates.npy": partial(write_array, candidates),
        "user_map.tsv": partial(write_map, [str(number) for number in range(n_users)]),
        "item_map.tsv": partial(write_map, [str(number) for number in raw]),
        file.name: partial(table.to_csv, sep="\t", index=False),
    }
    with writing(destination):
        check_destination(file, ["image"], inputs, overwrite)
        replace_files(destination, contents, [path.name for path in dataset_files(destination)])
    return Prepared(
        users=n_users,
        items=n_items,
        interactions=len(table),
        file=file,
        rows_read=len(pairs) + len(split.test),
        left_out=split.left_out,
        split="test kept, validation drawn",
    )


def _numbers(file: Path) -> list[list[int]]:
    """The whole numbers from 0 of every line; blank lines at the end do not count."""
    try:
        lines = file.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        bad = next((w for w in words if not (w.isascii() and w.isdigit() and len(w) < 10 and int(w) <= MAX_ID)), None)
        if bad is not None or not words:
            found = "is empty" if not words else f"holds {shown(bad)}, no whole number from 0 to {MAX_ID:,}"
            raise UserError(f"{file} line {number} {found}; write ids with blanks between them.")
        rows.append([int(word) for word in words])
    if not rows:
        raise UserError(f"{file} is empty; give it interactions.")
    return rows


def _read_pairs(file: Path) -> np.ndarray:
    rows = _numbers(file)
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise UserError(f"{file} line {number} has {len(row)} numbers; a line is a user and an item.")
    return np.array(rows, np.int64)


def _read_lists(file: Path) -> np.ndarray:
    """The held-out item of every user and its candidates, (users, width), -1 where a line is shorter than others."""
    rows = _numbers(file)
    table = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for number, row in enumerate(rows, start=1):
        if len(row) < 2 or row[0] in row[1:]:
            wrong = "has no candidates" if len(row) < 2 else f"has the held-out item {row[0]} among its candidates"
            raise UserError(f"{file} line {number} {wrong}; write the held-out item, then the others.")
        table[number - 1, : len(row)] = row
    return table


def _split(file: Path, pairs: np.ndarray, lists: np.ndarray, rng: np.random.Generator) -> _Split:
    """Training pairs, one of each active user for validation, and the held-out items."""
    test = np.stack([np.arange(len(lists)), lists[:, 0]], axis=1)
    held_out = np.full(max(int(pairs[:, 0].max()) + 1, len(lists)), -1)
    held_out[: len(lists)] = lists[:, 0]
    leaks = pairs[:, 1] == held_out[pairs[:, 0]]
    train = pairs[~leaks]
    left_out = {"of held-out items in training": int(leaks.sum())} if leaks.any() else {}
    own = pd.DataFrame(train, columns=["user", "item"]).drop_duplicates()
    active = own[own.groupby("user")["item"].transform("size") >= _LEAST]
    if active.empty:
        raise UserError(
            f"{file}: no user has {_LEAST} different training items, so that none can be held out for validation."
        )
    # Of every user the first in a random order.
    drawn = active.iloc[rng.permutation(len(active))].drop_duplicates("user").sort_values("user").to_numpy()
    width = int(train[:, 1].max()) + 1
    is_drawn = np.isin(train[:, 0] * width + train[:, 1], drawn[:, 0] * width + drawn[:, 1])
    if repeats := int(is_drawn.sum()) - len(drawn):
        left_out["that repeat a validation pair"] = repeats
    return _Split(train[~is_drawn], drawn, test, left_out)


def _features(file: Path, n_items: int) -> np.ndarray:
    table = read_features(file, None)
    assert table is not None  # it is there
    if len(table) < n_items:
        raise UserError(f"{file} has {len(table)} rows and there are {n_items} items; give one row per item.")
    # By the largest of all rows, also of those that no line of the other files names.
    return table[:n_items] / max(float(np.abs(table).max()), float(np.finfo(np.float32).tiny))


def _order(n_items: int, used: np.ndarray) -> np.ndarray:
    """Raw ids in the order of the new ones: a dataset ends with its largest id that has an interaction."""
    is_used = np.bincount(used, minlength=n_items) > 0
    if is_used[-1]:
        return np.arange(n_items)
    return np.concatenate([np.flatnonzero(~is_used), np.flatnonzero(is_used)])
