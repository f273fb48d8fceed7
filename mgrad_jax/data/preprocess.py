"""From raw ratings to a dataset in MMRec format: k-core filter, per-user split, new ids."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mgrad_jax.data.interactions import MODALITIES, read_features
from mgrad_jax.errors import UserError

# Names under which the columns go in common rating files, Amazon's reviews among them.
_KNOWN = {
    "user": ("user", "userid", "user_id", "reviewerid", "user_id:token", "uid"),
    "item": ("item", "itemid", "item_id", "asin", "parent_asin", "item_id:token", "movieid", "iid"),
    "rating": ("rating", "overall", "score", "stars", "rating:float"),
}


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote: counts, and the `.inter` file."""

    users: int
    items: int
    interactions: int
    file: Path


def prepare(
    source: str | Path,
    destination: str | Path,
    *,
    name: str | None = None,
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    min_rating: float | None = None,
    k_core: int = 5,
    seed: int = 999,
    header: bool | None = None,
    features: Mapping[str, tuple[str | Path, str | Path]] | None = None,
    overwrite: bool = False,
) -> Prepared:
    """Filter, split and re-index raw ratings, and write them in MMRec format.

    Repeated pairs count once. Users and items with fewer than `k_core` interactions are removed until none is left. Each
    user's interactions are shuffled and split by the published rule: n < 10 gives n - 2, 1, 1; otherwise t = floor(0.2 n)
    are held out, floor(t / 2) of them for validation. New ids count from 0 in the order of the raw identifiers.

    Args:
        source: CSV, TSV (`.csv`, `.tsv`, `.txt`, `.inter`) or JSON lines (`.json`, `.jsonl`), plain or `.gz`.
        destination: directory to write `<name>.inter`, `user_map.tsv` and `item_map.tsv` (raw id, new id) to.
        name: of the dataset; the directory's name by default.
        user, item, rating: columns; found by common names by default. A table without a header has them in this order.
        min_rating: leave lower ratings out.
        k_core: fewest interactions of every user and item; at least 3 are needed for a split.
        seed: of the shuffle.
        header: whether a table has a header line; by default it has one where its first line holds a known (or the
            given) column name, and none where that line holds a number.
        features: "image" and "text": (array, ids) where `array` is an .npy file of shape (rows, dim) and `ids` a text
            file with the raw item id of each row, one a line. The rows of the items that are left are written, in the
            new order, as `<modality>_feat.npy`.
        overwrite: replace the files of an earlier run.

    Raises:
        UserError: a missing or malformed file, an unknown column, nothing left, or a destination in use.
    """
    if k_core < 3:
        raise UserError(f"k_core is {k_core}; it must be at least 3, so that every user has a row in each split.")
    source, destination = Path(source), Path(destination)
    file = destination / f"{name or destination.resolve().name}.inter"
    if file.exists() and not overwrite:
        raise UserError(f"{file} already exists; choose another destination or overwrite it with --overwrite.")
    features = dict(features or {})
    _check_feature_files(destination, features)
    columns = {role: given for role, given in (("user", user), ("item", item), ("rating", rating)) if given}
    ratings = _select(source, _read(source, header, set(columns.values())), columns, min_rating)
    ratings = _k_core(ratings.drop_duplicates(["user", "item"]), k_core)
    if ratings.empty:
        raise UserError(f"{source}: no user and item has {k_core} interactions; lower --k-core or --min-rating.")
    users, user_names = pd.factorize(ratings["user"], sort=True)
    items, item_names = pd.factorize(ratings["item"], sort=True)
    labels = _split(users, np.random.default_rng(seed))
    table = pd.DataFrame({"userID": users, "itemID": items, "x_label": labels})
    table = table.sort_values(["userID", "x_label", "itemID"], kind="stable")
    contents: dict[Path, pd.DataFrame | np.ndarray] = {
        destination / f"{modality}_feat.npy": _align(Path(array), Path(ids), item_names)
        for modality, (array, ids) in features.items()
    }
    contents[destination / "user_map.tsv"] = _id_map(pd.Index(user_names))
    contents[destination / "item_map.tsv"] = _id_map(pd.Index(item_names))
    contents[file] = table
    try:
        destination.mkdir(parents=True, exist_ok=True)
        _write_all(contents)
    except OSError as error:
        raise UserError(f"{destination} cannot be written ({error.strerror}); choose another destination.") from None
    return Prepared(len(user_names), len(item_names), len(table), file)


