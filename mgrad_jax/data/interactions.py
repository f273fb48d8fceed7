"""Interactions and features: loaded from an MMRec directory, validated once, immutable afterwards."""

from __future__ import annotations

import csv
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mgrad_jax.errors import UserError

MODALITIES = ("image", "text")
SPLITS = ("train", "valid", "test")
# Past this an id is taken for a raw identifier: arrays are sized by the largest id.
MAX_ID = 50_000_000
_COLUMNS = {
    "user": ("userid", "user_id", "user_id:token", "user"),
    "item": ("itemid", "item_id", "item_id:token", "item"),
    "label": ("x_label", "x_label:float", "label"),
}


class Batch(NamedTuple):
    """A training batch.

    Attributes:
        users, positives, negatives: (B,) int32; a negative is an item the user does not have in training.
    """

    users: Any
    positives: Any
    negatives: Any


@dataclass(frozen=True)
class Interactions:
    """A dataset: interactions in three splits, and item features.

    Attributes:
        name: of the dataset.
        n_users, n_items: the largest id over the whole file plus one (published rule).
        train, valid, test: (n, 2) int32 rows (user, item) in file order, read-only. Users without training
            interactions are left out of valid and test; items without (cold items) stay.
        features: "image" and "text", where given: (n_items, dim) float32, read-only.
        source: where it came from, for messages.
    """

    name: str
    n_users: int
    n_items: int
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    source: str = "memory"

    def __post_init__(self) -> None:
        for split in SPLITS:
            object.__setattr__(self, split, _read_only(getattr(self, split)))
        features = {name: _read_only(table) for name, table in self.features.items()}
        object.__setattr__(self, "features", MappingProxyType(features))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy through the constructor: a mapping proxy itself cannot be pickled."""
        splits = (self.train, self.valid, self.test)
        return Interactions, (self.name, self.n_users, self.n_items, *splits, dict(self.features), self.source)

    def statistics(self) -> dict[str, Any]:
        """Counts as in the paper's Table 1, and more: sparsity, interactions a user and an item, cold items."""
        splits = {split: len(getattr(self, split)) for split in SPLITS}
        total = sum(splits.values())
        pairs = np.concatenate([getattr(self, split) for split in SPLITS])
        users = np.bincount(pairs[:, 0], minlength=self.n_users)
        items = np.bincount(pairs[:, 1], minlength=self.n_items)
        return {
            "users": self.n_users,
            "items": self.n_items,
            "interactions": total,
            **splits,
            "sparsity": 1.0 - total / (self.n_users * self.n_items),
            "interactions a user (mean, median)": (float(users.mean()), float(np.median(users))),
            "interactions an item (mean, median)": (float(items.mean()), float(np.median(items))),
            "cold items (not in train)": self.n_items - len(np.unique(self.train[:, 1])),
            **{f"{name} features": table.shape[1] for name, table in self.features.items()},
        }


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written through; the caller's own array stays as it is."""
    view = array.view()
    view.setflags(write=False)
    return view


