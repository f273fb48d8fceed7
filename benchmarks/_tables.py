"""What the rows of every benchmark look like as a table: for the console, the documentation and the GPU's summary.

Needs nothing but Python, so that `tables.py` can check the documentation on a machine without JAX.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]
Cell = Callable[[Row], str]
GIB = 2.0**-30


@dataclass(frozen=True)
class Table:
    """Rows of one benchmark.

    Attributes:
        key: the fields that tell one row from another; a row measured again takes the place of its older self.
        columns: by heading, the name of a field, or what makes a cell of a row; all fields where there are none.
        prepare: makes the rows that are shown, e.g. one of the two sides of a comparison.
    """

    key: tuple[str, ...]
    columns: Mapping[str, str | Cell] = field(default_factory=dict)
    prepare: Callable[[Iterable[Row]], Iterable[Row]] = lambda rows: rows

    def key_of(self, row: Row) -> tuple[Any, ...]:
        """What tells this row from the others."""
        return tuple(row[name] for name in self.key)

    def cells(self, rows: Iterable[Row], headings: Iterable[str] | None = None) -> list[list[str]]:
        """The cells of each row, of all columns or of some."""
        columns = [self.columns[heading] for heading in headings or self.columns]
        return [
            [str(row.get(column, "")) if isinstance(column, str) else column(row) for column in columns]
            for row in self.prepare(rows)
        ]

    def markdown(self, rows: Iterable[Row], headings: Sequence[str] = ()) -> str:
        """The table, of all columns or of some."""
        return markdown(list(headings or self.columns), self.cells(rows, headings))

    def text(self, rows: Sequence[Row]) -> str:
        """The table with columns in line, and what it was measured on."""
        columns = self.columns or {name: name for name in rows[0] if name not in ("device", "versions")}
        origins = dict.fromkeys(f"{row['device']}, {row['versions']}" for row in rows)
        return "\n".join([markdown(list(columns), replace(self, columns=columns).cells(rows), padded=True), *origins])


def read_csv(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file of results."""
    with (RESULTS / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], padded: bool = False) -> str:
    """A Markdown table; in a padded one the columns are in line."""
    rows = [[cell.replace("|", "/") for cell in row] for row in (header, *lines)]
    widths = [max(3, *map(len, column)) if padded else 0 for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * max(3, width) for width in widths])
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |\n" for row in rows
    )


