"""The gradient of gathered rows: XLA's scatter beside `gather_rows` by every product: step (d) of `gpu.py`.

    python benchmarks/_gpu_gather.py --output FILE

Rows of a table for a batch of 2,048 ids drawn with a power law, and the gradient of a sum of their squares: at the
width of the embeddings and at that of Amazon's image features. The cases take turns in every round; `distinct` counts
the different gradients, to the last bit, of ten runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _frame import Benchmark, Parser
from _tables import Row
from _timing import interleaved, ratios, spread

from mgrad_jax.graph import gather_rows, gpu_product
from mgrad_jax.graph.kernels import PRODUCTS

RUNS = 10


def _options(parser: Parser) -> None:
    parser.number("--repeats", 15, "rounds", 2)


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    shapes = [(60, 8, 32)] if options.quick else [(7_050, 64, 2_048), (7_050, 4_096, 2_048), (63_001, 4_096, 2_048)]
    for shape in shapes:
        yield _rows(*shape, options.repeats)


def _rows(n_rows: int, width: int, n_ids: int, repeats: int) -> list[Row]:
    """All cases at one shape."""
    rng = np.random.default_rng(0)
    weights = (1.0 + rng.permutation(n_rows)) ** -0.7
    ids = jnp.asarray(rng.choice(n_rows, n_ids, p=weights / weights.sum()), jnp.int32)
    table = jnp.asarray(rng.standard_normal((n_rows, width), np.float32))
    gathers = {"indexing": ("segment", lambda table, ids: table[ids]), **{p: (p, gather_rows) for p in PRODUCTS}}
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, Row] = {}
    for name, (product, gather) in gathers.items():
        try:
            with gpu_product(product):
                gradient = jax.jit(jax.grad(lambda table, ids, gather=gather: jnp.sum(gather(table, ids) ** 2)))
                run = partial(gradient.lower(table, ids).compile(), table, ids)
            found[name] = {"distinct": len({np.asarray(run()[:200]).tobytes() for _ in range(RUNS)})}
            runs[name] = run
        except Exception as error:  # one product must not hide the others
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    seconds = interleaved(runs, repeats)
    for name, times in seconds.items():
        found[name] |= {"seconds": spread(times), "ratio": ratios(times, seconds["indexing"])}
    common = {"rows": n_rows, "columns": width, "ids": n_ids}
    return [{"case": name, **row, **common} for name, row in found.items()]


if __name__ == "__main__":
    sys.exit(Benchmark("gpu_gather", __doc__, _measure, _options, kept=False).main())
