"""What a training step costs under Mirror Gradient, beside the plain optimizer and beside the bound.

    python benchmarks/step_throughput.py --models vbpr bm3 freedom --sizes baby --intervals 1 3 5 7

One program runs several batches with the trainer's own passes (`mgrad_jax.training.epoch`); resampling, shuffling and
the draw of negatives, which every form does once an epoch alike, are left out, so that nothing dilutes the ratio. The
forms take turns in every round, and a ratio compares times of the same round. Forms:

    plain    Adam                                                                         bound 1
    mirror   optax.chain(mirror_gradient(interval), adam)                                 bound 1 + 1 / interval
    mirrored mirrored(adam, interval)                                                     bound 1 + 1 / interval
    sam      optax.contrib.sam(adam, opaque_mode=True)                                    bound 2
    idle     as mirror, with no batch ever mirrored: the transformation's own price       bound 1

Sizes are those of the paper's Table 1 (made up, power-law degrees), and `--data DIR` adds a dataset. The output is a
JSON list of rows; a file keeps rows of one device only, and a row measured again replaces its older self. The plot lies
beside it. `peak_memory_bytes` is of the device (on a GPU the most of all forms so far, which it cannot forget) or, on the
CPU, of this process with its data; `program_memory_bytes` is what XLA says the compiled program needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from _report import (
    RESULTS,
    Parser,
    check_at_least,
    check_choices,
    device_name,
    earlier_rows,
    exit_status,
    peak_memory,
    reset_peak_memory,
    versions,
    write_json,
)
from _settings import SETTINGS
from _steps import Case, compile_passes, random_batches
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mgrad_jax import MirrorState, mirror_gradient, mirrored, models
from mgrad_jax.data import Batch, Interactions, load_interactions, synthetic_interactions
from mgrad_jax.data.synthetic import SIZES, Size
from mgrad_jax.mirror import pass_schedule
from mgrad_jax.training.epoch import SplitModel, split_model

ALL_SIZES = {"quick": Size(300, 200, 3_000, 32, 16), **SIZES}
BOUNDS: dict[str, Callable[[int], float]] = {
    "plain": lambda interval: 1.0,
    "mirror": lambda interval: 1.0 + 1.0 / interval,
    "mirrored": lambda interval: 1.0 + 1.0 / interval,
    "sam": lambda interval: 2.0,
    "idle": lambda interval: 1.0,
}
NEVER = 2**30  # an interval that no run reaches


@exit_status
def main() -> None:
    """Measure what is asked for; print, write and plot it."""
    options = _options()
    _check(options)
    rows = _measure(options, earlier_rows(options.output))
    _print_table(rows)
    _plot(rows, options.output.with_suffix(".png"))


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", help="vbpr, bm3 and freedom by default")
    parser.add_argument("--sizes", nargs="+", help=f"of {', '.join(ALL_SIZES)} (default: baby; none with --data)")
    parser.add_argument("--data", help="a directory in MMRec format, or 'demo', measured under its own name")
    parser.add_argument("--intervals", nargs="+", type=int, default=[3])
    parser.add_argument("--forms", nargs="+", default=list(BOUNDS), help=f"of {', '.join(BOUNDS)}")
    parser.add_argument("--repeats", type=int, help="rounds (default 9)")
    parser.add_argument("--batches", type=int, help="batches a round, made a multiple of the interval (default 12)")
    parser.add_argument("--batch-size", type=int, help="interactions a batch (default 2048)")
    parser.add_argument("--quick", action="store_true", help="tiny defaults: does it run, not how fast")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_throughput.json")
    options = parser.parse_args()
    defaults = (2, 3, 256) if options.quick else (9, 12, 2048)
    for name, default in zip(("repeats", "batches", "batch_size"), defaults, strict=True):
        setattr(options, name, default if getattr(options, name) is None else getattr(options, name))
    options.models = options.models or (["vbpr"] if options.quick else ["vbpr", "bm3", "freedom"])
    if options.sizes is None:
        options.sizes = [] if options.data else ["quick" if options.quick else "baby"]
    return options


def _check(options: argparse.Namespace) -> None:
    for model in options.models:
        models.model_class(model)
    check_choices("--sizes", options.sizes, list(ALL_SIZES))
    check_choices("--forms", options.forms, list(BOUNDS))
    check_at_least("--intervals", options.intervals)
    for name in ("repeats", "batches", "batch_size"):
        check_at_least(f"--{name.replace('_', '-')}", getattr(options, name))


def _measure(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every model, size and interval; the file is written after each of them."""
    sources: list[str | None] = [*options.sizes, *([None] if options.data else [])]
    for size in sources:
        data = load_interactions(options.data) if size is None else synthetic_interactions(ALL_SIZES[size], name=size)
        for model in options.models:
            parts = split_model(models.create(model, data, **SETTINGS[model].hyper_parameters))
            for interval in options.intervals:
                print(f"{data.name}, {model}, interval {interval} ...", file=sys.stderr, flush=True)
                fresh = _group(parts, data, model, interval, options)
                keys = {_key(row) for row in fresh}
                rows = [row for row in rows if _key(row) not in keys] + fresh
                write_json(options.output, rows)
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["size"], row["source"], row["interval"], row["form"], row["batch_size"]


