"""The maps from raw ids to ids, `user_map.tsv` and `item_map.tsv`, that `prepare` writes beside a dataset."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mgrad_jax.errors import UserError, shown

if TYPE_CHECKING:
    import pandas as pd

    from mgrad_jax.data.interactions import Interactions

_HEADER = ["raw", "id"]


def id_map_file(directory: str | os.PathLike[str], kind: str) -> Path:
    """Where the map of the users ("user") or the items ("item") of a dataset stands: beside its `.inter` file."""
    place = Path(directory)
    return (place.parent if place.suffix == ".inter" and place.is_file() else place) / f"{kind}_map.tsv"


def write_id_map(file: Path, names: Sequence[str] | np.ndarray) -> None:
    """Write the raw names, in the order of their ids; a name that holds a quotation mark is put in quotes."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(_HEADER)
        writer.writerows((name, number) for number, name in enumerate(names))


def read_id_map(directory: str | os.PathLike[str], kind: str, n: int | None = None) -> np.ndarray | None:
    """The raw names of a dataset's users or items, in the order of their ids.

    Args:
        directory: of the dataset, or its `.inter` file.
        kind: "user" or "item".
        n: how many there must be; None where any number will do.

    Returns:
        (n,) array of distinct `str`, dtype object; None where the dataset has no such file.

    Raises:
        UserError: the file cannot be read, or is not a map of every id from 0 on to a name of its own.
    """
    file = id_map_file(directory, kind)
    if not file.is_file():
        return None
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream, delimiter="\t", strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _damaged(file, f"it cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not rows or rows[0] != _HEADER:
        raise _damaged(file, f"its header is {shown(rows[0] if rows else [])}, not raw and id")
    for number, row in enumerate(rows[1:]):
        if len(row) != 2 or row[1] != str(number):
            raise _damaged(file, f"row {number + 1} is {shown(row)}, not a name and the id {number}")
    names = [row[0] for row in rows[1:]]
    if len(set(names)) < len(names):
        raise _damaged(file, "a name stands there twice")
    if n is not None and len(names) != n:
        raise _damaged(file, f"it has {len(names)} {kind}s and the dataset {n}")
    return np.array(names, dtype=object)


def raw_ids(data: Interactions, kinds: Sequence[str] = ("user", "item")) -> dict[str, np.ndarray]:
    """The raw names of loaded data's users ("user") and items ("item"), of those that `prepare` left the maps of.

    Args:
        data: whose `source` is the directory.
        kinds: which maps to read.

    Raises:
        UserError: as `read_id_map`.
    """
    if data.source == "demo":  # which is no directory, whatever else has the name
        return {}
    sizes = {"user": data.n_users, "item": data.n_items}
    found = {kind: read_id_map(data.source, kind, sizes[kind]) for kind in kinds}
    return {kind: names for kind, names in found.items() if names is not None}


def in_raw_ids(table: pd.DataFrame, names: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """A table with names from `raw_ids` in place of the ids in its columns "user" and "item"."""
    return table.assign(**{kind: known[table[kind]] for kind, known in names.items() if kind in table})


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is no map of raw ids: {reason}; write the dataset again with `mgrad-jax prepare`.")
