"""Raw rating files, tables and JSON lines: which column is what is found, never guessed in silence, and told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mgrad_jax.data.mmrec import check_names, role_of
from mgrad_jax.data.tables import Form, few, first_row, line_of, named, opened, other_separator, read_columns, records
from mgrad_jax.errors import UserError, shown

# Names under which the columns go in common rating files, Amazon's reviews among them.
KNOWN = {
    "user": ("user", "userid", "user_id", "reviewerid", "uid"),
    "item": ("item", "itemid", "item_id", "asin", "parent_asin", "movieid", "iid"),
    "rating": ("rating", "overall", "score", "stars"),
    "label": ("x_label",),
    "time": ("timestamp", "time", "unixreviewtime"),
}
_POSITIONS = ("user", "item", "rating", "timestamp")
_SAMPLE = 1000  # rows looked at to tell the order of columns without names
_ASIN = re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")
_REVIEWER = re.compile(r"A[0-9A-Z]{11,}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Source:
    """A raw file and how it is read.

    Attributes:
        file: `.csv`, `.tsv`, `.txt`, `.inter`, `.json` or `.jsonl`, plain or `.gz`; any other with a separator.
        separator: of a table; by the file's name where None.
        encoding: of the text.
        header: whether a table has a header line; by its looks where None.
        columns: what the columns of a table hold, in order, e.g. ("item", "user", "rating"); None: as its header says.
        given: role -> name of the column, for roles that are not found by name.
    """

    file: Path
    separator: str | None = None
    encoding: str = "utf-8"
    header: bool | None = None
    columns: Sequence[str] | None = None
    given: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratings:
    """The rows of a raw file.

    Attributes:
        values: role -> (n,) `str` objects; "user" and "item" always, "rating", "label" and "time" where there are such
            columns.
        columns: role -> the column that was taken, in words.
        line: the line number of a row counted from 0.
    """

    values: Mapping[str, np.ndarray]
    columns: Mapping[str, str]
    line: Callable[[int], int]

    def __len__(self) -> int:
        return len(self.values["user"])


def read_ratings(source: Source) -> Ratings:
    """Users, items and what else is known of every row of a raw file.

    Raises:
        UserError: the file cannot be read; a row with more or fewer fields than the others; columns that are missing or
            not to be told apart; an id that is empty or no printable text. One sentence with file, line and remedy.
    """
    file = source.file
    if not file.is_file():
        raise UserError(f"{file} does not exist or is no file; give a CSV, TSV or JSON-lines file of ratings.")
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    separator = source.separator or {".csv": ",", ".tsv": "\t", ".txt": "\t", ".inter": "\t"}.get(kind)
    if kind in (".json", ".jsonl") and source.separator is None:
        if source.columns is not None or source.header is not None:
            raise UserError(
                f"{file} is no table but JSON lines, whose keys are names; leave --columns and --header out."
            )
        ratings = _read_json_lines(source)
    elif separator is not None:
        ratings = _read_table(source, Form(separator, source.encoding))
    else:
        raise UserError(
            f"{file} ends in '{kind}'; choose .csv, .tsv, .txt, .inter, .json or .jsonl, plain or .gz, "
            "or give the separator of its columns with --separator."
        )
    for role in ("user", "item"):
        _check_ids(file, role, ratings)
    return ratings


def refuse_rows(file: Path, ratings: Ratings, bad: np.ndarray, complaint: str, remedy: str) -> None:
    """Raise the sentence for rows that are at fault, if any is: the first by its line, and how many there are."""
    if len(bad):
        more = f" (such rows: {len(bad)})" if len(bad) > 1 else ""
        place = f"{file} line {ratings.line(int(bad[0]))}: data row {bad[0] + 1}"
        raise UserError(f"{place} {complaint}{more}; {remedy}.")


def _check_ids(file: Path, role: str, ratings: Ratings) -> None:
    """Ids must survive being written to a map, one a line, and read again."""
    codes, names = pd.factorize(ratings.values[role])
    empty = np.array([not name.strip() for name in names], dtype=bool)
    refuse_rows(file, ratings, np.flatnonzero(empty[codes]), "has an empty user or item", "fill or remove it")
    odd = np.array([_CONTROL.search(name) is not None or not _encodable(name) for name in names], dtype=bool)
    bad = np.flatnonzero(odd[codes])
    if len(bad):
        value = shown(str(ratings.values[role][bad[0]]).encode("utf-8", "replace").decode())
        complaint = f"has the {role} {value}, with a line break, tab or other control character in it"
        refuse_rows(file, ratings, bad, complaint, "correct it")


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# Tables


def _read_table(source: Source, form: Form) -> Ratings:
    file = source.file
    top = first_row(file, form)
    if top is None:
        raise UserError(f"{file} cannot be read: it is empty; give it ratings.")
    line, first = top
    if len(first) == 1 and (other := other_separator(first[0], form.separator)) is not None:
        raise UserError(
            f"{file} line {line} holds no field separated by {named(form.separator)}, but {named(other)}; "
            f"add --separator {shown(other)}."
        )
    header = _has_header(source, form, line, first)
    if source.columns is not None:
        names, how = _named_columns(source, first, header), "as --columns says"
    elif header:
        check_names(file, first)
        names, how = [name.strip() for name in first], ""
    else:
        names, how = _layout(file, form, first)
    positions = _find(source, names)
    ordered = sorted(positions.values())
    table = read_columns(file, form, len(first), ordered, int(header))
    assert table is not None  # as text every table can be read
    if header and not len(table[0]):
        raise UserError(f"{file} has a header and no rows; give it ratings.")
    told = {
        role: f"column {position + 1}" + (f" ({how})" if how else f", {shown(names[position], 40)}")
        for role, position in positions.items()
    }
    values = {role: table[ordered.index(position)] for role, position in positions.items()}
    ratings = Ratings(values, told, lambda row: line_of(file, form, row, int(header)))
    if not form.quoted:
        _check_quotes(file, ratings)
    return ratings


def _check_quotes(file: Path, ratings: Ratings) -> None:
    """Tab-separated tables have no quoting; where a number or id seems quoted nevertheless, both readings are wrong."""
    for role, values in ratings.values.items():
        bad = np.flatnonzero([value.startswith('"') for value in values])
        refuse_rows(
            file,
            ratings,
            bad,
            f"has the {role} {shown(str(values[bad[0]]), 30) if len(bad) else ''}; such a table has no quoting",
            "remove the quotation marks, or save it as CSV",
        )


def _has_header(source: Source, form: Form, line: int, first: list[str]) -> bool:
    names = [name.strip() for name in first]
    if source.header is not None:
        return source.header
    if any(role_of(name, KNOWN) or name in source.given.values() for name in names):
        return True
    if pd.to_numeric(pd.Series(names), errors="coerce").notna().any():
        return False
    if source.columns is not None:
        later = (column[1:] for column in _sample(source.file, form, len(first)))
        if any(column and pd.to_numeric(pd.Series(column), errors="coerce").notna().all() for column in later):
            raise UserError(
                f"{source.file} line {line} ({few(names)}) holds no number and the lines below do; say with --header "
                "that it names the columns, or with --no-header that it is data."
            )
        return False
    raise UserError(
        f"{source.file} line {line} ({few(names)}) has neither a known column name nor a number; name its columns with "
        "--user and --item, or put the line user,item above it where it is data."
    )


def _named_columns(source: Source, first: list[str], header: bool) -> list[str]:
    """The names given by hand, which no name in a header may contradict."""
    assert source.columns is not None
    names = [name.strip() for name in source.columns]
    if len(names) != len(first):
        raise UserError(
            f"{source.file} has {len(first)} columns and --columns names {len(names)}; name each, e.g. '-' for others."
        )
    kept = [name for name in names if name and name != "-"]
    if len(set(kept)) < len(kept):
        raise UserError(f"--columns names a column twice ({few(names)}); name each once.")
    unknown = [name for name in kept if role_of(name, KNOWN) is None and name not in source.given.values()]
    if unknown:
        raise UserError(
            f"--columns calls a column {shown(unknown[0], 30)}, which is not known; choose among user, item, rating, "
            "timestamp and x_label, or '-' for others."
        )
    for name, there in zip(names, first if header else [], strict=False):
        roles = role_of(name, KNOWN), role_of(there, KNOWN)
        if None not in roles and roles[0] != roles[1]:
            raise UserError(
                f"{source.file}: --columns calls a column {shown(name, 30)} that the header calls {shown(there, 30)}; "
                "leave --columns out, or rename the column in the file."
            )
    return names


def _layout(file: Path, form: Form, first: list[str]) -> tuple[list[str], str]:
    """Names for the columns of a table without a header, and why."""
    if len(first) < 2:
        raise UserError(f"{file} has one column; give users and items, separated by {named(form.separator)}.")
    names = [*_POSITIONS, *(f"column {n}" for n in range(5, len(first) + 1))][: len(first)]
    columns = _sample(file, form, len(first))
    if not columns[0]:
        return names, "by position, for there is no header"
    if all(map(_ASIN.fullmatch, columns[0])) and all(map(_REVIEWER.fullmatch, columns[1])):
        return ["item", "user", *names[2:]], "by its looks, an Amazon table without a header that begins with the item"
    odd = _out_of_place(columns)
    if odd is not None:
        raise UserError(
            f"{file} has no header, and its column {odd + 1} looks like no id; say what the columns are, "
            "e.g. with --columns user,item,rating,timestamp in their order."
        )
    return names, "by position, for there is no header"


def _sample(file: Path, form: Form, n_fields: int) -> list[list[str]]:
    """The first fields of every column."""
    rows = records(file, form)
    sample = [fields for _, (_, fields) in zip(range(_SAMPLE), rows, strict=False) if len(fields) == n_fields]
    rows.close()  # type: ignore[attr-defined]
    return [list(column) for column in zip(*sample, strict=True)] if sample else [[] for _ in range(n_fields)]


def _out_of_place(columns: list[list[str]]) -> int | None:
    """The first of the columns for users and items that holds ratings or times, where a later one holds ids."""
    kinds = [_kind(column) for column in columns]
    for position in (0, 1):
        late = kinds[position] == "time" and "time" not in kinds[2:]
        if late or (kinds[position] == "rating" and len(kinds) > 2 and kinds[2] == "id"):
            return position
    return None


def _kind(column: list[str]) -> str:
    numbers = pd.to_numeric(pd.Series(column), errors="coerce")
    if numbers.isna().any():
        return "id"
    if numbers.between(5e8, 2e13).all() and not any(field.startswith("0") for field in column):
        return "time"
    few_values = numbers.nunique() <= 10 < len(column) and numbers.between(0, 10).all()
    return "rating" if few_values else "id"


def _find(source: Source, names: Sequence[str]) -> dict[str, int]:
    """Where the columns stand, by the names that were given or are known."""
    found = {}
    for role in KNOWN:
        given = source.given.get(role)
        if given is not None:
            hits = [position for position, name in enumerate(names) if name == given.strip()]
        else:
            hits = [position for position, name in enumerate(names) if role_of(name, KNOWN) == role]
        needed = role in ("user", "item") or given is not None
        if len(hits) > 1 and role != "time":
            both = " and ".join(shown(names[position], 30) for position in hits[:2])
            remedy = f"name one with --{role}" if role != "label" else "rename one of the columns"
            raise UserError(f"{source.file}: {both} may both hold the {role}s; {remedy}.")
        if needed and not hits:
            wanted = shown(given) if given is not None else f"that is known to hold the {role}"
            raise UserError(f"{source.file} has no column {wanted}; it has {few(names)}: name one with --{role}.")
        if hits:
            found[role] = hits[0]
    if len(set(found.values())) < len(found):
        raise UserError(
            f"{source.file}: one column is to be two things; give --user, --item and --rating different ones."
        )
    return found


# JSON lines


def _read_json_lines(source: Source) -> Ratings:
    """One object a line. Only the columns that matter are kept: reviews bring long texts along."""
    file = source.file
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    names: dict[str, None] = {}
    faults: list[str] = []
    with opened(file, source.encoding) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = _json_object(line, first=not rows and not faults)
            except _NotAnObject as error:
                faults.append(f"{file} line {number} {error}")
                if str(error) in (_ARRAY, _ONE_A_LINE) and len(faults) == 1 and not rows:
                    break  # every line follows from the first
                continue
            names.update(dict.fromkeys(row))
            rows.append({name: value for name, value in row.items() if _wanted(name, source)})
            lines.append(number)
    if faults:
        what, _, remedy = faults[0].partition(";")
        raise UserError(f"{what}{f' (such lines: {len(faults)})' if len(faults) > 1 else ''};{remedy}.")
    if not rows:
        raise UserError(f"{file} has no rows; give it ratings.")
    known = list(names)
    positions = _find(source, known)
    values = {}
    for role, position in positions.items():
        values[role] = np.array([_text(row.get(known[position])) for row in rows], dtype=object)
    told = {role: f"the key {shown(known[position], 40)}" for role, position in positions.items()}
    return Ratings(values, told, lambda row: lines[row])


class _NotAnObject(Exception):
    """What is wrong with a line, and what to do."""


def _json_object(line: str, first: bool) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_distinct)
    except _NotAnObject:
        raise
    except RecursionError:
        raise _NotAnObject("is nested too deeply; correct or remove it") from None
    except ValueError as error:  # faulty JSON, or a number of thousands of digits
        if first and line.lstrip().startswith("["):
            raise _NotAnObject(_ARRAY) from None
        if first and line.lstrip().startswith("{") and line.strip() in ("{", "{}"):
            raise _NotAnObject(_ONE_A_LINE) from None
        if line.lstrip().startswith("{'"):
            raise _NotAnObject(_PYTHON) from None
        reason = getattr(error, "msg", "a number is too long")
        raise _NotAnObject(f"is not JSON ({reason}); correct or remove it") from None
    if not isinstance(row, dict):
        raise _NotAnObject(_ARRAY if isinstance(row, list) and first else _ONE_A_LINE)
    return row


_ONE_A_LINE = "is no JSON object; write one object a line, e.g. with `jq -c . FILE`"
_PYTHON = "is a Python dictionary, not JSON; write json.dumps(ast.literal_eval(line)) of every line with Python"
_ARRAY = "is no JSON object but begins an array; write one object a line, e.g. with `jq -c '.[]' FILE`"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _NotAnObject("has a key twice; keep one of them")
    return row


def _wanted(name: str, source: Source) -> bool:
    return name in source.given.values() or role_of(name, KNOWN) is not None


def _text(value: Any) -> str:
    """A value as text; empty where it is no text and no finite number, also one that was turned into text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if (isinstance(value, float) and not np.isfinite(value)) or value in ("nan", "inf", "-inf"):
        return ""
    try:
        return str(value)
    except ValueError:  # a number of thousands of digits
        return ""
