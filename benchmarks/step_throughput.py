"""What a training step costs under Mirror Gradient, beside the plain optimizer and beside the bound.

    python benchmarks/step_throughput.py --models vbpr bm3 freedom --data baby --intervals 1 3 5 7

One program runs several batches with the trainer's own passes (`mgrad_jax.training.epoch`); resampling, shuffling and
the draw of negatives, which every form does once per epoch alike, are left out, so that nothing dilutes the ratio. The
forms take turns in every round, and a ratio compares times of the same round. Forms:

    plain    Adam                                                                         bound 1
    mirror   optax.chain(mirror_gradient(interval), adam)                                 bound 1 + 1 / interval
    mirrored mirrored(adam, interval)                                                     bound 1 + 1 / interval
    sam      sam(adam)                                                                    bound 2
    idle     as mirror, with no batch ever mirrored: the transformation's own price       bound 1

`peak_memory_bytes` is of the device (on a GPU the most of all forms so far, which it cannot forget) or, on the CPU, of
this process with its data; `program_memory_bytes` is what XLA says the compiled program needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _frame import Benchmark, Parser, say
from _machine import peak_memory, reset_peak_memory
from _plots import bars
from _settings import BATCH_SIZE, FEATURED, LEARNING_RATE, SOURCES, dataset, make_model
from _steps import Case, compile_passes, random_batches
from _tables import Row
from _timing import interleaved
from matplotlib.figure import Figure

from mgrad_jax import mirror_gradient, mirrored, models, sam
from mgrad_jax.data import Batch, Interactions
from mgrad_jax.mirror import pass_schedule
from mgrad_jax.training.epoch import SplitModel, split_model

FORMS = ["plain", "mirror", "mirrored", "sam", "idle"]
NEVER = 2**30  # an interval that no run reaches


def _options(parser: Parser) -> None:
    parser.option("--models", FEATURED, "models", ["vbpr"], choices=models.names())
    parser.option("--data", ["baby"], SOURCES, ["quick"])
    parser.number("--intervals", [3], "intervals of Mirror Gradient")
    parser.option("--forms", FORMS, "forms", choices=FORMS)
    parser.number("--repeats", 9, "rounds", 2)
    parser.number("--batches", 12, "batches per round, made a multiple of the interval", 3)
    parser.number("--batch-size", BATCH_SIZE, "interactions per batch", 256)


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    for source in options.data:
        data = dataset(source)
        for model in options.models:
            parts = split_model(make_model(model, data))
            for interval in options.intervals:
                say(f"{data.name}, {model}, interval {interval}")
                yield _group(parts, data, model, interval, options)


def _group(parts: SplitModel, data: Interactions, model: str, interval: int, options: argparse.Namespace) -> list[Row]:
    """One model, size and interval: all forms in turns, a row for each; plain is always among them."""
    forms = ["plain", *(form for form in options.forms if form != "plain")]
    n_batches = -(-options.batches // interval) * interval
    batches = random_batches(data, n_batches, options.batch_size)
    cases = {form: _prepare(form, interval, parts, batches) for form in forms}
    peaks = {}
    for form, case in cases.items():  # once, for warmth
        reset_peak_memory()
        jax.block_until_ready(case.run(case.start()))
        peaks[form] = peak_memory()
    starts = {form: case.start for form, case in cases.items()}
    times = interleaved({form: case.run for form, case in cases.items()}, options.repeats, starts)
    seconds = {form: np.array(values) / n_batches for form, values in times.items()}
    return [
        {
            "model": model,
            "size": data.name,
            "source": "synthetic" if data.source.startswith("synthetic") else "files",
            "interval": interval,
            "form": form,
            **_times(seconds[form], seconds["plain"]),
            "bound": {"plain": 1.0, "idle": 1.0, "sam": 2.0}.get(form, 1.0 + 1.0 / interval),
            "gradients_per_batch": cases[form].passes / n_batches,
            "compile_seconds": cases[form].compile_seconds,
            "peak_memory_bytes": peaks[form],
            "program_memory_bytes": cases[form].program_bytes,
            "batches": n_batches,
        }
        for form in forms
    ]


def _times(seconds: np.ndarray, plain: np.ndarray) -> dict[str, Any]:
    """Median and spread over the rounds of seconds per batch, and of their ratio to plain in the same round."""
    ratios = seconds / plain
    return {
        "steps_per_second": float(1.0 / np.median(seconds)),
        "seconds_per_batch": float(np.median(seconds)),
        "ratio_to_plain": float(np.median(ratios)),
        "spread": {
            "seconds_per_batch": [float(seconds.min()), float(seconds.max())],
            "ratio_to_plain": [float(ratios.min()), float(ratios.max())],
        },
    }


def _prepare(form: str, interval: int, parts: SplitModel, batches: Batch) -> Case:
    adam = optax.adam(LEARNING_RATE)
    tx = {
        "plain": adam,
        "mirror": optax.chain(mirror_gradient(interval=interval), adam),
        "mirrored": mirrored(adam, interval=interval),
        "sam": sam(adam),
        "idle": optax.chain(mirror_gradient(interval=NEVER), adam),
    }[form]
    state = tx.init(parts.params)
    n_batches = batches.users.shape[0]
    schedule = pass_schedule(state, n_batches)
    if form == "idle":  # as before batch 1, so that batch 0 is not mirrored
        mirror, *rest = state
        state = (mirror._replace(phase=jnp.ones_like(mirror.phase)), *rest)
        schedule = np.arange(n_batches, dtype=np.int32)
    return compile_passes(parts, tx, state, schedule, batches)


def _plot(rows: list[Row]) -> Figure:
    """Ratio to plain by model and interval."""
    return bars(
        [row for row in rows if row["form"] != "plain"],
        panel="size",
        groups=["model", "interval"],
        colour="form",
        value=lambda row: (row["ratio_to_plain"], *row["spread"]["ratio_to_plain"]),
        mark=lambda row: row["bound"],
        label="time per batch / plain (black: bound)",
    )


if __name__ == "__main__":
    sys.exit(Benchmark("step_throughput", __doc__, _measure, _options, plot=_plot).main())
