"""From raw ratings, or another dataset, to a dataset in MMRec format: k-core filter, per-user split, new ids."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mgrad_jax.data.dataset_files import replace_files, writing
from mgrad_jax.data.features import MODALITIES, fill_zero_rows, read_features, zero_rows
from mgrad_jax.data.id_maps import read_id_map, write_id_map
from mgrad_jax.data.interactions import Interactions, check_negatives, distinct_pairs
from mgrad_jax.data.mmrec import interaction_file, split_rows
from mgrad_jax.data.ratings import Ratings, Source, read_ratings, refuse_rows
from mgrad_jax.data.tables import few, opened
from mgrad_jax.errors import UserError, shown
from mgrad_jax.preparation import Preparation

_MAPS = ("user_map.tsv", "item_map.tsv")
_CANDIDATES = "candidates.npy"
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Prepared:
    """What `prepare` read and wrote.

    Attributes:
        users, items, interactions: counts of the dataset.
        file: its `.inter` file.
        rows_read: rows of the source; those in `left_out` and the interactions add up to them.
        left_out: reason -> number of rows.
        columns: "user", "item", ... -> the column that was taken for it, in words.
        split: "kept" where the source had labels, else "drawn".
        without_features: modality -> number of items whose row is zero.
    """

    users: int
    items: int
    interactions: int
    file: Path
    rows_read: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "drawn"
    without_features: Mapping[str, int] = field(default_factory=dict)


def prepare(
    source: str | Path,
    destination: str | Path,
    how: Preparation | None = None,
    *,
    features: Mapping[str, tuple[str | Path, str | Path]] | None = None,
    **named: Any,
) -> Prepared:
    """Filter, split and re-index raw ratings, and write them in MMRec format.

    Repeated pairs count once. Users and items with fewer than `k_core` interactions are removed until none is left.
    Each user's interactions are shuffled and split by the published rule: n < 10 gives n - 2, 1, 1; otherwise
    t = floor(0.2 n) are held out, floor(t / 2) of them for validation. New ids count from 0 in the order of
    the raw identifiers.

    A source with an x_label column is a dataset already: its split is kept, nothing is filtered unless asked for, ids
    that are whole numbers keep their order, and features and raw names beside it come along.

    Args:
        source: CSV, TSV (`.csv`, `.tsv`, `.txt`, `.inter`) or JSON lines (`.json`, `.jsonl`), plain or `.gz`; or the
            directory of a dataset.
        destination: directory to write `<name>.inter`, `user_map.tsv` and `item_map.tsv` (raw id, new id) to.
        how: what else is asked for; by default a `Preparation`, which tells of each. At least 3 interactions are
            needed of every user where a split is drawn. A dataset that is overwritten is replaced as a whole; a process
            killed on the way leaves the old one, the new one, or a directory that is refused until this is run again.
        features: "image" and "text": (array, ids) where `array` is an .npy file of shape (rows, dim) and `ids` a text
            file with the raw item id of each row, one a line. The rows of the items that are left are written, in the
            new order, as `<modality>_feat.npy`. Of a row of zeros nothing is known either.
        **named: what is asked for by name, in place of that in `how`, such as `min_rating=4`.

    Raises:
        UserError: a missing or malformed file, an unknown column, nothing left, or a destination in use.
    """
    source, destination = Path(source), Path(destination)
    how = dataclasses.replace(how or Preparation(), **named)
    k_core = how.k_core
    _check_numbers(k_core, how.seed, how.min_rating)
    file = destination / f"{checked_name(how.name, destination)}.inter"
    features = {**how.features, **(features or {})}
    _check_modalities(features)
    if source.is_dir():
        source = interaction_file(source, None)
    beside = [modality for modality in MODALITIES if (source.parent / f"{modality}_feat.npy").exists()]
    inputs = [source, *(Path(path) for pair in features.values() for path in pair)]
    inputs += [source.parent / f"{modality}_feat.npy" for modality in beside]
    check_destination(file, [*features, *beside], inputs, how.overwrite)

    columns = {"user": how.user, "item": how.item, "rating": how.rating}
    given = {role: column for role, column in columns.items() if column is not None}
    separator = {"tab": "\t", "\\t": "\t"}.get(how.separator or "", how.separator)
    ratings = read_ratings(Source(source, separator, how.encoding, how.header, how.columns or None, given))
    kept = "label" in ratings.values and not how.new_split
    rows, left_out = _select(source, ratings, how.min_rating, kept, how.drop_duplicates)
    k_core = k_core if k_core is not None else 1 if kept else 5
    if not kept and k_core < 3:
        raise UserError(f"k_core is {k_core}; it must be at least 3, so that every user has a row in each split.")
    remaining = _k_core(rows, k_core)
    if remaining.empty:
        raise UserError(f"{source}: no user and item has {k_core} interactions; lower --k-core or --min-rating.")
    _count(left_out, f"of users or items with fewer than {k_core} interactions", len(rows) - len(remaining))

    users, user_names = _factorize(remaining["user"], kept)
    items, item_names = _factorize(remaining["item"], kept)
    labels = remaining["label"].to_numpy() if kept else _split(users, np.random.default_rng(how.seed))
    tables = {m: _align(Path(array), Path(ids), item_names, how.fill_features) for m, (array, ids) in features.items()}
    if kept:
        tables = {**_carried(source, item_names), **tables}
    if how.fill_features:
        tables = {modality: fill_zero_rows(table) for modality, table in tables.items()}
    _check_dataset(source, users, items, labels, (len(user_names), len(item_names)), tables)
    if kept:
        user_names, item_names = (_raw_names(source, k, n) for k, n in (("user", user_names), ("item", item_names)))
    table = pd.DataFrame({"userID": users, "itemID": items, "x_label": labels})
    table = table.sort_values(["userID", "x_label", "itemID"], kind="stable")
    contents: dict[str, Callable[[Path], object]] = {
        f"{modality}_feat.npy": partial(write_array, array) for modality, array in tables.items()
    }
    for map_name, names in zip(_MAPS, (user_names, item_names), strict=True):
        contents[map_name] = partial(write_map, names)
    contents[file.name] = partial(table.to_csv, sep="\t", index=False)
    with writing(destination):
        check_destination(file, tables, inputs, how.overwrite)
        replace_files(destination, contents, [path.name for path in dataset_files(destination)])
    return Prepared(
        users=len(user_names),
        items=len(item_names),
        interactions=len(table),
        file=file,
        rows_read=len(ratings),
        left_out=left_out,
        columns=ratings.columns,
        split="kept" if kept else "drawn",
        without_features={m: len(zero_rows(array)) for m, array in tables.items()},
    )


# What is asked for


def _check_numbers(k_core: int | None, seed: int, min_rating: float | None) -> None:
    if k_core is not None and not 1 <= k_core <= _MOST:
        raise UserError(
            f"k_core is {shown(k_core)}; it must be at least 3 where a split is drawn, and no more than {_MOST}."
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {shown(seed)}; it must be a whole number from 0 to 2**63 - 1.")
    if min_rating is not None and not math.isfinite(min_rating):
        raise UserError(f"min_rating is {min_rating}; it must be a finite number.")


def checked_name(name: str | None, destination: Path) -> str:
    """The dataset's name, which stays inside of the destination."""
    chosen = destination.resolve().name if name is None else name
    if not chosen.strip() or chosen.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f]", chosen) or len(chosen) > 100:
        raise UserError(
            f"--name {shown(chosen)} cannot name a dataset; give up to 100 characters without /, \\ and control "
            "characters, not beginning with a dot."
        )
    try:
        chosen.encode()
    except UnicodeEncodeError:
        raise UserError("--name holds bytes that are no text; give another name.") from None
    return chosen


