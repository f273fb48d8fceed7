"""A grid of 12 members by one `sweep` against 12 single `fit` runs one after another: same results, in how much time.

    python benchmarks/sweep_throughput.py --model freedom --size demo --slots 1 4 12
    python benchmarks/sweep_throughput.py --model vbpr --data data/tiktok --slots 1

Both ways do everything from the data in memory to the last result: build models, compile, train, evaluate. A round
times the single runs and then the sweep at every number of slots; a ratio compares times of the same round, above 1
where the sweep is faster. JAX's persistent compilation cache is off. The output is a JSON list of rows of one device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from _report import RESULTS, Parser, check_at_least, device_name, exit_status, spread, spread_cell, versions, write_json
from rich.console import Console
from rich.table import Table

from mgrad_jax import models
from mgrad_jax.data import Interactions, demo_interactions, load_interactions, synthetic_interactions
from mgrad_jax.data.synthetic import SIZES
from mgrad_jax.training import FitResult, fit
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import expand_grid
from mgrad_jax.training.sweep import MemberResult, default_slots, sweep

GRID = {"alpha1": [0.5, 1.0], "alpha2": [0.1, 0.2], "seed": [1, 2, 3]}
QUICK_GRID = {"alpha1": [0.5, 1.0], "seed": [1]}


@exit_status
def main() -> None:
    """Measure, print and write."""
    options = _options()
    base = RunConfig(
        options.model,
        "demo",
        epochs=options.epochs,
        patience=options.epochs,
        batch_size=options.batch_size,
    )
    check_at_least("--slots", options.slots)
    data = _data(options)
    rows = _measure(base, data, options)
    _print_table(rows)
    write_json(options.output, rows)


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=models.names(), default="freedom")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--size", choices=["demo", *SIZES], default="demo")
    source.add_argument("--data", help="a directory in MMRec format, in place of a size")
    parser.add_argument("--slots", nargs="+", type=int, default=[default_slots()])
    parser.add_argument("--epochs", type=int, help="of every member, none stops early (default 20)")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, help="rounds (default 3)")
    parser.add_argument("--quick", action="store_true", help="two members, one epoch: does it run, not how fast")
    parser.add_argument("--output", type=Path, default=RESULTS / "sweep_throughput.json")
    options = parser.parse_args()
    options.epochs = options.epochs or (1 if options.quick else 20)
    options.repeats = options.repeats or (1 if options.quick else 3)
    return options


def _data(options: argparse.Namespace) -> Interactions:
    if options.data:
        return load_interactions(options.data)
    return demo_interactions() if options.size == "demo" else synthetic_interactions(SIZES[options.size])


def _measure(base: RunConfig, data: Interactions, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a number of slots."""
    members = expand_grid(base, QUICK_GRID if options.quick else GRID)
    _single(data, members[0])  # small programs that every later run finds compiled
    seconds: dict[int, list[float]] = {slots: [] for slots in options.slots}
    alone_seconds: list[float] = []
    differences = dict.fromkeys(options.slots, 0.0)
    for number in range(options.repeats):
        print(f"round {number + 1} of {options.repeats} ...", file=sys.stderr, flush=True)
        alone, elapsed = _timed(lambda: [_single(data, member) for member in members])
        alone_seconds.append(elapsed)
        for slots in options.slots:
            together, elapsed = _timed(lambda slots=slots: sweep(data, members, slots=slots))
            seconds[slots].append(elapsed)
            differences[slots] = max(differences[slots], _difference(together, alone))
    return [
        {
            "model": base.model,
            "size": data.name,
            "members": len(members),
            "epochs": base.epochs,
            "batch_size": base.batch_size,
            "slots": slots,
            "seconds_single_runs": spread(alone_seconds),
            "seconds_sweep": spread(seconds[slots]),
            "ratio": spread([a / b for a, b in zip(alone_seconds, seconds[slots], strict=True)]),
            "largest_metric_difference": differences[slots],
            "repeats": options.repeats,
            "device": device_name(),
            "versions": versions(),
        }
        for slots in options.slots
    ]


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def _single(data: Interactions, config: RunConfig) -> FitResult:
    model = models.create(config.model, data, seed=config.seed, **config.hyper_parameters)
    return fit(
        model,
        data,
        config.transformation(),
        epochs=config.epochs,
        patience=config.patience,
        seed=config.seed,
        batch_size=config.batch_size,
    )


def _difference(together: Sequence[MemberResult], alone: Sequence[FitResult]) -> float:
    """The largest difference of any validation or test metric at the best epoch."""
    return max(
        abs(value - getattr(b, split)[name])
        for a, b in zip(together, alone, strict=True)
        for split in ("valid", "test")
        for name, value in getattr(a, split).items()
    )


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{rows[0]['members']} members of {rows[0]['model']} on {rows[0]['size']}, {rows[0]['device']}")
    for name in ("slots", "single runs (s)", "sweep (s)", "ratio", "largest difference"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [spread_cell(row[name], 1) for name in ("seconds_single_runs", "seconds_sweep")]
        table.add_row(
            str(row["slots"]), *cells, spread_cell(row["ratio"], 2), f"{row['largest_metric_difference']:.1e}"
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    sys.exit(main())
