"""A grid of 12 members by one `sweep` against 12 single `fit` runs one after another: same results, in how much time.

    python benchmarks/sweep_throughput.py --model freedom --data demo --slots 1 4 12
    python benchmarks/sweep_throughput.py --model vbpr --data data/tiktok --slots 1

Both ways do everything from the data in memory to the last result: build models, compile, train, evaluate. A round
times the single runs and then the sweep at every number of slots; a ratio compares times of the same round, above 1
where the sweep is faster. JAX's persistent compilation cache is off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from _frame import Benchmark, Parser, say
from _settings import BATCH_SIZE, SOURCES, dataset
from _tables import Row
from _timing import ratios, spread

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.training import FitResult, fit
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import expand_grid
from mgrad_jax.training.sweep import MemberResult, default_slots, sweep

GRID: Mapping[str, Sequence[Any]] = {"alpha1": [0.5, 1.0], "alpha2": [0.1, 0.2], "seed": [1, 2, 3]}
QUICK_GRID: Mapping[str, Sequence[Any]] = {"alpha1": [0.5, 1.0], "seed": [1]}


def _options(parser: Parser) -> None:
    parser.option("--model", "freedom", "model", choices=models.names())
    parser.add_argument("--data", default="demo", help=SOURCES)
    parser.number("--slots", [default_slots()], "members side by side")
    parser.number("--epochs", 20, "of every member, none stops early", 1)
    parser.number("--batch-size", BATCH_SIZE, "interactions per batch")
    parser.number("--repeats", 3, "rounds", 1)


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """One row for each number of slots."""
    jax.config.update("jax_enable_compilation_cache", False)
    limits = {"epochs": options.epochs, "patience": options.epochs, "batch_size": options.batch_size}
    base = RunConfig(options.model, "demo", **limits)
    members = expand_grid(base, QUICK_GRID if options.quick else GRID)
    data = dataset(options.data)
    _single(data, members[0])  # small programs that every later run finds compiled
    seconds: dict[int, list[float]] = {slots: [] for slots in options.slots}
    alone_seconds: list[float] = []
    differences = dict.fromkeys(options.slots, 0.0)
    for number in range(options.repeats):
        say(f"round {number + 1} of {options.repeats}")
        alone, elapsed = _timed(lambda: [_single(data, member) for member in members])
        alone_seconds.append(elapsed)
        for slots in options.slots:
            together, elapsed = _timed(partial(sweep, data, members, slots=slots))
            seconds[slots].append(elapsed)
            differences[slots] = max(differences[slots], _difference(together, alone))
    yield [
        {
            "model": base.model,
            "size": data.name,
            "members": len(members),
            "epochs": base.epochs,
            "slots": slots,
            "seconds_single_runs": spread(alone_seconds),
            "seconds_sweep": spread(seconds[slots]),
            "ratio": ratios(alone_seconds, seconds[slots]),
            "largest_metric_difference": differences[slots],
        }
        for slots in options.slots
    ]


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def _single(data: Interactions, config: RunConfig) -> FitResult:
    model = models.create(config.model, data, seed=config.seed, **config.hyper_parameters)
    limits = {name: getattr(config, name) for name in ("epochs", "patience", "seed", "batch_size")}
    return fit(model, data, config.transformation(), **limits)


def _difference(together: Sequence[MemberResult], alone: Sequence[FitResult]) -> float:
    """The largest difference of any validation or test metric at the best epoch."""
    return max(
        float(abs(value - getattr(b, split)[name]))
        for a, b in zip(together, alone, strict=True)
        for split in ("valid", "test")
        for name, value in getattr(a, split).items()
    )


if __name__ == "__main__":
    sys.exit(Benchmark("sweep_throughput", __doc__, _measure, _options).main())
