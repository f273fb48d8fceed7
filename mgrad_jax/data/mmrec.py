"""Dataset directories in MMRec format: `<name>.inter` and feature tables, read into `Interactions`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mgrad_jax.data.dataset_files import check_whole
from mgrad_jax.data.features import MODALITIES, read_features, zero_rows
from mgrad_jax.data.interactions import (
    MAX_ID,
    Interactions,
    PairsInTwoSplits,
    check_negatives,
    distinct_pairs,
)
from mgrad_jax.data.synthetic import demo_interactions
from mgrad_jax.data.tables import Form, few, first_row, line_of, named, other_separator, read_columns
from mgrad_jax.deprecation import renamed
from mgrad_jax.errors import UserError, shown

renamed(__name__, {"problems": "diagnose"})

# Names of the columns without case and without RecBole's type behind a colon; the first is the one to use.
COLUMNS = {
    "user": ("userid", "user_id", "user"),
    "item": ("itemid", "item_id", "item"),
    "label": ("x_label", "label"),
}
_PUBLISHED = {"user": "userID", "item": "itemID", "label": "x_label"}
_FORM = Form()
# Ids above this many, of which not one in a hundred is used, are taken for raw identifiers.
_SPARSE = 1_000_000
_WHOLE = re.compile(r"[ \f\v]*[+-]?[0-9]+(\.0*)?([eE]\+?[0-9]+)?[ \f\v]*")


def load_interactions(path: str | Path, name: str | None = None) -> Interactions:
    """Load and validate a dataset directory in MMRec format.

    The directory holds `<name>.inter`, tab-separated with a header (user, item and label columns in any order, others
    ignored; label 0 = train, 1 = validation, 2 = test), and optionally `image_feat.npy` and `text_feat.npy`, one row
    per item. A pair may be repeated within a split, not across splits. Ids may be unused.

    Args:
        path: the directory, its `.inter` file, or "demo" for the embedded dataset.
        name: which `.inter` file, where there are several and none is named like the directory.

    Raises:
        UserError: one sentence naming the file, the place and the remedy.
    """
    if str(path) == "demo":
        return demo_interactions()
    file = interaction_file(Path(path), name)
    users, items, labels = _read_rows(file)
    n_users, n_items = int(users.max()) + 1, int(items.max()) + 1
    for what, ids, count in (("user", users, n_users), ("item", items, n_items)):
        _check_density(file, what, ids, count)
    train, valid, test = split_rows(file, np.stack([users, items], axis=1).astype(np.int32), labels, n_users)
    tables = {m: read_features(file.parent / f"{m}_feat.npy", n_items, check_mapped=False) for m in MODALITIES}
    features = {m: table for m, table in tables.items() if table is not None}
    try:
        data = Interactions(file.stem, n_users, n_items, train, valid, test, features, str(path))
    except PairsInTwoSplits as clash:
        raise _clash(file, clash, users, items, labels) from None
    check_negatives(str(file), distinct_pairs(train, n_items))
    check_whole(file.parent)  # nobody began to replace it meanwhile
    return data


def diagnose(path: str | Path) -> list[str]:
    """What is wrong or noteworthy in a dataset directory, one sentence each; empty where nothing is.

    Where the dataset cannot be loaded: the first error of the interactions and the first of every feature file.
    Otherwise remarks: unused ids, missing or zero features, repeated pairs, users and items that training never sees.
    """
    try:
        return remarks(load_interactions(path))
    except UserError as error:
        found = [str(error)]
    try:
        directory = interaction_file(Path(path), None).parent
    except UserError:
        return found
    for modality in MODALITIES:
        try:
            read_features(directory / f"{modality}_feat.npy", None)
        except UserError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def remarks(data: Interactions) -> list[str]:
    """What is noteworthy in a dataset, one sentence each; empty where nothing is."""
    notes = [f"{data.source}: no {m}_feat.npy." for m in MODALITIES if m not in data.features]
    for modality, table in data.features.items():
        zero = zero_rows(table)
        if len(zero):
            notes.append(
                f"{modality}_feat.npy: {len(zero)} rows are all zero (first: row {zero[0]}), items without {modality} "
                "features; `mgrad-jax prepare DATASET NEW --fill-features` gives them the mean of the others."
            )
    repeated = len(data.train) - len(distinct_pairs(data.train, data.n_items))
    if repeated:
        notes.append(f"{data.source}: {repeated} training rows repeat an earlier pair.")
    held_out = np.concatenate([data.valid, data.test])
    for column, (what, n) in enumerate((("user", data.n_users), ("item", data.n_items))):
        train = np.bincount(data.train[:, column], minlength=n)
        unused = np.flatnonzero((train + np.bincount(held_out[:, column], minlength=n)) == 0)
        if unseen := int((train == 0).sum()):
            follows = "; they are not evaluated" if what == "user" else ""
            notes.append(f"{data.source}: {unseen} {what}s have no training interaction{follows}.")
        if len(unused):
            have = "has" if len(unused) == 1 else "have"
            notes.append(
                f"{data.source}: {len(unused)} of {n} {what} ids {have} no interaction at all "
                f"(first: {unused[0]}); each keeps a row in every model, as in MMRec."
            )
    return notes


def interaction_file(directory: Path, name: str | None) -> Path:
    """The `.inter` file that a path and a name mean."""
    if directory.suffix == ".inter" and directory.is_file():
        check_whole(directory.parent)
        return directory
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {what}; give a directory in MMRec format, or 'demo'.")
    check_whole(directory)
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
    return few([f.name for f in files]) or "none"


def role_of(name: str, known: dict[str, tuple[str, ...]] = COLUMNS) -> str | None:
    """What a column holds, by its name: case, surrounding blanks and a type such as RecBole's `:token` do not count."""
    plain = re.sub(r":[a-z_]+$", "", name.strip().lower())
    return next((role for role, names in known.items() if plain in names), None)