def _read(source: Path, header: bool | None, given: set[str]) -> pd.DataFrame:
    """The known and the given columns, as text."""
    suffixes = [s for s in source.suffixes if s != ".gz"]
    kind = suffixes[-1].lower() if suffixes else ""
    if not source.is_file():
        raise UserError(f"{source} does not exist or is no file; give a CSV, TSV or JSON-lines file of ratings.")
    try:
        if kind in (".json", ".jsonl"):
            return _read_json_lines(source, given)
        if kind in (".csv", ".tsv", ".txt", ".inter"):
            return _read_table(source, "," if kind == ".csv" else "\t", header, given)
    except (
        OSError,
        UnicodeDecodeError,
        EOFError,
        zlib.error,
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
    ) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{source} cannot be read ({reason}); check that it is a whole text file.") from None
    raise UserError(f"{source} ends in '{kind}'; choose .csv, .tsv, .txt, .inter, .json or .jsonl, plain or .gz.")


def _wanted(column: str, given: set[str]) -> bool:
    return column in given or any(column.strip().lower() in names for names in _KNOWN.values())


def _read_json_lines(source: Path, given: set[str]) -> pd.DataFrame:
    """Only the columns that matter are kept: reviews bring long texts along. A missing value is an empty text."""
    rows: list[dict[str, str]] = []
    names: dict[str, None] = {}
    opened: Callable[..., Any] = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{source} line {number} is not JSON ({error.msg}); correct or remove it.") from None
            if not isinstance(row, dict):
                raise UserError(f"{source} line {number} is no JSON object; write one object a line.")
            names.update(dict.fromkeys(row))
            rows.append({k: str(v) for k, v in row.items() if isinstance(v, str | int | float) and _wanted(k, given)})
    if not rows:
        raise UserError(f"{source} has no rows; give it ratings.")
    kept = [name for name in names if _wanted(name, given)]
    table = pd.DataFrame({name: [row.get(name, "") for row in rows] for name in kept}, dtype=object)
    table.attrs["columns"] = list(names)
    return table