def pivot(rows: Iterable[Row], index: Sequence[str], column: str, value: Cell) -> tuple[list[str], list[list[str]]]:
    """Header and lines with the values of one field side by side, a line for each value of the others."""
    rows = list(rows)
    headings = list(dict.fromkeys(str(row[column]) for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(str(row[name]) for name in index), {})[str(row[column])] = value(row)
    return [*index, *headings], [[*k, *(cells.get(name, "") for name in headings)] for k, cells in lines.items()]


def number(path: str, digits: int = 1, factor: float = 1.0, suffix: str = "") -> Cell:
    """A number of a row times a factor, the median where it is a spread; nothing where the row has none."""

    def cell(row: Row) -> str:
        value = _at(row, path)
        value = value["median"] if isinstance(value, Mapping) else value
        return "" if value is None else f"{factor * value:.{digits}f}{suffix}"

    return cell


def small(path: str) -> Cell:
    """A small number of a row, to one digit; "equal" for none."""

    def cell(row: Row) -> str:
        return f"{value:.0e}" if (value := _at(row, path)) else "equal"

    return cell


def spread(path: str, digits: int = 1, factor: float = 1.0) -> Cell:
    """A spread of a row times a factor: median (least to largest)."""

    def cell(row: Row) -> str:
        value = _at(row, path)
        if value is None:
            return ""
        median, least, largest = (f"{factor * value[name]:.{digits}f}" for name in ("median", "min", "max"))
        return f"{median} ({least} to {largest})"

    return cell


def _at(row: Row, path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _over_plain(row: Row) -> str:
    low, high = row["spread"]["ratio_to_plain"]
    return f"{row['ratio_to_plain']:.3f} ({low:.3f} to {high:.3f})"


def sides(rows: Iterable[Row]) -> list[Row]:
    """Of the two rows of each comparison our own, with the other one as `published`."""
    others: dict[tuple[Any, ...], Row] = {}
    found = []
    for row in rows:
        key = tuple(row[name] for name in ("model", "training", "data", "commit"))
        if row["side"] == "published":
            others[key] = row
        elif key in others:
            found.append({**row, "published": others[key]})
    return found


def latest(rows: Iterable[Row], *key: str) -> list[Row]:
    """The last row of each key: what the newest code measured, in the order in which keys first came."""
    return list({tuple(row[name] for name in key): row for row in rows}.values())


def results(name: str) -> list[Row]:
    """The committed rows of a benchmark."""
    rows: list[Row] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return rows


TABLES: dict[str, Table] = {
    "same_run": Table(
        ("model", "data", "devices", "epochs", "precision"),
        {
            "data": "data",
            "model": "model",
            "devices": "devices",
            "epochs": "epochs",
            "precision": "precision",
            "losses": small("split.losses"),
            "metrics": small("split.metrics"),
            "losses, one device nudged": small("nudged.losses"),
            "metrics, one device nudged": small("nudged.metrics"),
            "order, negatives, graphs": "draws",
        },
    ),
    "nearest_items": Table(
        ("data", "features", "precision", "devices"),
        {
            "data": "data",
            "features": "features",
            "items": number("items", 0),
            "columns": "columns",
            "precision": "precision",
            "devices": "devices",
            "items with other neighbours": "differ",
        },
    ),
    "step_throughput": Table(
        ("model", "size", "source", "interval", "form", "batch_size"),
        {
            "data": "size",
            "model": "model",
            "interval": "interval",
            "form": "form",
            "ms per batch": number("seconds_per_batch", 3, 1e3),
            "over plain": _over_plain,
            "bound": number("bound", 3),
            "compile s": number("compile_seconds"),
            "peak GiB": number("peak_memory_bytes", 2, GIB),
            "program GiB": number("program_memory_bytes", 2, GIB),
        },
    ),
    "vs_pytorch": Table(
        ("model", "training", "side", "data", "commit"),  # what earlier code took stays
        {
            "data": "data",
            "model": "model",
            "training": "training",
            "epoch, reference (s)": number("published.seconds_per_epoch", 4),
            "epoch, ours (s)": number("seconds_per_epoch", 4),
            "epoch, faster": number("ratio"),
            "evaluation, reference (s)": number("published.seconds_per_evaluation", 4),
            "evaluation, ours (s)": number("seconds_per_evaluation", 4),
            "evaluation, faster": number("ratio_evaluation"),
            "compile s": number("seconds_compile"),
            "commit": "commit",
            "recall@5, reference": lambda row: f"{row['published']['metrics']['test']['recall@5']:.4f}",
            "recall@5, ours": lambda row: f"{row['metrics']['test']['recall@5']:.4f}",
        },
        sides,
    ),
    "compile_time": Table(
        ("model", "training", "data"),
        {
            "model": "model",
            "training": "training",
            "compile s": spread("compile_first"),
            "compile again": spread("compile_again"),
            "command s": spread("wall_first"),
            "command again": spread("wall_again"),
        },
    ),
    "propagation": Table(
        ("graph", "size", "what", "case", "columns"),
        {
            "graph": "graph",
            "size": "size",
            "what": "what",
            "case": "case",
            "ms": spread("seconds", 2, 1e3),
            "over propagate": number("ratio", 2),
            "over the floor": number("times_floor"),
            "difference": lambda row: f"{row['largest_difference']:.0e}",
            "compile s": number("compile_seconds"),
        },
    ),
    "sweep_throughput": Table(
        ("model", "size", "members", "epochs", "batch_size", "slots"),
        {
            "model": "model",
            "data": "size",
            "members": "members",
            "slots": "slots",
            "single runs, s": spread("seconds_single_runs"),
            "sweep, s": spread("seconds_sweep"),
            "times faster": number("ratio", 2),
            "largest difference": lambda row: f"{row['largest_metric_difference']:.0e}",
        },
    ),
    "scaling": Table(
        ("model", "size", "batch_size"),
        {
            "model": "model",
            "data": "size",
            "interactions": lambda row: f"{row['interactions']:,}",
            "trained numbers": number("trained_numbers", 2, 1e-6, " M"),
            "s per batch": spread("seconds_per_batch", 4),
            "s per epoch": lambda row: (
                number("seconds_per_epoch")(row) + (" (estimated)" if row["batches_run"] < row["batches"] else "")
            ),
            "s to build": number("seconds_build"),
            "peak GiB": number("peak_memory_bytes", 1, GIB),
            "host peak GiB": number("host_memory_bytes.peak", 1, GIB),
            "parameters GiB": number("parameter_bytes", 2, GIB),
            "slope, batch": number("slopes.batch", 2),
            "slope, epoch": number("slopes.epoch", 2),
        },
    ),
    "floors": Table(
        ("model", "data", "batch_size"),
        {
            "data": "data",
            "model": "model",
            "trained numbers": number("trained_numbers", 2, 1e-6, " M"),
            "ms per step": spread("seconds_per_step", 1, 1e3),
            "traffic, ms": number("floor_seconds.traffic", 1, 1e3),
            "dense products, ms": number("floor_seconds.arithmetic", 1, 1e3),
            "distance": number("distance"),
            "GB/s": number("bandwidth", 0, 1e-9),
            "GFLOP/s": number("operations_per_second", 0, 1e-9),
        },
    ),
    "sharding": Table(
        ("model", "size", "devices", "how", "batch_size"),
        {
            "data": "size",
            "model": "model",
            "devices": "devices",
            "arguments MB": number("argument_bytes", 0, 1e-6),
            "temporaries MB": number("temporary_bytes", 0, 1e-6),
            "evaluation MB": number("evaluation_temporary_bytes", 0, 1e-6),
            "collectives a pass": "collectives_per_pass",
            "MB a pass": number("sent_per_pass", 2, 1e-6),
            "MB an epoch": number("sent_per_epoch", 1, 1e-6),
            "MB an evaluation": number("sent_per_evaluation", 1, 1e-6),
            "ms per batch": spread("seconds_per_batch", 2, 1e3),
            "how": "how",
        },
    ),
    "gpu_graph": Table(("product", "type")),
    "gpu_parity": Table(("case", "mode")),
    "gpu_resume": Table(("flags",)),
    "gpu_gather": Table(("rows", "columns", "case")),
    "gpu_profile": Table(("training",)),
}
