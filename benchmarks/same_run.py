"""How far a run over several devices is from the run on one: losses, metrics, and what is drawn at random.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/same_run.py --data data/tiktok --models vbpr freedom --devices 8

A run on one device whose parameters start 1e-7 away (relatively) is the measure: that far one device is from itself.
`losses` are the largest relative difference of an epoch's loss, `metrics` the largest difference of a metric, over the
epochs. `draws` says whether order, negatives and resampled graphs have equal bits. Virtual devices of one processor do:
nothing is timed.
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
from _settings import BATCH_SIZE, LEARNING_RATE, MIRROR, dataset, make_model
from _tables import Row
from flax import nnx

from mgrad_jax import devices, mirror_gradient, models
from mgrad_jax.data import Interactions
from mgrad_jax.data.sampling import sample_negatives, shuffle, user_history
from mgrad_jax.training import FitResult, fit

MODELS = ["vbpr", "freedom", "bm3", "layergcn", "grcn"]
NUDGE = 1e-7


def _options(parser: Parser) -> None:
    parser.add_argument("--data", default="demo", help="a directory in MMRec format, or 'demo'")
    parser.option("--models", MODELS, "models", ["vbpr"], choices=models.names())
    parser.number("--devices", [8], "numbers of devices", [2], least=2)
    parser.number("--epochs", 5, "epochs of each run", 1)
    parser.option("--precision", "float32", "type of all numbers", choices=("float32", "float64"))


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    data = dataset(options.data)
    jax.config.update("jax_enable_x64", options.precision == "float64")
    for name in options.models:
        say(name)
        one = _trained(name, data, options.epochs)
        nudged = _apart(_trained(name, data, options.epochs, nudge=NUDGE), one)
        for n in options.devices:
            mesh = devices.mesh(n)
            split = _apart(_trained(name, data, options.epochs, mesh=mesh), one)
            draws = _draws(name, data), _draws(name, data, mesh)
            is_equal = jax.tree.all(jax.tree.map(np.array_equal, *draws))
            row = {"model": name, "data": data.name, "devices": n, "epochs": options.epochs}
            row["precision"] = options.precision
            yield [{**row, "split": split, "nudged": nudged, "draws": "equal bits" if is_equal else "differ"}]


def _trained(name: str, data: Interactions, epochs: int, *, nudge: float = 0.0, mesh: Any = None) -> FitResult:
    model = make_model(name, data, dtype=jnp.result_type(float))
    if nudge:
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: x * jnp.asarray(1 + nudge, x.dtype), params))
    tx = optax.chain(mirror_gradient(**MIRROR), optax.adam(LEARNING_RATE))
    return fit(model, data, tx, epochs=epochs, batch_size=BATCH_SIZE, mesh=mesh)


def _apart(found: FitResult, expected: FitResult) -> dict[str, float]:
    """The largest differences of two runs."""
    pairs = list(zip(found.history, expected.history, strict=True))
    metrics = [abs(a.test[name] - b.test[name]) for a, b in pairs for name in a.test]
    return {"losses": max(abs(a.loss / b.loss - 1) for a, b in pairs), "metrics": max(metrics)}


def _draws(name: str, data: Interactions, mesh: Any = None) -> Any:
    """The order, the negatives and the resampled graphs of one key, on the host."""
    graphdef, state = nnx.split(make_model(name, data, dtype=jnp.result_type(float)))
    history, users = user_history(data), jnp.asarray(data.train[:, 0])

    def drawn(key: jax.Array, state: models.Variables) -> Any:
        order = shuffle(key, len(data.train))
        redrawn = nnx.merge(graphdef, state).resample(key)
        return devices.everywhere((order, sample_negatives(key, users[order], history), redrawn))

    with jax.set_mesh(devices.mesh(1) if mesh is None else mesh):
        return jax.device_get(jax.jit(drawn)(jax.random.key(0), state))


if __name__ == "__main__":
    sys.exit(Benchmark("same_run", __doc__, _measure, _options).main())