def distinct_pairs(pairs: np.ndarray, n_items: int) -> np.ndarray:
    """The distinct rows of an (n, 2) array of (user, item), sorted; by one sort of user * n_items + item."""
    codes = sorted_distinct(pairs[:, 0].astype(np.int64) * n_items + pairs[:, 1])
    return np.stack([codes // n_items, codes % n_items], axis=1)


def sorted_distinct(values: np.ndarray) -> np.ndarray:
    """As `np.unique` on one axis, by a sort: its hash table is ten times slower on millions of integers."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


def load_interactions(path: str | Path, name: str | None = None) -> Interactions:
    """Load and validate a dataset directory in MMRec format.

    The directory holds `<name>.inter`, tab-separated with a header (user, item and label columns in any order, others
    ignored; label 0 = train, 1 = validation, 2 = test), and optionally `image_feat.npy` and `text_feat.npy`, one row an
    item. A pair may be repeated within a split, not across splits.

    Args:
        path: the directory, its `.inter` file, or "demo" for the embedded dataset.
        name: which `.inter` file, where there are several and none is named like the directory.

    Raises:
        UserError: one sentence naming the file, the place and the remedy.
    """
    if str(path) == "demo":
        from mgrad_jax.data.synthetic import demo_interactions

        return demo_interactions()
    file = _interaction_file(Path(path), name)
    n_users, n_items, train, valid, test = _read_splits(file)
    tables = {m: read_features(file.parent / f"{m}_feat.npy", n_items) for m in MODALITIES}
    features = {m: table for m, table in tables.items() if table is not None}
    return Interactions(file.stem, n_users, n_items, train, valid, test, features, str(path))


def problems(path: str | Path) -> list[str]:
    """What is wrong or noteworthy in a dataset directory, one sentence each; empty where nothing is.

    Where the dataset cannot be loaded: the first error of the interactions and the first of every feature file.
    Otherwise remarks: missing or zero features, repeated pairs, users and items that training never sees.
    """
    try:
        data = load_interactions(path)
    except UserError as error:
        found = [str(error)]
    else:
        return _remarks(data)
    try:
        directory = _interaction_file(Path(path), None).parent
    except UserError:
        return found
    for modality in MODALITIES:
        try:
            read_features(directory / f"{modality}_feat.npy", None)
        except UserError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def _remarks(data: Interactions) -> list[str]:
    notes = [
        f"{data.source}: no {m}_feat.npy; models that need {m} features cannot train on it."
        for m in MODALITIES
        if m not in data.features
    ]
    for modality, table in data.features.items():
        zero = np.flatnonzero(~table.any(axis=1))
        if len(zero):
            notes.append(f"{modality}_feat.npy: {len(zero)} rows are all zero (first: row {zero[0]}); fill them.")
    repeated = len(data.train) - len(distinct_pairs(data.train, data.n_items))
    if repeated:
        notes.append(f"{data.source}: {repeated} training rows repeat an earlier pair.")
    users, items = (np.bincount(data.train[:, c], minlength=n) for c, n in enumerate((data.n_users, data.n_items)))
    if unseen := int((users == 0).sum()):
        notes.append(f"{data.source}: {unseen} users have no training interaction; they are not evaluated.")
    if cold := int((items == 0).sum()):
        notes.append(f"{data.source}: {cold} items have no training interaction.")
    return notes


def _interaction_file(directory: Path, name: str | None) -> Path:
    if directory.suffix == ".inter" and directory.is_file():
        return directory
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {what}; give a directory in MMRec format, or 'demo'.")
    files = sorted(directory.glob("*.inter"))
    wanted = [f for f in files if f.stem == (name or directory.resolve().name)]
    if name is not None and not wanted:
        raise UserError(f"{directory / name}.inter does not exist; there is {_listing(files)}.")
    if len(files) == 1 or wanted:
        return (wanted or files)[0]
    if not files:
        raise UserError(f"{directory} holds no .inter file; `mgrad-jax prepare` makes one from raw ratings.")
    raise UserError(f"{directory} holds several .inter files ({_listing(files)}); name one or keep one.")


def _listing(files: list[Path]) -> str:
    return ", ".join(f.name for f in files) or "none"


def _read_splits(file: Path) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of users and items, and the three checked splits: (n, 2) int32 rows (user, item) in file order."""
    users, items, labels = _read_columns(file)
    n_users, n_items = (_count_ids(file, column, ids) for column, ids in (("user", users), ("item", items)))
    pairs = np.stack([users, items], axis=1).astype(np.int32)
    train, valid, test = (pairs[labels == label] for label in range(3))
    _check_split_sizes(file, {"train": train, "valid": valid, "test": test})
    _check_overlap(file, users * n_items + items, labels, n_items)
    known = np.bincount(train[:, 0], minlength=n_users) > 0
    valid, test = (rows[known[rows[:, 0]]] for rows in (valid, test))
    for split, rows in (("valid", valid), ("test", test)):
        if not len(rows):
            raise UserError(f"{file}: no user of the {split} split has a training row; give its users some.")
    _check_negatives(file, train, n_items)
    return n_users, n_items, train, valid, test


def _read_columns(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and labels of every row, int64, checked one column at a time."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            header = stream.readline().rstrip("\r\n").split("\t")
        found = {role: _find_column(file, header, role) for role in _COLUMNS}
        table = _read_table(file, list(found.values()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); check its permissions and that it is UTF-8 text.") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not a tab-separated table ({reason}); write one row a line.") from None
    if table.empty:
        raise UserError(f"{file} has a header and no rows; give it interactions.")
    users, items, labels = (_integers(file, found[role], table[found[role]]) for role in _COLUMNS)
    _check_range(file, found["label"], labels, labels > 2, "is none of 0 (train), 1 (validation) and 2 (test)")
    for column, ids in ((found["user"], users), (found["item"], items)):
        _check_range(file, column, ids, ids > MAX_ID, f"is above {MAX_ID:,}; re-index with `mgrad-jax prepare`")
    return users.astype(np.int64), items.astype(np.int64), labels.astype(np.int64)


def _read_table(file: Path, columns: list[str]) -> pd.DataFrame:
    """The columns as integers where every row has them, else as text, to be looked at row by row."""

    def read(dtype: type) -> pd.DataFrame:
        return pd.read_csv(
            file,
            sep="\t",
            usecols=columns,
            dtype=dtype,
            keep_default_na=False,
            quoting=csv.QUOTE_NONE,
            encoding="utf-8-sig",
        )

    try:
        return read(np.int64)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError):
        raise
    except (ValueError, OverflowError):
        return read(str)


def _line(file: Path, row: int) -> int:
    """The line number, counted from 1, of a data row: blank lines are no rows."""
    with file.open(encoding="utf-8-sig") as stream:
        filled = (number for number, line in enumerate(stream, 1) if number > 1 and line.strip("\r\n"))
        return next(number for position, number in enumerate(filled) if position == row)


def _find_column(file: Path, header: list[str], role: str) -> str:
    for column in header:
        if column.strip().lower() in _COLUMNS[role]:
            return column
    example = {"user": "userID", "item": "itemID", "label": "x_label"}[role]
    raise UserError(f"{file} line 1: there is no {example} column among {', '.join(header)}; rename it to {example}.")


def _integers(file: Path, column: str, values: pd.Series[Any]) -> np.ndarray:
    """The column's numbers; the first value that is no whole number at or above zero is named."""
    if values.dtype == np.int64:
        numbers = values.to_numpy()
    else:
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
        bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers == np.floor(numbers))))
        if len(bad):
            place = f"{file} line {_line(file, int(bad[0]))}"
            raise UserError(f"{place}: {column} is {values.iloc[bad[0]]!r}, not a whole number; correct the row.")
    _check_range(file, column, numbers, numbers < 0, "is negative; count from 0")
    return numbers


