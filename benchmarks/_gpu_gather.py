"""The gradient of gathered rows: XLA's scatter beside `gather_rows` by every product: step (d) of `gpu.py`.

    python benchmarks/_gpu_gather.py --output FILE

Rows of a table for a batch of 2,048 ids drawn with a power law, and the gradient of a sum of their squares: at the width
of the embeddings and at that of Amazon's image features. The cases take turns in every round; `distinct` counts the
different gradients, to the last bit, of ten runs.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import Parser, device_name, exit_status, interleaved, ratios, spread, versions, write_json

from mgrad_jax.graph import gather_rows, gpu_product
from mgrad_jax.graph.kernels import PRODUCTS

RUNS = 10


@exit_status
def main() -> None:
    """Measure and write."""
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny tables")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    shapes = [(60, 8, 32)] if options.quick else [(7_050, 64, 2_048), (7_050, 4_096, 2_048), (63_001, 4_096, 2_048)]
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        rows += _measure(*shape, 2 if options.quick else options.repeats)
        write_json(options.output, rows)


def _measure(n_rows: int, width: int, n_ids: int, repeats: int) -> list[dict[str, Any]]:
    """All cases at one shape, a row each."""
    rng = np.random.default_rng(0)
    weights = (1.0 + rng.permutation(n_rows)) ** -0.7
    ids = jnp.asarray(rng.choice(n_rows, n_ids, p=weights / weights.sum()), jnp.int32)
    table = jnp.asarray(rng.standard_normal((n_rows, width), np.float32))
    gathers = {"indexing": ("segment", lambda table, ids: table[ids]), **{p: (p, gather_rows) for p in PRODUCTS}}
    runs, distinct, errors = {}, {}, {}
    for name, (product, gather) in gathers.items():
        try:
            with gpu_product(product):
                gradient = jax.jit(jax.grad(lambda table, ids, gather=gather: jnp.sum(gather(table, ids) ** 2)))
                run = partial(gradient.lower(table, ids).compile(), table, ids)
            distinct[name] = len({np.asarray(run()[:200]).tobytes() for _ in range(RUNS)})
            runs[name] = run
        except Exception as error:  # one product must not hide the others
            errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
    seconds = interleaved(runs, repeats)
    common = {"rows": n_rows, "columns": width, "ids": n_ids, "device": device_name(), "versions": versions()}
    measured = [
        {
            "case": name,
            "seconds": spread(times),
            "ratio": ratios(times, seconds["indexing"]),
            "distinct": distinct[name],
            **common,
        }
        for name, times in seconds.items()
    ]
    return measured + [{"case": name, "error": error, **common} for name, error in errors.items()]


if __name__ == "__main__":
    sys.exit(main())
