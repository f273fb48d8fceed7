"""How an epoch grows with the data: FREEDOM and VBPR from Baby to Electronics, in seconds and in memory.

    python benchmarks/scaling.py --models freedom vbpr --sizes baby sports clothing electronics

Each model and size runs in a process of its own, so that its peak memory is its own: `fit` on made-up data with the
sizes of the paper's Table 1 (power-law degrees, 4,096-d image and 384-d text features, which FREEDOM trains), Adam, one
epoch for warmth and `--repeats` timed ones. `--max-batches N` stops an epoch, and its evaluation, after N batches on
full-size graphs and tables; its time is then multiplied up, what is done once an epoch included, so that the estimate
errs upwards.

With n training interactions, T trained numbers and B the batch size, a batch touches the whole graph and (Adam) every
table, so it should cost no more than in proportion to n + T, and an epoch, of n / B batches, no more than in proportion
to (n + T) n / B. The slopes of log time over log size say whether it does: 1 is linear. `slopes` in every row of a
model holds, over all its sizes, `batch` (seconds a batch against n + T), `epoch` (seconds an epoch against (n + T) n /
B) and `epoch_on_size` (seconds an epoch against n + T alone).

The output is a JSON list of rows; a file keeps rows of one device only, and a row measured again replaces its older
self, so that sizes can be run one by one. The plot lies beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optax
from _report import (
    RESULTS,
    Parser,
    check_at_least,
    check_choices,
    device_name,
    earlier_rows,
    exit_status,
    host_peak_memory,
    peak_memory,
    resident_memory,
    spread,
    spread_cell,
    versions,
    write_json,
)
from _settings import SETTINGS
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from step_throughput import ALL_SIZES

from mgrad_jax import models
from mgrad_jax.data import Interactions, synthetic_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training import fit

PAPER = ("baby", "sports", "clothing", "electronics")


@exit_status
def main() -> None:
    """Measure every model and size; print, write and plot."""
    options = _options()
    if options.job:
        print(json.dumps(_measure(*options.job, options)))
        return
    for model in options.models:
        models.model_class(model)
    check_choices("--sizes", options.sizes, list(ALL_SIZES))
    check_at_least("--repeats", options.repeats)
    check_at_least("--batch-size", options.batch_size)
    check_at_least("--max-batches", options.max_batches, 0)
    rows = earlier_rows(options.output)
    for size in options.sizes:
        for model in options.models:
            print(f"{size}, {model} ...", file=sys.stderr, flush=True)
            rows = [row for row in rows if (row["model"], row["size"]) != (model, size)]
            rows = _with_slopes([*rows, _in_own_process(model, size, options)])
            write_json(options.output, rows)
    _print_table(rows)
    _plot(rows, options.output.with_suffix(".png"))


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["freedom", "vbpr"])
    parser.add_argument("--sizes", nargs="+", help=f"of {', '.join(ALL_SIZES)} (default: {', '.join(PAPER)})")
    parser.add_argument("--repeats", type=int, help="timed epochs (default 3)")
    parser.add_argument("--max-batches", type=int, default=0, help="batches an epoch, 0 for all (default)")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="tiny defaults: does it run, not how fast")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = options.sizes or (["quick"] if options.quick else list(PAPER))
    if options.repeats is None:
        options.repeats = 1 if options.quick else 3
    return options


def _in_own_process(model: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--job", model, size]
    for name in ("repeats", "max_batches", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message (killed, for want of memory?)"])[-1]
        raise UserError(f"{model} on {size} ended with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(model_name: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model and size, in this process: a row."""
    memory = {"start": resident_memory()}
    data = synthetic_interactions(ALL_SIZES[size], name=size)
    memory["data"] = resident_memory()
    started = time.perf_counter()
    model = models.create(model_name, data, **SETTINGS[model_name].hyper_parameters)
    seconds_build = time.perf_counter() - started
    memory["model"], memory["peak_build"] = resident_memory(), host_peak_memory()
    n_batches = math.ceil(len(data.train) / options.batch_size)
    shown = _shortened(data, options.max_batches, options.batch_size)
    batches_run = math.ceil(len(shown.train) / options.batch_size)
    epochs = options.repeats + 1
    result = fit(model, shown, optax.adam(1e-3), epochs=epochs, patience=epochs, batch_size=options.batch_size)
    memory["peak"] = host_peak_memory()
    seconds = [report.seconds_train / batches_run for report in result.history[1:]]
    numbers = sum(int(leaf.size) for leaf in _leaves(nnx.state(model, nnx.Param)))
    return {
        "model": model_name,
        "size": size,
        "users": data.n_users,
        "items": data.n_items,
        "interactions": len(data.train),
        "trained_numbers": numbers,
        "batches": n_batches,
        "batches_run": batches_run,
        "batch_size": options.batch_size,
        "seconds_per_batch": spread(seconds),
        "seconds_per_epoch": spread([n_batches * x for x in seconds]),
        "seconds_build": seconds_build,
        "seconds_compile": result.seconds["compile"],
        "feature_bytes": sum(table.nbytes for table in data.features.values()),
        "parameter_bytes": sum(int(leaf.nbytes) for leaf in _leaves(nnx.state(model, nnx.Param))),
        "host_memory_bytes": memory,
        "peak_memory_bytes": peak_memory(),
        "repeats": options.repeats,
        "device": device_name(),
        "versions": versions(),
    }