def _check_modalities(features: Mapping[str, object]) -> None:
    for modality in features:
        if modality not in MODALITIES:
            raise UserError(f"there are no {shown(modality)} features; choose among {', '.join(MODALITIES)}.")


def dataset_files(destination: Path) -> list[Path]:
    """The files of a dataset in a directory: interactions, maps, features, candidates, and user graphs made of them."""
    if not destination.is_dir():
        return []
    fixed = [destination / name for name in (*_MAPS, *(f"{modality}_feat.npy" for modality in MODALITIES))]
    fixed.append(destination / _CANDIDATES)
    found = [*sorted(destination.glob("*.inter")), *fixed, *sorted(destination.glob("user_graph-*.npz"))]
    return [path for path in found if path.exists()]


def check_destination(file: Path, features: Collection[str], inputs: Sequence[Path], overwrite: bool) -> None:
    """Nothing that is read or not asked for is replaced, and no feature follows the ids of another dataset."""
    destination = file.parent
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is no directory; choose another destination.")
    present = dataset_files(destination)
    inters = [path for path in present if path.suffix == ".inter"]
    for path in inputs:
        if path.exists() and any(path.samefile(target) for target in present):
            raise UserError(f"{path} is read and would be replaced; choose another destination.")
    if inters and not overwrite:
        raise UserError(f"{inters[0]} already exists; choose another destination or overwrite it with --overwrite.")
    if destination / _CANDIDATES in present and not overwrite:
        raise UserError(
            f"{destination / _CANDIDATES} follows other ids; move it away, or overwrite the dataset with --overwrite."
        )
    if len(inters) > 1:
        raise UserError(
            f"{destination} holds several .inter files ({few([path.name for path in inters])}); choose another "
            "destination."
        )
    for modality in MODALITIES:
        left_over = destination / f"{modality}_feat.npy"
        if left_over in present and modality not in features:
            raise UserError(f"{left_over} follows other item ids; move it away, or give {modality} features as well.")
        if left_over in present and not overwrite:
            raise UserError(f"{left_over} already exists; choose another destination or overwrite it with --overwrite.")


