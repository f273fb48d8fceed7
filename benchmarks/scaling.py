"""How an epoch grows with the data: FREEDOM and VBPR from Baby to Electronics, in seconds and in memory.

    python benchmarks/scaling.py --models freedom vbpr --data baby sports clothing electronics

Each model and size runs in a process of its own, so that its peak memory is its own: `fit` on made-up data with the
sizes of the paper's Table 1 (power-law degrees, 4,096-d image and 384-d text features, which FREEDOM trains), Adam, one
epoch for warmth and `--repeats` timed ones. `--max-batches N` stops an epoch, and its evaluation, after N batches on
full-size graphs and tables; its time is then multiplied up, what is done once per epoch included: an upper estimate.

With n training interactions, T trained numbers and B the batch size, a batch touches the whole graph and (Adam) every
table, so it should cost at most in proportion to n + T, and an epoch, of n / B batches, at most in proportion to
(n + T) n / B. `slopes`, of log time over log size over all sizes of a model, say whether it does: 1 is linear.
`epoch_on_size` is that of an epoch against n + T alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from _frame import Benchmark, Parser, in_own_process, say
from _machine import device_name, host_memory, peak_memory
from _settings import BATCH_SIZE, LEARNING_RATE, SOURCES, dataset, make_model
from _tables import Row
from _timing import spread
from flax import nnx
from matplotlib.figure import Figure

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.training import fit

PAPER = ["baby", "sports", "clothing", "electronics"]


def _options(parser: Parser) -> None:
    parser.option("--models", ["freedom", "vbpr"], "models", choices=models.names())
    parser.option("--data", PAPER, SOURCES, ["quick"])
    parser.number("--repeats", 3, "timed epochs", 1)
    parser.number("--max-batches", 0, "batches per epoch, 0 for all", least=0)
    parser.number("--batch-size", BATCH_SIZE, "interactions per batch")


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    job = {name: getattr(options, name) for name in ("repeats", "max_batches", "batch_size")}
    command = [sys.executable, __file__, "--job"]
    for source in options.data:
        for model in options.models:
            say(f"{source}, {model}")
            yield [in_own_process(command, {**job, "model": model, "source": source}, f"{model} on {source}")]


def _row(job: dict[str, Any]) -> Row:
    """One model and size, in this process: a row."""
    memory = {"start": host_memory("VmRSS")}
    data = dataset(job["source"])
    memory["data"] = host_memory("VmRSS")
    started = time.perf_counter()
    model = make_model(job["model"], data)
    seconds_build = time.perf_counter() - started
    memory["model"], memory["peak_build"] = host_memory("VmRSS"), host_memory("VmHWM")
    batch_size = job["batch_size"]
    n_batches = math.ceil(len(data.train) / batch_size)
    shown = _shortened(data, job["max_batches"], batch_size)
    batches_run = math.ceil(len(shown.train) / batch_size)
    epochs = job["repeats"] + 1
    result = fit(model, shown, optax.adam(LEARNING_RATE), epochs=epochs, patience=epochs, batch_size=batch_size)
    memory["peak"] = host_memory("VmHWM")
    seconds = [report.seconds_train / batches_run for report in result.history[1:]]
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    return {
        "model": job["model"],
        "size": data.name,
        "users": data.n_users,
        "items": data.n_items,
        "interactions": len(data.train),
        "trained_numbers": sum(leaf.size for leaf in parameters),
        "batches": n_batches,
        "batches_run": batches_run,
        "seconds_per_batch": spread(seconds),
        "seconds_per_epoch": spread([n_batches * x for x in seconds]),
        "seconds_build": seconds_build,
        "seconds_compile": result.seconds["compile"],
        "feature_bytes": sum(table.nbytes for table in data.features.values()),
        "parameter_bytes": sum(leaf.nbytes for leaf in parameters),
        "host_memory_bytes": memory,
        "peak_memory_bytes": peak_memory(),
        "device": device_name(),
    }


def _shortened(data: Interactions, max_batches: int, batch_size: int) -> Interactions:
    """The first batches of the data, in random order, and as much evaluation; everything where there is no limit."""
    n = max_batches * batch_size
    if not 0 < n < len(data.train):
        return data
    rows = np.random.default_rng(0).permutation(len(data.train))[:n]
    return dataclasses.replace(data, train=data.train[rows], valid=data.valid[:n], test=data.test[:n])


def _with_slopes(rows: list[Row]) -> list[Row]:
    """The rows in order of size, each with the slopes over all sizes of its model."""
    rows = sorted(rows, key=lambda row: (row["model"], row["interactions"] + row["trained_numbers"]))
    return [{**row, "slopes": _slopes([other for other in rows if other["model"] == row["model"]])} for row in rows]


def _slopes(rows: list[Row]) -> dict[str, float | None]:
    size = [row["interactions"] + row["trained_numbers"] for row in rows]
    work = [s * row["interactions"] / row["batch_size"] for s, row in zip(size, rows, strict=True)]
    batch, epoch = ([row[f"seconds_per_{name}"]["median"] for row in rows] for name in ("batch", "epoch"))
    return {"batch": _slope(size, batch), "epoch": _slope(work, epoch), "epoch_on_size": _slope(size, epoch)}


def _slope(x: list[float], y: list[float]) -> float | None:
    """Least-squares slope in log-log; None below two different sizes."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(set(x)) > 1 else None


def _plot(rows: list[Row]) -> Figure:
    """Seconds per batch against n + T, and per epoch against (n + T) n / B, with lines of slope 1."""
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
    return figure


if __name__ == "__main__":
    sys.exit(Benchmark("scaling", __doc__, _measure, _options, True, _row, _with_slopes, _plot).main())
