"""What a training step must cost at least on this machine, and what it costs.

    python benchmarks/floors.py --data data/tiktok

A step of plain Adam, the trainer's own pass over a batch (`_steps.py`), beside two floors that no program can go below
with this optimizer:

    traffic     parameters and both moments read once and written once, at the bandwidth of a pass that reads and writes
                as many bytes (which is that of the cache where they fit into it)
    arithmetic  the operations of the step's dense products, at the rate of a product of two 2,048 x 2,048 matrices in
                float32

`distance` is the step's time over the larger of the two. Neither knows of gathers, of gradients that are written and
read again, or of the sparse products, so a distance of 1 is out of reach.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _frame import Benchmark, Parser, say
from _settings import BATCH_SIZE, LEARNING_RATE, SOURCES, dataset, make_model
from _steps import compile_passes, random_batches
from _tables import Row
from _timing import interleaved, spread

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.training.epoch import split_model

N_BATCHES = 10
SIDE = 2048  # of the matrices whose product gives the rate of arithmetic


def _options(parser: Parser) -> None:
    parser.add_argument("--data", default="demo", help=SOURCES)
    parser.option("--models", models.names(), "models", ["vbpr"], choices=models.names())
    parser.number("--batch-size", BATCH_SIZE, "interactions per batch")
    parser.number("--repeats", 7, "rounds", 1)


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    data = dataset(options.data)
    for model in options.models:
        say(model)
        yield [_row(model, data, options)]


def _row(model: str, data: Interactions, options: argparse.Namespace) -> Row:
    parts = split_model(make_model(model, data))
    tx = optax.adam(LEARNING_RATE)
    batches = random_batches(data, N_BATCHES, options.batch_size)
    case = compile_passes(parts, tx, tx.init(parts.params), np.arange(N_BATCHES, dtype=np.int32), batches)
    jax.block_until_ready(case.run(case.start()))
    state = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(parts.params))
    cases: dict[str, Callable[..., Any]] = {"step": case.run, "traffic": _traffic(state), "product": _product()}
    seconds = interleaved(cases, options.repeats, {"step": case.start})
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


if __name__ == "__main__":
    sys.exit(Benchmark("floors", __doc__, _measure, _options).main())