# The rows


def _select(
    source: Path, ratings: Ratings, least: float | None, kept: bool, drop_duplicates: bool
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Users, items and labels of the rows that count, and how many do not, by reason."""
    left_out: dict[str, int] = {}
    rows = pd.DataFrame({"user": ratings.values["user"], "item": ratings.values["item"]})
    if kept:
        rows["label"] = _labels(source, ratings)
    if least is not None:
        if "rating" not in ratings.values:
            raise UserError(f"{source} has no column that is known to hold the rating: name one with --rating.")
        values = pd.to_numeric(pd.Series(ratings.values["rating"]), errors="coerce").to_numpy(np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        value = shown(str(ratings.values["rating"][bad[0]])) if len(bad) else ""
        refuse_rows(source, ratings, bad, f"has the rating {value}, not a number", "correct it")
        rows = rows[values >= least]
        _count(left_out, f"with a rating below {least:g}", len(ratings) - len(rows))
    distinct = rows.drop_duplicates()
    _count(left_out, "that repeat an earlier row", len(rows) - len(distinct))
    if not kept:
        return distinct, left_out
    # Training before validation before test, in the order of the file otherwise.
    single = distinct.sort_values("label", kind="stable").drop_duplicates(["user", "item"]).sort_index()
    clash = distinct[distinct.duplicated(["user", "item"], keep=False)]
    if len(clash) and not drop_duplicates:
        user, item = clash.iloc[0][["user", "item"]]
        raise UserError(
            f"{source}: user {shown(user)} and item {shown(item)} stand in two splits (such pairs: "
            f"{len(clash.drop_duplicates(['user', 'item']))}); keep one of the rows, or the one in training with "
            "--drop-duplicates."
        )
    _count(left_out, "of pairs that stand in an earlier split", len(distinct) - len(single))
    return single, left_out


def _count(left_out: dict[str, int], reason: str, rows: int) -> None:
    if rows:
        left_out[reason] = rows


def _labels(source: Path, ratings: Ratings) -> np.ndarray:
    values = ratings.values["label"]
    numbers = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isin(numbers, (0, 1, 2)))
    value = shown(str(values[bad[0]])) if len(bad) else ""
    refuse_rows(
        source,
        ratings,
        bad,
        f"has the x_label {value}, none of 0 (train), 1 (validation) and 2 (test)",
        "correct it, or draw a split with --new-split",
    )
    return numbers.astype(np.int64)


def _k_core(ratings: pd.DataFrame, k: int) -> pd.DataFrame:
    """Remove users and items with fewer than k interactions until none is left."""
    while True:
        enough = (ratings.groupby("user")["item"].transform("size") >= k) & (
            ratings.groupby("item")["user"].transform("size") >= k
        )
        if enough.all():
            return ratings
        ratings = ratings[enough]


def _factorize(values: pd.Series, numbers: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids from 0 and the names they stand for, in order; as numbers where asked for and all are plain ones."""
    codes, names = pd.factorize(values.to_numpy(), sort=True)
    if numbers and all(re.fullmatch(r"[0-9]{1,18}", name) for name in names):
        order = np.argsort([int(name) for name in names], kind="stable")
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        return places[codes], np.asarray(names, dtype=object)[order]
    return codes, np.asarray(names, dtype=object)


def _split(users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels 0, 1, 2 of every interaction, by the published rule."""
    order = np.lexsort((rng.random(len(users)), users))
    counts = np.bincount(users)
    held_out = np.where(counts < 10, 2, counts // 5)
    n_valid = held_out // 2
    rank = np.empty(len(users), np.int64)
    rank[order] = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    n_train = (counts - held_out)[users]
    return np.where(rank < n_train, 0, np.where(rank < n_train + n_valid[users], 1, 2))


def _check_dataset(
    source: Path,
    users: np.ndarray,
    items: np.ndarray,
    labels: np.ndarray,
    counts: tuple[int, int],
    tables: Mapping[str, np.ndarray],
) -> None:
    """What is written can be loaded."""
    train, valid, test = split_rows(source, np.stack([users, items], axis=1), labels, counts[0])
    data = Interactions(source.stem, *counts, train, valid, test, tables, str(source))
    check_negatives(str(source), distinct_pairs(data.train, data.n_items))


# Features and names


def _align(array: Path, ids: Path, item_names: np.ndarray, fill: bool) -> np.ndarray:
    """The rows of `array`, whose raw item ids stand in `ids`, in the order of `item_names`: (n_items, dim) float32."""
    table = read_features(array, None)
    if table is None:
        raise UserError(f"{array} does not exist; give an .npy file of features.")
    with opened(ids) as stream:
        names = pd.Index([line.rstrip("\n") for line in stream])
    if len(names) != len(table):
        raise UserError(f"{ids} has {len(names)} lines and {array} {len(table)} rows; give one id a row.")
    repeated = np.flatnonzero(names.duplicated())
    if len(repeated):
        line = repeated[0] + 1
        raise UserError(
            f"{ids} line {line}: item {shown(names[line - 1])} stands there twice (such lines: {len(repeated)}); "
            "keep one of its rows."
        )
    rows = names.get_indexer(pd.Index(item_names))
    missing = np.flatnonzero(rows < 0)
    if len(missing) and not fill:
        raise UserError(
            f"{ids}: item {shown(item_names[missing[0]])} has ratings but no row (such items: {len(missing)}); "
            "add a row, or the mean of the others with --fill-features."
        )
    aligned = table[rows]
    aligned[missing] = 0  # no feature; filled by the caller
    return aligned


def _carried(source: Path, item_names: np.ndarray) -> dict[str, np.ndarray]:
    """The features beside a dataset, whose rows follow its ids, for the items that are left."""
    tables = {}
    for modality in MODALITIES:
        file = source.parent / f"{modality}_feat.npy"
        table = read_features(file, None)
        if table is None:
            continue
        lost = [name for name in item_names if not name.isascii() or not name.isdigit() or int(name) >= len(table)]
        if lost:
            raise UserError(
                f"{file} has no row for item {shown(lost[0])} (such items: {len(lost)}); "
                f"give --{modality}-features with the items' names, or move the file away."
            )
        tables[modality] = table[[int(name) for name in item_names]]
    return tables


def _raw_names(source: Path, kind: str, names: np.ndarray) -> np.ndarray:
    """The raw names of a dataset's ids where its map stands beside it, else the ids themselves."""
    raw = read_id_map(source, kind)
    if raw is None or not all(name.isascii() and name.isdigit() and int(name) < len(raw) for name in names):
        return names
    return raw[[int(name) for name in names]]


def write_array(array: np.ndarray, path: Path) -> None:
    """Write an `.npy` file."""
    with path.open("wb") as stream:
        np.save(stream, array)


def write_map(names: Sequence[str] | np.ndarray, path: Path) -> None:
    """Write a map of ids, for `mgrad_jax.data.dataset_files.replace_files`."""
    write_id_map(path, names)
