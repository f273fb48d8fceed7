"""Tables of item features: read from plain `.npy` files, and checked however they come."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mgrad_jax.data.filetypes import beginning, foreign
from mgrad_jax.errors import UserError, shown

MODALITIES = ("image", "text")
# A table of at least so many bytes is left in its file and read from there, by whoever needs which part of it. Smaller
# ones are read at once, and are safe from whatever becomes of the file.
MAPPED = 1 << 30


def read_features(file: Path, n_rows: int | None, *, check_mapped: bool = True) -> np.ndarray | None:
    """One feature table as float32, or None where there is no file; a large one of that type stays in its file.

    Args:
        file: an `.npy` file of numbers, (rows, dim); objects are never unpickled.
        n_rows: how many rows there must be, one per item; None where any number will do.
        check_mapped: whether to read what stays in its file in search of NaN and infinity; `Interactions` does so too.

    Raises:
        UserError: a damaged file, something else than an array, another shape or type, NaN or infinity.
    """
    if not file.exists() and not file.is_symlink():  # a link to nowhere is a file that was not fetched
        return None
    try:
        start = beginning(file)
        if not start.startswith(b"\x93NUMPY"):
            raise _no_array(file, start)
        with file.open("rb") as stream:
            table = _read_array(file, stream)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check its permissions.") from None
    except MemoryError:
        raise UserError(f"{file} does not fit into memory; use a machine with more, or fewer columns.") from None
    check_shape(str(file), table, n_rows)
    with np.errstate(over="ignore", invalid="ignore"):
        table = np.ascontiguousarray(table, dtype=np.float32)
    if check_mapped or not is_mapped(table):
        check_finite(str(file), table)
    return table


def is_mapped(table: np.ndarray) -> bool:
    """Whether a table, or what it is a view of, stays in its file."""
    return isinstance(table, np.memmap) or (isinstance(table.base, np.ndarray) and is_mapped(table.base))


def check_shape(where: str, table: Any, n_rows: int | None) -> None:
    """Refuse what is no (n_rows, dim) array of numbers.

    Args:
        where: the file, or the place in memory, for the message.
        table: anything.
        n_rows: as in `read_features`.
    """
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind not in "fiu":
        shape, dtype = getattr(table, "shape", type(table).__name__), getattr(table, "dtype", "?")
        raise UserError(f"{where} has shape {shown(shape)} and type {dtype}; give (items, dim) numbers.")
    if not table.shape[1]:
        raise UserError(f"{where} has no columns; give (items, dim) numbers.")
    if n_rows is not None and len(table) != n_rows:
        raise UserError(f"{where} has {len(table)} rows and the dataset {n_rows} items; give one row per item.")


def check_finite(where: str, table: np.ndarray) -> None:
    """Refuse NaN and infinity, and name the first."""
    if looks_finite(table):
        return
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(bad):
        column = int(np.flatnonzero(~np.isfinite(table[bad[0]]))[0])
        raise UserError(
            f"{where}: row {bad[0]}, column {column} is NaN or infinite (such rows: {len(bad)}); "
            "fill it, e.g. with the column's mean."
        )


def looks_finite(table: np.ndarray) -> bool:
    """Whether numbers, of any shape, are finite for sure; some that are do not look so."""
    # One product instead of a look at every number: a fifth of the time, and finite only where all are.
    flat = table.reshape(-1)
    return table.dtype.kind != "f" or (table.dtype.itemsize >= 4 and bool(np.isfinite(_square(flat))))


def zero_rows(table: np.ndarray) -> np.ndarray:
    """The rows that are zero throughout: items without a feature."""
    # Most rows show in their first columns that they are not.
    suspects = np.flatnonzero(~table[:, :8].any(axis=1))
    return suspects[~table[suspects].any(axis=1)]


def fill_zero_rows(table: np.ndarray) -> np.ndarray:
    """A copy in which items without a feature have the mean of those with one."""
    empty = zero_rows(table)
    filled = table.copy()
    if 0 < len(empty) < len(table):
        filled[empty] = np.delete(table, empty, axis=0).mean(axis=0, dtype=np.float64)
    return filled


def rows_shown(rows: np.ndarray, most: int = 5) -> str:
    """Row numbers as a message shows them: "row 3" or "3 rows (0, 4, 7)", the first few where they are many."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    few = ", ".join(str(row) for row in rows[:most])
    return f"{len(rows)} rows ({few}{', ...' if len(rows) > most else ''})"


def _square(flat: np.ndarray) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.dot(flat, flat)


def _no_array(file: Path, start: bytes) -> UserError:
    found = foreign(start)
    if found is None:
        return _damaged(file, "it is empty" if not start else "it does not begin like one")
    return UserError(f"{file} is damaged or not a plain .npy array: it is {found[0]}; {found[1]}.")


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged or not a plain .npy array ({reason}); write it with numpy.save.")


def _read_array(file: Path, stream: BinaryIO) -> np.ndarray:
    """The array; shape, type and size of the file are compared before any memory is asked for."""
    shape, fortran, dtype = read_header(file, stream)
    if dtype.kind not in "fiu" or len(shape) != 2:
        if dtype.hasobject:
            raise _damaged(file, "it holds Python objects, which are not read")
        raise UserError(
            f"{file} has shape {shown(shape)} and type {shown(str(dtype))[1:-1]}; give (items, dim) numbers."
        )
    expected, found = shape[0] * shape[1] * dtype.itemsize, os.fstat(stream.fileno()).st_size - stream.tell()
    if found != expected:
        raise _damaged(file, f"its header promises {shown(expected)} bytes and {found} follow")
    if expected >= MAPPED and dtype == np.float32 and not fortran:
        return np.memmap(stream, dtype, "r", stream.tell(), shape)
    flat = np.fromfile(stream, dtype, shape[0] * shape[1])
    return flat.reshape(shape, order="F" if fortran else "C")


def read_header(file: Path, stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and type that an `.npy` file states.

    Raises:
        UserError: the header is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
            else:
                raise ValueError(version)
    except OSError:
        raise
    except Exception:  # whatever NumPy's parser makes of damaged text
        raise _damaged(file, "its header cannot be read") from None
    if any(type(size) is not int or size < 0 for size in shape) or type(fortran) is not bool:
        raise _damaged(file, f"its header states the shape {shown(shape)}")
    return shape, fortran, dtype
