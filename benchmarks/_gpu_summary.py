"""What `gpu.py` measured, as Markdown tables: its own `summary.md`, and the section of docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from _tables import TABLES, Row, markdown, number

NOTHING = "Not measured on a GPU.\n"
KERNELS = 8  # of a profile
PRICE = ("data", "model", "interval", "form", "ms per batch", "over plain", "bound")
TRAINER = tuple(TABLES["vs_pytorch"].columns)[1:9]
MEMORY = ("model", "data", "trained numbers", "peak GiB", "parameters GiB", "s per batch", "s to build")
SWEEP = ("model", "data", "members", "slots", "single runs, s", "sweep, s", "times faster", "largest difference")


def summary(folder: Path) -> str:
    """All tables of a directory of results; one sentence where there are none."""
    steps = {file.stem: json.loads(file.read_text(encoding="utf-8"))["parts"] for file in sorted(folder.glob("?.json"))}
    records = [record for parts in steps.values() for record in parts.values()]
    if not any(record["rows"] for record in records):
        return NOTHING
    sections = [_machines(records), *(_section(step, parts) for step, parts in steps.items())]
    missing = [
        [f"({step}) {name}", record["status"], record.get("reason", "")]
        for step, parts in steps.items()
        for name, record in parts.items()
        if record["status"] != "done"
    ]
    sections += ["### What is missing\n", markdown(["part", "status", "reason"], missing)] if missing else []
    return "\n".join(filter(None, sections))


def _machines(records: Sequence[Row]) -> str:
    """The card and what ran on it; more than one line where the parts were not measured on one."""
    lines = []
    for record in records:
        machine, rows = record["machine"], record["rows"] or [{}]
        device = next((row["device"] for row in rows if row.get("device")), None)
        if device:
            card = machine["card"] or "no card"
            names = [f"{k} {machine[k]}" for k in ("jax", "jax-cuda13-plugin", "torch", "python") if machine.get(k)]
            quick = ", everything tiny" if machine["quick"] else ""
            lines.append(f"{device} ({card}); {', '.join(names)}; commit {machine['commit']}{quick}.")
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))


def _section(step: str, parts: dict[str, Row]) -> str:
    title, header, cells = SECTIONS[step]
    lines = [line for name, record in parts.items() for line in cells(name, record["rows"] or [])]
    return f"### {title}\n\n{markdown(header, lines)}" if lines else ""


def _columns(name: str, headings: Sequence[str]) -> _Cells:
    """Some columns of a benchmark's own table."""
    return lambda _, rows: TABLES[name].cells(rows, headings)


def _parity(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        if "error" in row:
            yield [name, row.get("case") or f"{row['product']}, {row['type']}", row["error"]]
        elif "equal_epochs" in row:
            found = ", ".join(f"{what} {n} of {row['epochs']} epochs" for what, n in row["equal_epochs"].items())
            yield [name, "equal to the last digit", f"{found}; {1e3 * row['seconds_train']:.1f} ms per epoch"]
        elif "deviation" in row:
            found = ", ".join(f"{what} {x:.0e}" for what, x in row["deviation"].items())
            yield [name, f"{row['product']}, {row['type']}", f"{found}; {row['distinct']} different in ten runs"]
        else:
            kinds = ("loss", "gradients", "scores", "parameters")
            yield [name, row["case"], ", ".join(f"{what} {row[what]:.0e}" for what in kinds if what in row)]


def _products(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        shape = (
            f"{row['graph']} ({row['size']}), {row['what']}" if "graph" in row else f"{row['rows']} x {row['columns']}"
        )
        last = number("times_floor")(row) or f"{row.get('distinct')} different in ten"
        found = [number("seconds", 3, 1e3)(row), number("ratio", 2)(row), last]
        yield [shape, row["case"], *([row["error"], "", ""] if "error" in row else found)]


def _profile(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        step = number("seconds_per_step", 3, 1e3)(row)
        if "floor_seconds" in row:
            floors = ", ".join(f"{what} {1e3 * x:.3f}" for what, x in row["floor_seconds"].items())
            yield [f"{row['model']}, floors ({row['data']})", step, floors, f"{row['distance']:.1f} times"]
            continue
        kernels = [{"name": row.get("note", "all kernels"), "seconds": row["kernel_seconds"]}]
        kernels += [{**kernel, "name": f"`{kernel['name'][:80]}`"} for kernel in row["kernels"][:KERNELS]]
        for first, kernel in zip([f"freedom, {row['training']}"] + [""] * KERNELS, kernels, strict=False):
            yield [first, step if first else "", kernel["name"], f"{1e3 * kernel['seconds'] / row['passes']:.4f}"]


_Cells = Callable[[str, list[Row]], Iterable[Sequence[str]]]
SECTIONS: dict[str, tuple[str, Sequence[str], _Cells]] = {
    "a": ("Parity: largest relative deviations from recorded or dense numbers", ["part", "what", "deviation"], _parity),
    "b": ("The price of Mirror Gradient", PRICE, _columns("step_throughput", PRICE)),
    "c": ("Beside the published trainer", TRAINER, _columns("vs_pytorch", TRAINER)),
    "d": ("Sparse products and gathered rows", ["what", "case", "ms", "over the first", "over the floor"], _products),
    "e": ("Memory", MEMORY, _columns("scaling", MEMORY)),
    "f": ("A grid as one program", SWEEP, _columns("sweep_throughput", SWEEP)),
    "g": ("Where a step goes", ["step", "ms", "kernel or floor", "ms per step, or distance"], _profile),
}