def _leaves(state: nnx.State) -> list[Any]:
    return [variable[...] for _, variable in nnx.to_flat_state(state)]


def _shortened(data: Interactions, max_batches: int, batch_size: int) -> Interactions:
    """The first batches of the data, in random order, and as much evaluation; everything where there is no limit."""
    n = max_batches * batch_size
    if not 0 < n < len(data.train):
        return data
    rows = np.random.default_rng(0).permutation(len(data.train))[:n]
    return dataclasses.replace(data, train=data.train[rows], valid=data.valid[:n], test=data.test[:n])


def _with_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in order of size, each with the slopes over all sizes of its model."""
    rows = sorted(rows, key=lambda row: (row["model"], row["interactions"] + row["trained_numbers"]))
    return [{**row, "slopes": _slopes([other for other in rows if other["model"] == row["model"]])} for row in rows]


def _slopes(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    size = [row["interactions"] + row["trained_numbers"] for row in rows]
    work = [s * row["interactions"] / row["batch_size"] for s, row in zip(size, rows, strict=True)]
    batch, epoch = ([row[f"seconds_per_{name}"]["median"] for row in rows] for name in ("batch", "epoch"))
    return {"batch": _slope(size, batch), "epoch": _slope(work, epoch), "epoch_on_size": _slope(size, epoch)}


def _slope(x: list[float], y: list[float]) -> float | None:
    """Least-squares slope in log-log; None below two different sizes."""
    if len(set(x)) < 2:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title=rows[0]["device"])
    for name in ("model", "size"):
        table.add_column(name)
    for name in ("interactions", "trained numbers", "s / batch", "s / epoch", "s build", "peak GiB", "host peak GiB"):
        table.add_column(name, justify="right")
    for row in rows:
        batch, estimated = row["seconds_per_batch"], row["batches_run"] < row["batches"]
        table.add_row(
            row["model"],
            row["size"],
            f"{row['interactions']:,}",
            f"{row['trained_numbers']:,}",
            spread_cell(batch, 4),
            f"{row['seconds_per_epoch']['median']:.1f}{' (estimated)' if estimated else ''}",
            f"{row['seconds_build']:.1f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
            f"{row['host_memory_bytes']['peak'] / 2**30:.2f}",
        )
    console = Console(width=160)
    console.print(table)
    for model in dict.fromkeys(row["model"] for row in rows):
        slopes = next(row["slopes"] for row in rows if row["model"] == model)
        console.print(f"{model}, slopes:", {name: x if x is None else round(x, 3) for name, x in slopes.items()})
    console.print(rows[0]["versions"])


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds a batch against n + T, and an epoch against (n + T) n / B, with lines of slope 1."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, label in zip(panels, ("batch", "epoch"), ("n + T", "(n + T) n / B"), strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model]
            size = np.array([row["interactions"] + row["trained_numbers"] for row in mine], float)
            if name == "epoch":
                size *= [row["interactions"] / row["batch_size"] for row in mine]
            seconds = [row[f"seconds_per_{name}"] for row in mine]
            middle, low, high = (np.array([s[key] for s in seconds]) for key in ("median", "min", "max"))
            slope = mine[0]["slopes"][name]
            shown = model if slope is None else f"{model}, slope {slope:.2f}"
            points = axes.errorbar(size, middle, [middle - low, high - middle], marker="o", label=shown)
            axes.plot(size, middle[0] * size / size[0], ":", color=points[0].get_color(), linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel(f"seconds / {name} (dotted: linear)")
        axes.legend()
    figure.suptitle(rows[0]["device"])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
