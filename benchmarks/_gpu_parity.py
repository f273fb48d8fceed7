"""Recorded numbers of the published code against ours on this device, at one precision: step (a) of `gpu.py`.

    python benchmarks/_gpu_parity.py --mode default --output FILE

Losses, gradients, embeddings and scores of the ten models and two trajectories of two epochs, built as the parity tests
build them (`tests/models`). A deviation is the largest difference in an array over the largest recorded number in it; a
row keeps the largest over its arrays. Modes:

    highest   float32, `jax_default_matmul_precision` highest
    default   float32, products as the device does them by default (TF32 on recent NVIDIA cards)
    float64   on the recorded graphs

Arrays that were recorded in float32 bound the deviation in float64 to some 1e-7.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _frame import Benchmark, Parser
from _machine import cores
from _settings import PRECISIONS
from _steps import deviation
from _tables import Row
from flax import nnx

from mgrad_jax.models import Constant

TESTS = Path(__file__).resolve().parents[1] / "tests" / "models"
MODELS = {  # and the tests that build them
    **dict.fromkeys(("vbpr", "bm3", "freedom"), "test_parity"),
    **dict.fromkeys(("layergcn", "selfcf", "slmrec"), "test_parity_graph_cf"),
    **dict.fromkeys(("mmgcn", "grcn"), "test_parity_modal_graphs"),
    **dict.fromkeys(("dualgnn", "dragon"), "test_parity_user_graphs"),
}
TRAJECTORIES = [(model, run) for model in ("vbpr", "freedom") for run in ("adam", "sgd")]
# The name of embeddings and scores in the files, where it is not the usual one.
FILES = {"selfcf": "selfcfed_lgn"}


def _options(parser: Parser) -> None:
    parser.option("--mode", PRECISIONS[0], "precision", choices=PRECISIONS)


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """One model and one trajectory where everything is tiny."""
    jax.config.update("jax_enable_x64", options.mode == "float64")
    jax.config.update("jax_default_matmul_precision", "highest" if options.mode == "highest" else None)
    sys.path.insert(0, str(TESTS))
    dtype = jnp.float64 if options.mode == "float64" else jnp.float32
    names, runs = (["vbpr"], TRAJECTORIES[:1]) if options.quick else (list(MODELS), TRAJECTORIES)
    cases: dict[str, Callable[[], Row]] = {name: partial(_model, name, dtype) for name in names}
    cases |= {f"{model}, {run}": partial(_trajectory, model, run, dtype) for model, run in runs}
    # Nearly all of the time is compilation, which threads share.
    with ThreadPoolExecutor(min(8, cores())) as pool:
        found = list(pool.map(_guarded, cases.values()))
    yield [{"case": name, **row, "mode": options.mode} for name, row in zip(cases, found, strict=True)]


def _guarded(case: Callable[[], Row]) -> Row:
    """A case that cannot be computed is a row that says so."""
    try:
        return case()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _build(name: str, dtype: Any) -> Any:
    """A model as its parity tests build it, in float64 on the recorded graph."""
    tests, exact = import_module(MODELS[name]), dtype == jnp.float64
    if name in ("mmgcn", "grcn", "dualgnn", "dragon"):
        return tests.build(name, dtype, recorded_graph=exact)
    model = tests.build(name, dtype)
    if exact and name in ("vbpr", "bm3", "freedom"):
        tests.feed_recorded_graphs(name, model)
    elif exact:
        golden = import_module("golden")
        model.graph = Constant(golden.graph_of(golden.recorded(FILES.get(name, name))["graph/norm_adj"], dtype))
    return model


def _model(name: str, dtype: Any) -> Row:
    """Largest deviations of one model's loss, gradients and scores."""
    golden = import_module("golden")
    model, numbers = _build(name, dtype), golden.recorded(FILES.get(name, name))
    loss, gradients = golden.loss_and_gradients(model, golden.batch_of(numbers))
    published = {path: f"grad/{model.published_names[path]}" for path in gradients}
    # Where the true gradient is zero, what is recorded is rounding.
    compared = {p: k for p, k in published.items() if k in numbers and np.abs(numbers[k]).max() > 1e-12}
    scores = model.scores(jnp.arange(model.n_users))
    scores = jax.nn.sigmoid(scores) if name == "slmrec" else scores
    return {
        "loss": deviation(loss, numbers["out/loss"]),
        "gradients": max(deviation(gradients[path], numbers[key]) for path, key in compared.items()),
        "scores": deviation(scores, numbers["out/scores"]),
        "arrays": len(compared) + 2,
    }


def _trajectory(model: str, run: str, dtype: Any) -> Row:
    """Largest deviation of the parameters after any batch of two epochs, and of the losses."""
    tests = import_module("test_trajectories")
    numbers, names = import_module("golden").recorded(f"mg_{model}"), tests.build(model, jnp.float32).published_names
    trajectory, losses = tests.train(model, tests.transformation(model, run), dtype)
    deviations = []
    for t, params in enumerate(trajectory):
        for path, value in nnx.to_flat_state(params):
            dotted = ".".join(map(str, path))
            key = f"traj/{run}/{t}/{names[dotted]}"
            if key in numbers and dotted not in tests.ZERO_GRADIENT:
                array = np.asarray(value[...])
                deviations.append(deviation(array.T if path[-1] == "kernel" else array, numbers[key]))
    return {
        "loss": deviation([loss[-1] for loss in losses], numbers[f"traj/{run}/loss"]),
        "parameters": max(deviations),
        "arrays": len(deviations) + 1,
    }


if __name__ == "__main__":
    sys.exit(Benchmark("gpu_parity", __doc__, _measure, _options, kept=False).main())
