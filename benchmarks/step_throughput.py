"""What a training step costs under Mirror Gradient, beside the plain optimizer and beside the bound.

    python benchmarks/step_throughput.py --models vbpr bm3 freedom --data baby --intervals 1 3 5 7

One program runs several batches with the trainer's own passes (`mgrad_jax.training.epoch`); resampling, shuffling and
the draw of negatives, which every form does once an epoch alike, are left out, so that nothing dilutes the ratio. The
forms take turns in every round, and a ratio compares times of the same round. Forms:

    plain    Adam                                                                         bound 1
    mirror   optax.chain(mirror_gradient(interval), adam)                                 bound 1 + 1 / interval
    mirrored mirrored(adam, interval)                                                     bound 1 + 1 / interval
    sam      optax.contrib.sam(adam, opaque_mode=True)                                    bound 2
    idle     as mirror, with no batch ever mirrored: the transformation's own price       bound 1

The plot lies beside the file of results. `peak_memory_bytes` is of the device (on a GPU the most of all forms so far, which it cannot forget) or, on the
CPU, of this process with its data; `program_memory_bytes` is what XLA says the compiled program needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _frame import Benchmark, Parser, say
from _machine import peak_memory, reset_peak_memory
from _settings import BATCH_SIZE, FEATURED, LEARNING_RATE, SOURCES, dataset, make_model
from _steps import Case, compile_passes, random_batches
from _tables import Row
from _timing import interleaved
from matplotlib.figure import Figure

from mgrad_jax import MirrorState, mirror_gradient, mirrored, models, sam
from mgrad_jax.data import Batch, Interactions
from mgrad_jax.mirror import pass_schedule
from mgrad_jax.training.epoch import SplitModel, split_model

BOUNDS: dict[str, Callable[[int], float]] = {
    "plain": lambda interval: 1.0,
    "mirror": lambda interval: 1.0 + 1.0 / interval,
    "mirrored": lambda interval: 1.0 + 1.0 / interval,
    "sam": lambda interval: 2.0,
    "idle": lambda interval: 1.0,
}
NEVER = 2**30  # an interval that no run reaches


def _options(parser: Parser) -> None:
    parser.option("--models", FEATURED, "models", ["vbpr"], choices=models.names())
    parser.option("--data", ["baby"], SOURCES, ["quick"])
    parser.number("--intervals", [3], "intervals of Mirror Gradient")
    parser.option("--forms", list(BOUNDS), "forms", choices=list(BOUNDS))
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
    peaks = {form: _peak_memory(case) for form, case in cases.items()}
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
            "bound": BOUNDS[form](interval),
            "gradients_per_batch": cases[form].passes / n_batches,
            "compile_seconds": cases[form].compile_seconds,
            "peak_memory_bytes": peaks[form],
            "program_memory_bytes": cases[form].program_bytes,
            "batches": n_batches,
            "batch_size": options.batch_size,
            "repeats": options.repeats,
        }
        for form in forms
    ]


def _times(seconds: np.ndarray, plain: np.ndarray) -> dict[str, Any]:
    """Median and spread over the rounds of seconds a batch, and of their ratio to plain in the same round."""
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
    tx = _optimizer(form, interval)
    state = _start_state(form, tx.init(parts.params))
    n_batches = batches.users.shape[0]
    schedule = np.arange(n_batches, dtype=np.int32) if form == "idle" else pass_schedule(state, n_batches)
    return compile_passes(parts, tx, state, schedule, batches)


def _optimizer(form: str, interval: int) -> optax.GradientTransformation:
    adam = optax.adam(LEARNING_RATE)
    if form == "mirror":
        return optax.chain(mirror_gradient(interval=interval), adam)
    if form == "mirrored":
        return mirrored(adam, interval=interval)
    if form == "sam":
        return sam(adam)
    if form == "idle":
        return optax.chain(mirror_gradient(interval=NEVER), adam)
    return adam


def _start_state(form: str, opt_state: Any) -> Any:
    """The state before batch 0; for `idle` before batch 1, so that batch 0 is not mirrored."""
    if form != "idle":
        return opt_state
    mirror, *rest = opt_state
    assert isinstance(mirror, MirrorState)
    return (mirror._replace(phase=jnp.ones_like(mirror.phase)), *rest)


def _peak_memory(case: Case) -> int:
    """Run once, for warmth; returns the most memory in use meanwhile (see above)."""
    reset_peak_memory()
    jax.block_until_ready(case.run(case.start()))
    return peak_memory()


def _plot(rows: list[Row]) -> Figure:
    """Ratio to plain by model and interval, a panel per dataset; a black bar marks each bound."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    forms = [form for form in BOUNDS if form != "plain" and any(row["form"] == form for row in rows)]
    figure = Figure(figsize=(10, 3.2 * len(sizes)), layout="constrained")
    for axes, size in zip(figure.subplots(len(sizes), squeeze=False)[:, 0], sizes, strict=True):
        shown = [row for row in rows if row["size"] == size]
        groups = list(dict.fromkeys((row["model"], row["interval"]) for row in shown))
        for column, form in enumerate(forms):
            width = 0.8 / len(forms)
            mine = [row for row in shown if row["form"] == form]
            x = [groups.index((row["model"], row["interval"])) + (column + 0.5) * width - 0.4 for row in mine]
            ratios = np.array([row["ratio_to_plain"] for row in mine])
            spread = np.array([row["spread"]["ratio_to_plain"] for row in mine]).reshape(-1, 2).T
            axes.bar(x, ratios, 0.9 * width, yerr=np.abs(spread - ratios), label=form, error_kw={"elinewidth": 0.8})
            axes.hlines(
                [row["bound"] for row in mine], np.array(x) - width / 2, np.array(x) + width / 2, colors="black"
            )
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(groups)), [f"{model}\ninterval {interval}" for model, interval in groups])
        axes.set_ylabel("time per batch / plain")
        axes.set_title(f"{size} (black: bound)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(rows[0]["device"])
    return figure


if __name__ == "__main__":
    sys.exit(Benchmark("step_throughput", __doc__, _measure, _options, plot=_plot).main())
