"""What `gpu.py` measured, as Markdown tables: its own `summary.md`, and the section of docs/performance.md.

python benchmarks/_gpu_summary.py benchmarks/results/gpu --write docs/performance.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _report import Parser, exit_status

from mgrad_jax.errors import UserError

BEGIN, END = "<!-- measured on a GPU: begin -->", "<!-- measured on a GPU: end -->"
NOTHING = "Not measured on a GPU.\n"
KERNELS = 8  # of a profile
Row = dict[str, Any]


@exit_status
def main() -> None:
    """Print the tables, or put them between the marks of a file."""
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, help="the directory that gpu.py wrote")
    parser.add_argument("--write", type=Path, help="a Markdown file with the two marks")
    options = parser.parse_args()
    text = summary(options.results)
    if options.write is None:
        print(text)
    else:
        options.write.write_text(between_marks(options.write.read_text(encoding="utf-8"), text), encoding="utf-8")


def between_marks(document: str, text: str) -> str:
    """The document with another text between its marks."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise UserError(f"the document needs one '{BEGIN}' and one '{END}'; put them where the tables belong.")
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"


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
    sections += ["### What is missing\n", _table(["part", "status", "reason"], missing)] if missing else []
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
    return f"### {title}\n\n{_table(header, lines)}" if lines else ""


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)


def _parity(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        if "error" in row:
            yield [name, row.get("case") or f"{row['product']}, {row['type']}", row["error"]]
        elif "equal_epochs" in row:
            found = ", ".join(f"{what} {n} of {row['epochs']} epochs" for what, n in row["equal_epochs"].items())
            yield [name, "equal to the last digit", f"{found}; {1e3 * row['seconds_train']:.1f} ms an epoch"]
        elif "deviation" in row:
            found = ", ".join(f"{what} {x:.0e}" for what, x in row["deviation"].items())
            yield [name, f"{row['product']}, {row['type']}", f"{found}; {row['distinct']} different in ten runs"]
        else:
            found = ", ".join(
                f"{what} {row[what]:.0e}" for what in ("loss", "gradients", "scores", "parameters") if what in row
            )
            yield [name, row["case"], found]


def _price(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        low, high = row["spread"]["ratio_to_plain"]
        ratio = f"{row['ratio_to_plain']:.3f} ({low:.3f} to {high:.3f})"
        milliseconds = f"{1e3 * row['seconds_per_batch']:.3f}"
        yield [row["size"], row["model"], str(row["interval"]), row["form"], milliseconds, ratio, f"{row['bound']:.3f}"]


def _trainer(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for published, ours in zip(rows[::2], rows[1::2], strict=False):
        cells = [f"{side[key]['median']:.4f}" for key in _TIMES for side in (published, ours)]
        faster = [f"{ours['ratio']:.1f}", f"{ours['ratio_evaluation']:.1f}"]
        yield [ours["model"], ours["training"], *cells[:2], faster[0], *cells[2:], faster[1]]


_TIMES = ("seconds_per_epoch", "seconds_per_evaluation")


def _products(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        what = (
            f"{row['graph']} ({row['size']}), {row['what']}" if "graph" in row else f"{row['rows']} x {row['columns']}"
        )
        if "error" in row:
            yield [what, row["case"], row["error"], "", ""]
            continue
        floor = f"{row['times_floor']['median']:.1f}" if "times_floor" in row else ""
        times = f"{1e3 * row['seconds']['median']:.3f}"
        yield [
            what,
            row["case"],
            times,
            f"{row['ratio']['median']:.2f}",
            floor or f"{row['distinct']} different in ten",
        ]


def _memory(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        gib = [f"{row[key] / 2**30:.1f}" for key in ("peak_memory_bytes", "parameter_bytes")]
        seconds = [f"{row['seconds_per_batch']['median']:.4f}", f"{row['seconds_build']:.0f}"]
        yield [row["model"], row["size"], f"{row['trained_numbers'] / 1e6:.0f} M", *gib, *seconds]


def _sweep(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        times = [f"{row[key]['median']:.1f}" for key in ("seconds_single_runs", "seconds_sweep")]
        ratio, difference = f"{row['ratio']['median']:.1f}", f"{row['largest_metric_difference']:.0e}"
        yield [row["model"], row["size"], str(row["members"]), str(row["slots"]), *times, ratio, difference]


def _profile(name: str, rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        if "floor_seconds" in row:
            floors = ", ".join(f"{what} {1e3 * x:.3f}" for what, x in row["floor_seconds"].items())
            step = f"{1e3 * row['seconds_per_step']['median']:.3f}"
            yield [f"{row['model']}, floors ({row['data']})", step, floors, f"{row['distance']:.1f} times"]
            continue
        step, passes = f"{1e3 * row['seconds_per_step']:.3f}", row["passes"]
        yield [
            f"freedom, {row['training']}",
            step,
            row.get("note", "all kernels"),
            f"{1e3 * row['kernel_seconds'] / passes:.4f}",
        ]
        for kernel in row["kernels"][:KERNELS]:
            yield ["", "", f"`{kernel['name'][:80]}`", f"{1e3 * kernel['seconds'] / passes:.4f}"]


_Cells = Callable[[str, list[Row]], Iterator[list[str]]]
SECTIONS: dict[str, tuple[str, list[str], _Cells]] = {
    "a": ("Parity: largest relative deviations from recorded or dense numbers", ["part", "what", "deviation"], _parity),
    "b": (
        "The price of Mirror Gradient",
        ["data", "model", "interval", "form", "ms a batch", "over plain", "bound"],
        _price,
    ),
    "c": (
        "Beside the published trainer, seconds",
        ["model", "training", "published, epoch", "ours", "faster", "published, evaluation", "ours", "faster"],
        _trainer,
    ),
    "d": ("Sparse products and gathered rows", ["what", "case", "ms", "over the first", "over the floor"], _products),
    "e": ("Memory", ["model", "data", "trained", "peak GiB", "parameters GiB", "s a batch", "s to build"], _memory),
    "f": (
        "A grid as one program",
        ["model", "data", "members", "slots", "one by one, s", "sweep, s", "faster", "difference"],
        _sweep,
    ),
    "g": ("Where a step goes", ["step", "ms", "kernel or floor", "ms a step, or distance"], _profile),
}


if __name__ == "__main__":
    sys.exit(main())