def check_names(file: Path, header: Sequence[str]) -> None:
    """Refuse a header in which a name stands twice."""
    names = [name.strip() for name in header if name.strip()]
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise UserError(f"{file} line 1: the column {shown(twice[0])} stands there twice; rename or remove one.")


def _read_rows(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and labels of every row, int64, checked one column at a time."""
    top = first_row(file, _FORM)
    if top is None:
        raise UserError(
            f"{file} line 1: there is no userID column, for the file is empty; `mgrad-jax prepare` makes one from "
            "raw ratings."
        )
    header = top[1]
    positions = _find_columns(file, *top)
    ordered = sorted(positions.values())
    table = read_columns(file, _FORM, len(header), ordered, 1, np.int64)
    if table is None:
        table = read_columns(file, _FORM, len(header), ordered, 1)
    assert table is not None  # as text every table can be read
    if not len(table[0]):
        raise UserError(f"{file} has a header and no rows; give it interactions.")
    columns = {}
    for role, position in positions.items():
        name, values = header[position].strip(), table[ordered.index(position)]
        above = (2, "is none of 0 (train), 1 (validation) and 2 (test)") if role == "label" else None
        columns[role] = _integers(file, name, values, *above) if above else _integers(file, name, values)
    return columns["user"], columns["item"], columns["label"]


def _find_columns(file: Path, line: int, header: list[str]) -> dict[str, int]:
    """Where the user, item and label columns stand."""
    found: dict[str, list[int]] = {role: [] for role in COLUMNS}
    for position, name in enumerate(header):
        if role := role_of(name):
            found[role].append(position)
    for role, positions in found.items():
        if len(positions) > 1:
            names = " and ".join(shown(header[position], 30) for position in positions[:2])
            raise UserError(f"{file} line {line}: {names} may both hold the {role}s; rename one of the columns.")
    missing = [role for role, positions in found.items() if not positions]
    if missing:
        raise _unreadable_header(file, line, header, missing)
    check_names(file, header)
    return {role: positions[0] for role, positions in found.items()}


def _unreadable_header(file: Path, line: int, header: list[str], missing: list[str]) -> UserError:
    """The sentence for a first line that does not name what is needed, with the remedy for its cause."""
    text = "\t".join(header)
    place = f"{file} line {line}: there is no {_PUBLISHED[missing[0]]} column"
    separator = other_separator(text, "\t")
    fields = [field.strip() for field in (text.split(separator) if separator else header)]
    numbers = all(_WHOLE.fullmatch(field) or _is_number(field) for field in fields)
    if text.lstrip()[:1] in ("{", "["):
        return UserError(f"{place}, the file is JSON; `mgrad-jax prepare` reads JSON lines when they are named .jsonl.")
    if separator is not None:
        above, names = "", ""
        if numbers:
            above, names = " under a line of names such as userID, itemID, x_label", " --columns userID,itemID,x_label"
        return UserError(
            f"{place}, the fields are separated by {named(separator)}; separate them by tabs{above}, or let "
            f"`mgrad-jax prepare FILE NEW --separator {shown(separator)}{names}` write the dataset."
        )
    if numbers:
        return UserError(
            f"{place}, the file begins with numbers and has no header; put a line with the names of its "
            f"{len(fields)} columns above, such as userID, itemID, x_label, separated by tabs."
        )
    if missing == ["label"]:
        return UserError(
            f"{place} among {few(header)}; add it (0 train, 1 validation, 2 test), or let "
            "`mgrad-jax prepare FILE NEW` draw a split."
        )
    names = ", ".join(_PUBLISHED[role] for role in missing)
    return UserError(f"{place} among {few(header)}; name the columns {names} in the header.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _integers(
    file: Path,
    column: str,
    values: np.ndarray,
    most: int = MAX_ID,
    complaint: str = f"is above {MAX_ID:,}; re-index with `mgrad-jax prepare`",
) -> np.ndarray:
    """The column's numbers, int64; the first that is no whole number from 0 to `most` is named by its line."""
    numbers = values
    if values.dtype != np.int64:
        _refuse(file, column, values, [not _WHOLE.fullmatch(v) for v in values], "not a whole number; correct the row")
        numbers = np.array([float(value) for value in values])
    _refuse(file, column, values, numbers < 0, "is negative; count from 0")
    _refuse(file, column, values, numbers > most, complaint)
    return numbers.astype(np.int64)


def _refuse(file: Path, column: str, values: np.ndarray, wrong: np.ndarray | list[bool], complaint: str) -> None:
    bad = np.flatnonzero(wrong)
    if len(bad):
        line = line_of(file, _FORM, int(bad[0]), 1)
        # A string that is no number is quoted.
        value = shown(values[bad[0]]) if complaint.startswith("not") else shown(str(values[bad[0]]).strip())[1:-1]
        says = f"is {value}, {complaint}" if complaint.startswith("not") else f"{value} {complaint}"
        what, _, remedy = says.partition(";")
        more = f" (such rows: {len(bad)})" if len(bad) > 1 else ""
        raise UserError(f"{file} line {line}: {shown(column)[1:-1]} {what}{more}{remedy and ';' + remedy}.")


def _check_density(file: Path, what: str, ids: np.ndarray, count: int) -> None:
    """Ids of which next to none is used are raw identifiers: arrays are sized by the largest."""
    if count > _SPARSE and count > 100 * len(ids):
        raise UserError(
            f"{file}: the {what} ids go up to {count - 1:,} and there are {len(ids):,} rows; "
            "re-index with `mgrad-jax prepare FILE NEW`, which keeps the split."
        )


def split_rows(file: Path, pairs: np.ndarray, labels: np.ndarray, n_users: int) -> tuple[np.ndarray, ...]:
    """The three splits; users without training rows are left out of the last two."""
    splits = [pairs[labels == label] for label in range(3)]
    for label, split in enumerate(("train", "valid", "test")):
        if not len(splits[label]):
            raise UserError(
                f"{file}: the {split} split is empty (no row has x_label {label}); label at least one row, or let "
                "`mgrad-jax prepare FILE NEW --new-split` draw a split."
            )
    known = np.bincount(splits[0][:, 0], minlength=n_users) > 0
    train, valid, test = splits[0], *(rows[known[rows[:, 0]]] for rows in splits[1:])
    for split, rows in (("valid", valid), ("test", test)):
        if not len(rows):
            raise UserError(f"{file}: no user of the {split} split has a training row; give its users some.")
    return train, valid, test


def _clash(file: Path, clash: PairsInTwoSplits, users: np.ndarray, items: np.ndarray, labels: np.ndarray) -> UserError:
    assert clash.pairs is not None
    user, item = clash.pairs[0]
    rows = np.flatnonzero((users == user) & (items == item))
    first, second = rows[0], rows[labels[rows] != labels[rows[0]]][0]
    lines = [line_of(file, _FORM, int(row), 1) for row in (first, second)]
    return UserError(
        f"{file} lines {lines[0]} and {lines[1]}: user {user} and item {item} stand in two splits "
        f"(such pairs: {len(clash.pairs)}); keep one of the rows, or let `mgrad-jax prepare FILE NEW "
        "--drop-duplicates` keep the one in training."
    )
