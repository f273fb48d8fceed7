"""Text tables, one row per line: every field in its own column, every row counted, no row lost in silence.

Tables separated by commas, semicolons or the like may quote fields as spreadsheets do. Tables separated by tabs do not:
a quotation mark in them is text.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd

from mgrad_jax.data.filetypes import beginning, foreign
from mgrad_jax.errors import UserError, shown

_BLOCK = 1 << 24  # characters read at a time
# Stands for a separator of several characters, or of one that is not ASCII; itself it is refused in text.
_STAND_IN = "\x1f"
# UTF-32 before UTF-16: its mark begins with that of the other.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars", "::": "double colons", " ": "spaces"}


@dataclass(frozen=True)
class Form:
    """How a table is written.

    Attributes:
        separator: of the fields.
        encoding: of the text; a byte order mark is skipped.
    """

    separator: str = "\t"
    encoding: str = "utf-8"

    @property
    def quoted(self) -> bool:
        """Whether a field in quotation marks may hold separators and line breaks."""
        return self.separator not in ("\t", "::", " ")

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError):
            raise UserError(
                f"encoding {shown(self.encoding)} is unknown; give e.g. utf-8, utf-16 or latin-1."
            ) from None
        if not self.separator or any(c in '\n\r"\0' for c in self.separator) or len(self.separator) > 8:
            raise UserError(f"separator {shown(self.separator)} does not fit; give e.g. ',', ';', '|', '::' or 'tab'.")


@contextlib.contextmanager
def opened(file: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """A text file, plain or `.gz`, with every line break as `\\n`.

    Raises:
        UserError: also inside the block: it cannot be read, is something else than text, or in another encoding.
    """
    try:
        with _binary(file) as stream:
            start = stream.peek(512)[:512]
            _check_start(file, start, encoding)
            yield io.TextIOWrapper(stream, encoding=_without_mark(start, encoding))
    except UnicodeError as error:
        reason = shown(error.reason if isinstance(error, UnicodeDecodeError) else str(error))[1:-1]
        raise UserError(
            f"{file} cannot be read as {encoding} text ({reason}); save it as UTF-8, or give its own encoding to "
            "`mgrad-jax prepare` with --encoding, e.g. latin-1."
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        start = beginning(file)
        if start and not start.startswith(b"\x1f\x8b"):
            what, remedy = foreign(start) or ("plain", "rename it without .gz")
            raise UserError(f"{file} is {what}, not compressed by gzip as its name says; {remedy}.") from None
        raise UserError(f"{file} cannot be read as gzip ({error}); it is damaged or cut off: get it again.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check it and its permissions.") from None


def _binary(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _marked(start: bytes) -> str | None:
    """The encoding whose byte order mark a file begins with."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), None)


def _without_mark(start: bytes, encoding: str) -> str:
    """The encoding's name under which Python skips the mark: it would be part of the first field otherwise."""
    marked = _marked(start)
    return {None: encoding, "utf-8": "utf-8-sig"}.get(marked, str(marked))


def _check_start(file: Path, start: bytes, encoding: str) -> None:
    """Refuse what is no text table, and text in another encoding than the one given, by the first bytes."""
    found = foreign(start)
    if found is not None:
        raise UserError(f"{file} is {found[0]}, not a text table; {found[1]}.")
    given, marked = codecs.lookup(encoding).name, _marked(start)
    if marked is None and given.startswith("utf-8") and b"\0\0" in (start[:4:2], start[1:4:2]):
        marked = "utf-16"
    if marked is not None and not given.startswith(marked):
        raise UserError(
            f"{file} cannot be read as {encoding.upper()} text: it looks like {marked.upper()}; save it as UTF-8, e.g. "
            f"with `iconv -f {marked.upper()} -t UTF-8`, or give --encoding {marked} to `mgrad-jax prepare`."
        )


