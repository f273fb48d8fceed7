"""From raw ratings to a dataset in MMRec format: k-core filter, per-user split, new ids."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

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
        user, item, rating: columns; found by common names by default. A CSV without a header has them in this order.
        min_rating: leave lower ratings out.
        k_core: fewest interactions of every user and item; at least 3 are needed for a split.
        seed: of the shuffle.
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
    ratings = _select(source, _read(source), user, item, rating, min_rating)
    ratings = _k_core(ratings.drop_duplicates(["user", "item"]), k_core)
    if ratings.empty:
        raise UserError(f"{source}: no user and item has {k_core} interactions; lower --k-core or --min-rating.")
    users, user_names = pd.factorize(ratings["user"], sort=True)
    items, item_names = pd.factorize(ratings["item"], sort=True)
    labels = _split(users, np.random.default_rng(seed))
    table = pd.DataFrame({"userID": users, "itemID": items, "x_label": labels})
    table = table.sort_values(["userID", "x_label", "itemID"], kind="stable")
    try:
        destination.mkdir(parents=True, exist_ok=True)
        for path, content in (
            (destination / "user_map.tsv", _id_map(pd.Index(user_names))),
            (destination / "item_map.tsv", _id_map(pd.Index(item_names))),
            (file, table),
        ):
            _write(path, content)
    except OSError as error:
        raise UserError(f"{destination} cannot be written ({error.strerror}); choose another destination.") from None
    return Prepared(len(user_names), len(item_names), len(table), file)


def _read(source: Path) -> pd.DataFrame:
    suffixes = [s for s in source.suffixes if s != ".gz"]
    kind = suffixes[-1].lower() if suffixes else ""
    if not source.is_file():
        raise UserError(f"{source} does not exist or is no file; give a CSV, TSV or JSON-lines file of ratings.")
    try:
        if kind in (".json", ".jsonl"):
            return _read_json_lines(source)
        if kind in (".csv", ".tsv", ".txt", ".inter"):
            return _read_table(source, "," if kind == ".csv" else "\t")
    except (OSError, UnicodeDecodeError, EOFError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{source} cannot be read ({reason}); check that it is a whole text file.") from None
    raise UserError(f"{source} ends in '{kind}'; choose .csv, .tsv, .txt, .inter, .json or .jsonl, plain or .gz.")


def _read_json_lines(source: Path) -> pd.DataFrame:
    rows = []
    with gzip.open(source, "rt") if source.suffix == ".gz" else source.open() as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{source} line {number} is not JSON ({error.msg}); correct or remove it.") from None
            if not isinstance(row, dict):
                raise UserError(f"{source} line {number} is no JSON object; write one object a line.")
            rows.append({key: value for key, value in row.items() if isinstance(value, str | int | float)})
    return pd.DataFrame(rows)


def _read_table(source: Path, separator: str) -> pd.DataFrame:
    """A table with a header, or, where no column has a known name, without one: user, item, rating, ..."""
    table = pd.read_csv(source, sep=separator, dtype=str, keep_default_na=False)
    known = {name for names in _KNOWN.values() for name in names}
    if any(column.strip().lower() in known for column in table.columns):
        return table
    bare = pd.read_csv(source, sep=separator, dtype=str, keep_default_na=False, header=None)
    return bare.rename(columns=dict(enumerate(("user", "item", "rating")))).rename(columns=str)


def _select(
    source: Path, table: pd.DataFrame, user: str | None, item: str | None, rating: str | None, least: float | None
) -> pd.DataFrame:
    """The user and item columns of the rows whose rating is high enough."""
    columns = {"user": _column(source, table, "user", user), "item": _column(source, table, "item", item)}
    chosen = pd.DataFrame({role: table[column].astype(str) for role, column in columns.items()})
    empty = np.flatnonzero((chosen["user"].str.strip() == "") | (chosen["item"].str.strip() == ""))
    if len(empty):
        raise UserError(f"{source}: data row {empty[0] + 1} has an empty user or item; fill or remove it.")
    if least is None:
        return chosen
    column = _column(source, table, "rating", rating)
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
    raise UserError(f"{source} has no column {wanted}; it has {', '.join(table.columns)}: name one with --{role}.")


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


def _write(path: Path, table: pd.DataFrame) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    table.to_csv(temporary, sep="\t", index=False)
    os.replace(temporary, path)