def _group(
    parts: SplitModel, data: Interactions, model: str, interval: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One model, size and interval: all forms in turns, a row each; plain is always among them."""
    forms = ["plain", *(form for form in options.forms if form != "plain")]
    n_batches = -(-options.batches // interval) * interval
    batches = random_batches(data, n_batches, options.batch_size)
    cases = {form: _prepare(form, interval, parts, batches) for form in forms}
    peaks = {form: _peak_memory(case) for form, case in cases.items()}
    seconds = _rounds(cases, options.repeats) / n_batches
    return [
        {
            "model": model,
            "size": data.name,
            "source": "synthetic" if data.source.startswith("synthetic") else "files",
            "interval": interval,
            "form": form,
            **_times(seconds[:, column], seconds[:, 0]),
            "bound": BOUNDS[form](interval),
            "gradients_per_batch": cases[form].passes / n_batches,
            "compile_seconds": cases[form].compile_seconds,
            "peak_memory_bytes": peaks[form],
            "program_memory_bytes": cases[form].program_bytes,
            "batches": n_batches,
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "device": device_name(),
            "versions": versions(),
        }
        for column, form in enumerate(forms)
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
    adam = optax.adam(1e-3)
    if form == "mirror":
        return optax.chain(mirror_gradient(interval=interval), adam)
    if form == "mirrored":
        return mirrored(adam, interval=interval)
    if form == "sam":
        return _sam(adam)
    if form == "idle":
        return optax.chain(mirror_gradient(interval=NEVER), adam)
    return adam


def _sam(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Optax's SAM with radius 0.05, deaf to the extra arguments that it would choke on."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    inner = optax.contrib.sam(optimizer, adversary, opaque_mode=True)

    def update_fn(updates: Any, state: Any, params: Any = None, *, grad_fn: Any, **_: Any) -> tuple[Any, Any]:
        return inner.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


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


def _rounds(cases: dict[str, Case], repeats: int) -> np.ndarray:
    """Seconds of every case in every round, (repeats, cases); each round begins with another case."""
    runs = list(cases.values())
    seconds = np.zeros((repeats, len(runs)))
    for number in range(repeats):
        for offset in range(len(runs)):
            column = (number + offset) % len(runs)
            carry = runs[column].start()
            started = time.perf_counter()
            jax.block_until_ready(runs[column].run(carry))
            seconds[number, column] = time.perf_counter() - started
    return seconds


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{rows[0]['device']}")
    for name in ("model", "size", "interval", "form"):
        table.add_column(name)
    for name in ("steps / s", "ratio to plain", "bound", "compile s", "peak GiB", "program GiB"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = row["spread"]["ratio_to_plain"]
        table.add_row(
            row["model"],
            row["size"],
            str(row["interval"]),
            row["form"],
            f"{row['steps_per_second']:.1f}",
            f"{row['ratio_to_plain']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['bound']:.3f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
            f"{row['program_memory_bytes'] / 2**30:.2f}",
        )
    console = Console(width=140)
    console.print(table)
    console.print(rows[0]["versions"])


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratio to plain by model and interval, a panel a size; a black bar marks each bound."""
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
        axes.set_ylabel("time a batch / plain")
        axes.set_title(f"{size} (black: bound)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{rows[0]['device']}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