def _check_range(file: Path, column: str, values: np.ndarray, wrong: np.ndarray, complaint: str) -> None:
    bad = np.flatnonzero(wrong)
    if len(bad):
        raise UserError(f"{file} line {_line(file, int(bad[0]))}: {column} {int(values[bad[0]])} {complaint}.")


def _count_ids(file: Path, what: str, ids: np.ndarray) -> int:
    count = int(ids.max()) + 1
    missing = np.flatnonzero(np.bincount(ids, minlength=count) == 0)
    if len(missing):
        raise UserError(
            f"{file}: {what} id {missing[0]} never occurs though the largest is {count - 1} "
            f"(such gaps: {len(missing)}); re-index with `mgrad-jax prepare`."
        )
    return count


def _check_split_sizes(file: Path, splits: dict[str, np.ndarray]) -> None:
    for label, (split, rows) in enumerate(splits.items()):
        if not len(rows):
            raise UserError(f"{file}: the {split} split is empty (no row has x_label {label}); label at least one row.")


def _check_overlap(file: Path, codes: np.ndarray, labels: np.ndarray, n_items: int) -> None:
    """A pair in two splits would leak the answer into training."""
    ordered = np.sort(codes * 3 + labels)
    clash = np.flatnonzero((np.diff(ordered // 3) == 0) & (np.diff(ordered) != 0))
    if len(clash):
        code = ordered[clash[0]] // 3
        rows = np.flatnonzero(codes == code)
        first, second = rows[0], rows[labels[rows] != labels[rows[0]]][0]
        raise UserError(
            f"{file} lines {_line(file, first)} and {_line(file, second)}: user {code // n_items} and item "
            f"{code % n_items} stand in two splits; keep one of the rows."
        )


def _check_negatives(file: Path, train: np.ndarray, n_items: int) -> None:
    pairs = distinct_pairs(train, n_items)
    candidates = np.count_nonzero(np.bincount(pairs[:, 1]))
    full = np.flatnonzero(np.bincount(pairs[:, 0]) >= candidates)
    if len(full):
        raise UserError(
            f"{file}: user {full[0]} has every training item, so that no negative can be drawn; "
            "remove the user or some of its rows."
        )


def read_features(file: Path, n_rows: int | None) -> np.ndarray | None:
    """One feature table as float32, or None where there is no file.

    Args:
        file: an `.npy` file of numbers, (rows, dim); objects are never unpickled.
        n_rows: how many rows there must be, one an item; None where any number will do.

    Raises:
        UserError: a damaged file, another shape or type, NaN or infinity.
    """
    if not file.exists():
        return None
    try:
        table = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, OverflowError, tokenize.TokenError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is damaged or not a plain .npy array ({reason}); write it with numpy.save.") from None
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind not in "fiu":
        shape = getattr(table, "shape", "several arrays")
        raise UserError(f"{file} has shape {shape} and type {getattr(table, 'dtype', '?')}; give (items, dim) numbers.")
    if not table.shape[1]:
        raise UserError(f"{file} has no columns; give (items, dim) numbers.")
    if n_rows is not None and len(table) != n_rows:
        raise UserError(f"{file} has {len(table)} rows and the dataset {n_rows} items; give one row an item.")
    with np.errstate(over="ignore", invalid="ignore"):
        table = np.ascontiguousarray(table, dtype=np.float32)
        suspects = np.flatnonzero(~np.isfinite(table.sum(axis=1, dtype=np.float64)))
    if len(suspects):
        column = np.flatnonzero(~np.isfinite(table[suspects[0]]))[0]
        place = f"{file}: row {suspects[0]}, column {column}"
        raise UserError(f"{place} is NaN or infinite; fill it, e.g. with the column's mean.")
    return table
