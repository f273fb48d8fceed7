"""What a training step must cost at least on this machine, and what it costs.

    python benchmarks/floors.py --data data/tiktok

A step of plain Adam, the trainer's own pass over a batch (`_steps.py`), beside two floors that no program can go below
with this optimizer:

    traffic     parameters and both moments read once and written once, at the bandwidth of a pass that reads and writes
                as many bytes (which is that of the cache where they fit into it)
    arithmetic  the operations of the step's dense products, at the rate of a product of two 2,048 x 2,048 matrices in
                float32

`distance` is the step's time over the larger of the two. Neither knows of gathers, of gradients that are written and read
again, or of the sparse products, so a distance of 1 is out of reach. Steps, passes and products take turns in every
round; medians. The output is a JSON list of rows of one device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _report import (
    RESULTS,
    Parser,
    check_at_least,
    device_name,
    earlier_rows,
    exit_status,
    interleaved,
    spread,
    spread_cell,
    versions,
    write_json,
)
from _settings import BATCH_SIZE, LEARNING_RATE, SETTINGS
from _steps import compile_passes, random_batches
from rich.console import Console
from rich.table import Table

from mgrad_jax import models
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.training.epoch import split_model

N_BATCHES = 10
SIDE = 2048  # of the matrices whose product gives the rate of arithmetic


@exit_status
def main() -> None:
    """Measure, print and write."""
    options = _options()
    check_at_least("--repeats", options.repeats)
    check_at_least("--batch-size", options.batch_size)
    data = load_interactions(options.data)
    earlier_rows(options.output)
    rows = []
    for model in options.models:
        print(model, "...", file=sys.stderr, flush=True)
        rows.append(_row(model, data, options))
    _print_table(rows)
    write_json(options.output, rows)


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", default="demo", help="a directory in MMRec format, or 'demo'")
    parser.add_argument("--models", nargs="+", choices=models.names(), help="all by default")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--repeats", type=int, help="rounds (default 7)")
    parser.add_argument("--quick", action="store_true", help="tiny defaults: does it run, not how fast")
    parser.add_argument("--output", type=Path, default=RESULTS / "floors.json")
    options = parser.parse_args()
    options.models = options.models or (["vbpr"] if options.quick else models.names())
    if options.repeats is None:
        options.repeats = 1 if options.quick else 7
    return options


def _row(model: str, data: Interactions, options: argparse.Namespace) -> dict[str, Any]:
    parts = split_model(models.create(model, data, **SETTINGS[model].hyper_parameters))
    tx = optax.adam(LEARNING_RATE)
    batches = random_batches(data, N_BATCHES, options.batch_size)
    case = compile_passes(parts, tx, tx.init(parts.params), np.arange(N_BATCHES, dtype=np.int32), batches)
    state = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(parts.params))
    carries = [case.start() for _ in range(options.repeats + 1)]  # made ahead: a run consumes its own
    jax.block_until_ready(case.run(carries.pop()))
    traffic, product = _traffic(state), _product()
    cases = {"step": lambda: case.run(carries.pop()), "traffic": traffic, "product": product}
    seconds = interleaved(cases, options.repeats)
    steps = [x / N_BATCHES for x in seconds["step"]]
    bandwidth, rate = 2 * state * N_BATCHES / median(seconds["traffic"]), 2 * SIDE**3 / median(seconds["product"])
    floors = {"traffic": 2 * state / bandwidth, "arithmetic": case.operations / rate}
    return {
        "model": model,
        "data": data.name,
        "trained_numbers": sum(leaf.size for leaf in jax.tree.leaves(parts.params)),
        "state_bytes": state,
        "operations": case.operations,
        "bandwidth": bandwidth,
        "operations_per_second": rate,
        "seconds_per_step": spread(steps),
        "floor_seconds": floors,
        "distance": median(steps) / max(floors.values()),
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "device": device_name(),
        "versions": versions(),
    }


def _traffic(size: int) -> Callable[[], Any]:
    """Read and write this many bytes in place, as often as a case makes steps."""
    carry = [jnp.zeros(size // 4, jnp.float32)]
    passes = jax.jit(lambda x: jax.lax.fori_loop(0, N_BATCHES, lambda _, x: x + 1.0, x), donate_argnums=0)

    def run() -> Any:
        carry[0] = passes(carry[0])
        return carry[0]

    jax.block_until_ready(run())
    return run


def _product() -> Callable[[], Any]:
    matrix = jnp.ones((SIDE, SIDE), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(matrix, matrix))
    return lambda: product(matrix, matrix)


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{rows[0]['data']}, {rows[0]['device']}")
    table.add_column("model")
    for name in ("trained", "ms a step", "traffic", "arithmetic", "distance", "GB/s", "GFLOP/s"):
        table.add_column(name, justify="right")
    for row in rows:
        floors = row["floor_seconds"]
        table.add_row(
            row["model"],
            f"{row['trained_numbers'] / 1e6:.2f} M",
            spread_cell(row["seconds_per_step"], 1, 1e3),
            f"{1e3 * floors['traffic']:.1f}",
            f"{1e3 * floors['arithmetic']:.1f}",
            f"{row['distance']:.1f}",
            f"{row['bandwidth'] / 1e9:.1f}",
            f"{row['operations_per_second'] / 1e9:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