def _read_table(source: Path, separator: str, header: bool | None, given: set[str]) -> pd.DataFrame:
    """A table with a header, or without one: user, item, rating, timestamp, ..."""

    def read(**options: Any) -> pd.DataFrame:
        return pd.read_csv(source, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", **options)

    first = [str(name) for name in read(header=None, nrows=1).iloc[0]]
    if header is None:
        header = _looks_like_header(source, first, given)
    if not header:
        names = ["user", "item", "rating", "timestamp", *(f"column {n}" for n in range(5, len(first) + 1))]
        return read(header=None, names=names[: len(first)])
    table = read(usecols=lambda name: _wanted(name, given))
    table.attrs["columns"] = first
    if len(table.columns) and not len(table):
        raise UserError(f"{source} has a header and no rows; give it ratings.")
    return table


def _looks_like_header(source: Path, first: list[str], given: set[str]) -> bool:
    if any(_wanted(name, given) for name in first):
        return True
    if pd.to_numeric(pd.Series(first), errors="coerce").notna().any():
        return False
    raise UserError(
        f"{source} line 1 ({', '.join(first)}) has neither a known column name nor a number; "
        "name its columns with --user and --item, or put the line user,item above it where it is data."
    )


def _select(source: Path, table: pd.DataFrame, given: Mapping[str, str], least: float | None) -> pd.DataFrame:
    """The user and item columns of the rows whose rating is high enough."""
    columns = {role: _column(source, table, role, given.get(role)) for role in ("user", "item")}
    chosen = pd.DataFrame({role: table[column].astype(str) for role, column in columns.items()})
    empty = np.flatnonzero((chosen["user"].str.strip() == "") | (chosen["item"].str.strip() == ""))
    if len(empty):
        raise UserError(f"{source}: data row {empty[0] + 1} has an empty user or item; fill or remove it.")
    if least is None and "rating" not in given:
        return chosen
    column = _column(source, table, "rating", given.get("rating"))
    if least is None:
        return chosen
    values = pd.to_numeric(table[column], errors="coerce")
    bad = np.flatnonzero(values.isna())
    if len(bad):
        raise UserError(f"{source}: data row {bad[0] + 1} has {column} {table[column].iloc[bad[0]]!r}, not a number.")
    return chosen[values >= least]


def _column(source: Path, table: pd.DataFrame, role: str, given: str | None) -> str:
    for column in table.columns:
        if column == given or (given is None and column.strip().lower() in _KNOWN[role]):
            return column
    wanted = f"'{given}'" if given else f"that is known to hold the {role}"
    raise UserError(
        f"{source} has no column {wanted}; it has {', '.join(table.attrs.get('columns', table.columns))}: name one with --{role}."
    )


def _k_core(ratings: pd.DataFrame, k: int) -> pd.DataFrame:
    """Remove users and items with fewer than k interactions until none is left."""
    while True:
        enough = (ratings.groupby("user")["item"].transform("size") >= k) & (
            ratings.groupby("item")["user"].transform("size") >= k
        )
        if enough.all():
            return ratings
        ratings = ratings[enough]


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


def _id_map(names: pd.Index[str]) -> pd.DataFrame:
    return pd.DataFrame({"raw": names, "id": np.arange(len(names))})


def _check_feature_files(destination: Path, features: Mapping[str, Any]) -> None:
    """Feature rows follow the item ids of one dataset: none may be left over from another."""
    for modality in features:
        if modality not in MODALITIES:
            raise UserError(f"there are no '{modality}' features; choose among {', '.join(MODALITIES)}.")
    for modality in MODALITIES:
        left_over = destination / f"{modality}_feat.npy"
        if left_over.exists() and modality not in features:
            raise UserError(f"{left_over} follows other item ids; move it away, or give {modality} features as well.")


def _align(array: Path, ids: Path, item_names: Any) -> np.ndarray:
    """The rows of `array`, whose raw item ids stand in `ids`, in the order of `item_names`: (n_items, dim) float32."""
    table = read_features(array, None)
    if table is None:
        raise UserError(f"{array} does not exist; give an .npy file of features.")
    try:
        names = pd.Index(ids.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{ids} cannot be read ({error}); give a text file with one raw item id a line.") from None
    if len(names) != len(table):
        raise UserError(f"{ids} has {len(names)} lines and {array} {len(table)} rows; give one id a row.")
    repeated = np.flatnonzero(names.duplicated())
    if len(repeated):
        line = repeated[0] + 1
        raise UserError(f"{ids} line {line}: item {names[line - 1]!r} stands there twice; keep one of its rows.")
    rows = names.get_indexer(pd.Index(item_names))
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise UserError(
            f"{ids}: item {item_names[missing[0]]!r} has ratings but no row (such items: {len(missing)}); "
            "add a row, e.g. the mean of the others."
        )
    return table[rows]


def _write_all(contents: Mapping[Path, pd.DataFrame | np.ndarray]) -> None:
    """Write every file aside, then put all in place: a failure on the way leaves what was there."""
    aside = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    try:
        for path, content in contents.items():
            if isinstance(content, pd.DataFrame):
                content.to_csv(aside[path], sep="\t", index=False)
            else:
                with aside[path].open("wb") as stream:
                    np.save(stream, content)
        for path, temporary in aside.items():
            os.replace(temporary, path)
    finally:
        for temporary in aside.values():
            temporary.unlink(missing_ok=True)
