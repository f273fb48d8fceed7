"""Tables as Markdown, CSV and LaTeX: the same numbers in the same bytes, rounded only where people read them."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mgrad_jax.analysis.statistics import Spread

_PACKAGES = ("mgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy", "scipy")


class Interval(NamedTuple):
    """A number and the ends of its band."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """A column: its heading, and how its numbers are written where people read them (a format specification)."""

    name: str
    form: str = ".4f"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows, in sentences.
        columns: their headings and forms.
        rows: a value a column: a number, text, a `Spread`, an `Interval`, or None where there is nothing to say.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells and the table {len(self.columns)} columns: {row}.")


def texts(table: Table) -> list[list[str]]:
    """The rows as people read them."""
    return [[_text(value, column, "±", "[{}, {}]") for value, column in _cells(table, row)] for row in table.rows]


def to_markdown(table: Table) -> str:
    """The caption and a pipe table."""
    header = [column.name for column in table.columns]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [header, *texts(table)]]
    lines.insert(1, "|" + "---|" * len(header))
    return f"{table.caption}\n\n" + "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """All digits, no spaces in the names; a `Spread` is columns `x, x_sd`, an `Interval` is `x, x_low, x_high`."""
    parts = [_parts(table, number) for number in range(len(table.columns))]
    header = [_key(column, end) for column, ends in zip(table.columns, parts, strict=True) for end in ends]
    lines = [",".join(map(_quoted, header))]
    for row in table.rows:
        cells = [_raw(value, end) for value, ends in zip(row, parts, strict=True) for end in ends]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """A `table` environment that needs no package."""
    columns = "l" * _leading_text(table) + "r" * (len(table.columns) - _leading_text(table))
    header = [_escaped(column.name) for column in table.columns]
    body = [[_latex(value, column) for value, column in _cells(table, row)] for row in table.rows]
    lines = [" & ".join(line) + r" \\" for line in [header, *body]]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_escaped(table.caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\hline",
            lines[0],
            r"\hline",
            *lines[1:],
            r"\hline",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def csv_records(table: Table) -> list[dict[str, Any]]:
    """The rows by column as in the CSV, for JSON."""
    parts = [_parts(table, number) for number in range(len(table.columns))]
    return [
        {
            _key(column, end): _value(value, end)
            for value, column, ends in zip(row, table.columns, parts, strict=True)
            for end in ends
        }
        for row in table.rows
    ]


def provenance(**content: Any) -> str:
    """The content of a `result.json` after what it was made with: device and versions. What is no number is null."""
    device = jax.devices()[0]
    made_with = {
        "device": f"{device.platform} ({device.device_kind})",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in _PACKAGES}},
    }
    return json.dumps(_clean({**made_with, **content}), indent=2) + "\n"


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_clean(item) for item in value]
    if isinstance(value, (np.floating, np.integer)):
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any, form: str) -> str:
    """One number as the tables show it."""
    return _text(value, Column("", form), "±", "[{}, {}]")


def _cells(table: Table, row: tuple[Any, ...]) -> list[tuple[Any, Column]]:
    return list(zip(row, table.columns, strict=True))


def _parts(table: Table, number: int) -> Sequence[str]:
    """Endings of the CSV columns that one column takes."""
    values = [row[number] for row in table.rows]
    if any(isinstance(value, Spread) for value in values):
        return "", "_sd"
    return ("", "_low", "_high") if any(isinstance(value, Interval) for value in values) else ("",)


def _key(column: Column, end: str) -> str:
    return column.name.replace(" ", "_") + end


def _value(value: Any, end: str) -> Any:
    """What stands in the CSV column of a cell with this ending."""
    if isinstance(value, Spread):
        return value.sd if end else value.mean
    if isinstance(value, Interval):
        return {"": value.value, "_low": value.low, "_high": value.high}[end]
    return None if end else value


def _raw(value: Any, end: str) -> str:
    value = _value(value, end)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(float(value)) if isinstance(value, float) else _quoted(str(value))


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text


def _text(value: Any, column: Column, plus_minus: str, brackets: str) -> str:
    """A cell for people; "-" where there is nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, Spread):
        mean = format(value.mean, column.form)
        return mean if value.sd is None else f"{mean} {plus_minus} {format(value.sd, column.form.replace('+', ''))}"
    if isinstance(value, Interval):
        if not math.isfinite(value.low + value.high):
            return _text(value.value, column, plus_minus, brackets)
        low, high = (format(x, column.form) for x in value[1:])
        return f"{format(value.value, column.form)} " + brackets.format(low, high)
    return format(value, column.form) if isinstance(value, float) else str(value)


def _latex(value: Any, column: Column) -> str:
    if isinstance(value, str):
        return _escaped(value)
    text = _text(value, column, r"\pm", r"\;[{},\,{}]")
    return text if text == "-" else f"${text.replace('%', chr(92) + '%')}$"


def _escaped(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return text.replace("±", r"$\pm$").replace("<", "$<$").replace(">", "$>$")


def _leading_text(table: Table) -> int:
    """How many columns from the left hold text only."""
    count = 0
    for number in range(len(table.columns)):
        if not all(isinstance(row[number], str) for row in table.rows):
            break
        count += 1
    return count
