"""How many items have other nearest items where a table is compared in a ring of tiles than on one device.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/nearest_items.py --data data/tiktok

Products of tiles round their last digit otherwise than those of whole rows, by which near ties may change places.
Virtual devices of one processor do: nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from _frame import Benchmark, Parser, say
from _settings import dataset
from _tables import Row

from mgrad_jax import devices
from mgrad_jax.graph import items, knn_indices

NEIGHBOURS = 10


def _options(parser: Parser) -> None:
    parser.add_argument("--data", default="demo", help="a directory in MMRec format, or 'demo'")
    parser.number("--devices", [2, 4, 8], "numbers of devices", [2], least=2)


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    data, always, usually = dataset(options.data), 0, items.RING_BYTES
    for precision in ("float32", "float64"):
        jax.config.update("jax_enable_x64", precision == "float64")
        for modality, table in data.features.items():
            say(f"{modality}, {precision}")
            features = table.astype(precision)
            items.RING_BYTES = usually
            one = np.asarray(knn_indices(features, NEIGHBOURS))
            items.RING_BYTES = always
            for n in options.devices:
                with devices.tables_of(devices.mesh(n)):
                    split = devices.loaded([features], jnp.dtype(precision))
                    found = np.asarray(knn_indices(split, NEIGHBOURS))
                row: Row = {"data": data.name, "features": modality, "precision": precision, "devices": n}
                row |= {"items": len(table), "columns": table.shape[1], "k": NEIGHBOURS}
                yield [{**row, "differ": int((found != one).any(axis=1).sum())}]


if __name__ == "__main__":
    sys.exit(Benchmark("nearest_items", __doc__, _measure, _options).main())