def records(file: Path, form: Form) -> Iterator[tuple[int, list[str]]]:
    """The line number (of its first line, from 1) and the fields of every row that is not blank.

    Raises:
        UserError: as `opened`; NUL characters; quotation marks that do not match.
    """
    with opened(file, form.encoding) as stream:
        lines = _checked(file, stream)
        if not form.quoted:
            for number, line in enumerate(lines, 1):
                if line.strip(" \n"):
                    yield number, line.rstrip("\n").split(form.separator)
            return
        replaced = len(form.separator) > 1 or not form.separator.isascii()
        separator = _STAND_IN if replaced else form.separator
        reader = csv.reader(
            (line.replace(form.separator, separator) for line in lines), delimiter=separator, strict=True
        )
        start = 1
        try:
            for fields in reader:
                if len(fields) > 1 or (fields and fields[0].strip(" ")):
                    yield start, fields
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{file} line {start}: the quotation marks do not match ({error}); write a mark inside of a field as "
                '"" '
                "and none elsewhere."
            ) from None


def _checked(file: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line or _STAND_IN in line:
            raise UserError(f"{file} line {number} holds a NUL or control character, as text does not; mend the line.")
        yield line


def first_row(file: Path, form: Form) -> tuple[int, list[str]] | None:
    """Line number and fields of the first row that is not blank; None in a file without any."""
    rows = records(file, form)
    try:
        return next(rows, None)
    finally:
        rows.close()  # type: ignore[attr-defined]


def line_of(file: Path, form: Form, row: int, skipped: int) -> int:
    """The line number of a row, counted from 0 after the `skipped` first ones; for messages."""
    for position, (number, _) in enumerate(records(file, form)):
        if position == row + skipped:
            return number
    return 0


def read_columns(
    file: Path, form: Form, n_fields: int, columns: Sequence[int], skipped: int, dtype: type = str
) -> list[np.ndarray] | None:
    """Some columns of all rows; blank lines are no rows.

    Args:
        file, form: what to read, and how it is written.
        n_fields: fields that every row has.
        columns: positions of the columns, ascending.
        skipped: rows to leave out at the top, 1 for a header.
        dtype: `str`, or `np.int64`.

    Returns:
        One array per column, of `str` objects or int64; None where int64 was asked for and some field is none.

    Raises:
        UserError: a row with more or fewer fields, by its line; and as `records`.
    """
    parts: list[pd.DataFrame] = []
    with opened(file, form.encoding) as stream:
        for number, block in enumerate(_blocks(stream)):
            data = block.encode()
            if not _plain(data, form, n_fields):
                return _by_record(file, form, n_fields, columns, skipped, dtype)
            for _ in range(skipped if number == 0 else 0):
                data = data[data.index(b"\n") + 1 :]
            part = _parsed(data, form, n_fields, columns, dtype) if data else None
            if data and part is None:
                return None
            parts += [] if part is None else [part]
    if not parts:
        return [np.empty(0, object if dtype is str else dtype) for _ in columns]
    return [np.concatenate([part[column].to_numpy() for part in parts]) for column in columns]


def _blocks(stream: TextIO) -> Iterator[str]:
    """The text in pieces of whole lines, each with a line break at its end."""
    rest = ""
    while text := stream.read(_BLOCK):
        text = rest + text
        end = text.rfind("\n") + 1
        rest = text[end:]
        if end:
            yield text[:end]
    if rest:
        yield rest + "\n"


def _plain(data: bytes, form: Form, n_fields: int) -> bool:
    """Whether every line has its fields, and none is blank, quoted or odd: then a fast parser may read it."""
    if len(form.separator.encode()) > 1 or b"\0" in data or _STAND_IN.encode() in data or n_fields < 2:
        return False
    if form.quoted and b'"' in data:
        return False
    codes = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(codes[_marks(codes, form)] == ord("\n"))
    return bool((np.diff(ends, prepend=-1) == n_fields).all())


def _marks(codes: np.ndarray, form: Form) -> np.ndarray:
    """Where the fields end."""
    return np.flatnonzero((codes == ord("\n")) | (codes == ord(form.separator)))


def _parsed(data: bytes, form: Form, n_fields: int, columns: Sequence[int], dtype: type) -> pd.DataFrame | None:
    """The columns of a plain block; None where int64 was asked for and some field is more than digits."""
    options: dict[str, Any] = {"dtype": object if dtype is str else dtype, "usecols": list(columns)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of numbers that do not fit
            table = pd.read_csv(
                io.BytesIO(data),
                sep=form.separator,
                header=None,
                names=range(n_fields),
                index_col=False,
                skip_blank_lines=False,
                na_filter=False,
                quoting=csv.QUOTE_NONE,
                encoding="utf-8",
                low_memory=False,
                **options,
            )
    except (ValueError, OverflowError, RuntimeWarning):
        if dtype is str:
            raise
        return None
    return table if dtype is str or _digits_only(data, form, n_fields, columns, table) else None


def _digits_only(data: bytes, form: Form, n_fields: int, columns: Sequence[int], table: pd.DataFrame) -> bool:
    """Whether the numbers are as long as their fields: pandas would round 3.0000000000000001, too."""
    ends = _marks(np.frombuffer(data, np.uint8), form)
    lengths = np.diff(ends, prepend=-1).reshape(-1, n_fields) - 1
    powers = 10 ** np.arange(1, 19)
    for column in columns:
        numbers = table[column].to_numpy()
        if (numbers < 0).any() or (np.searchsorted(powers, numbers, side="right") + 1 != lengths[:, column]).any():
            return False
    return True


def _by_record(
    file: Path, form: Form, n_fields: int, columns: Sequence[int], skipped: int, dtype: type
) -> list[np.ndarray] | None:
    """Row by row, for what the fast parser cannot read: blank lines, quotes, long separators, and faults."""
    found: list[list[str]] = [[] for _ in columns]
    ragged: list[tuple[int, list[str]]] = []
    n_rows = n_ragged = 0
    for position, (number, fields) in enumerate(records(file, form)):
        if position < skipped:
            continue
        n_rows += 1
        if len(fields) != n_fields:
            n_ragged += 1
            ragged = ragged or [(number, fields)]
        elif not ragged:
            for values, column in zip(found, columns, strict=True):
                values.append(fields[column])
    if ragged:
        raise _ragged(file, form, *ragged[0], n_fields, n_ragged, n_rows, bool(skipped))
    arrays = [np.array(values, dtype=object) for values in found]
    if dtype is str:
        return arrays
    try:
        return [array.astype(np.int64) for array in arrays]
    except (ValueError, OverflowError):
        return None


def _ragged(
    file: Path, form: Form, line: int, fields: list[str], expected: int, count: int, n_rows: int, header: bool
) -> UserError:
    """The sentence for rows that do not have their fields, with the cause that fits."""
    top = "header" if header else "first row"
    if len(fields) == expected + 1 and not fields[-1].strip():
        remedy = "remove the separator at the end of the rows"
    elif len(fields) == 1:
        remedy = f"separate its fields by {named(form.separator)}"
    elif count == n_rows and len(fields) > expected and header:
        remedy = "name every column in the header"
    elif len(fields) > expected:
        remedy = "a line break may be lost or a separator stand inside of a field: correct the line"
    else:
        remedy = "fields are missing: complete or remove the line"
    return UserError(
        f"{file} line {line} has {len(fields)} fields and the {top} {expected} (such lines: {count} of {n_rows}); "
        f"{remedy}."
    )


def named(separator: str) -> str:
    """A separator in words."""
    return _SEPARATORS.get(separator, shown(separator))


def other_separator(line: str, separator: str) -> str | None:
    """What seems to separate a line's fields where `separator` does not occur in it."""
    if separator in line:
        return None
    counts = {other: line.count(other) for other in _SEPARATORS if other not in (separator, " ")}
    counts["::"] *= 2
    best = max(counts, key=lambda other: counts[other])
    if counts[best]:
        return best
    return " " if " " in line.strip() and separator != " " else None


def few(values: Sequence[object], most: int = 6) -> str:
    """The first of some names, cut to length, and how many there are."""
    listed = ", ".join(shown(str(value), 30)[1:-1] for value in values[:most])
    return listed if len(values) <= most else f"{listed}, ... ({len(values)} in all)"
