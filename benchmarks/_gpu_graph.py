"""Graph operations on this device against dense ones, in every product, and whether they repeat: step (a) of `gpu.py`.

    python benchmarks/_gpu_graph.py --output FILE

A user-item graph with a power law is propagated in value, in both first derivatives and in a second derivative, by each
product of `mgrad_jax.graph.kernels`; the reference is a dense product in float64 on the host. `deviation` is the
largest difference over the largest number; `distinct` counts the different results, to the last bit, in ten
gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _frame import Benchmark
from _steps import deviation
from _tables import Row

from mgrad_jax.data import Interactions, synthetic_interactions
from mgrad_jax.data.synthetic import Size
from mgrad_jax.graph import gpu_product, normalized_bipartite, propagate, with_transpose
from mgrad_jax.graph.kernels import PRODUCTS

RUNS = 10


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    data = synthetic_interactions(Size(60, 40, 400) if options.quick else Size(3_000, 1_500, 60_000), features=False)
    for product in PRODUCTS:
        for dtype in ("float32", "float64"):
            try:
                found = _compared(product, dtype, data)
            except Exception as error:  # one product must not hide the others
                found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            yield [{"product": product, "type": dtype, **found}]


def _compared(product: str, dtype: str, data: Interactions) -> Row:
    with jax.enable_x64(dtype == "float64"), gpu_product(product):
        graph = normalized_bipartite(data.train[:, 0], data.train[:, 1], data.n_users, data.n_items, dtype=dtype)
        graph = with_transpose(graph)
        x, weights = np.random.default_rng(0).normal(size=(2, graph.shape[0], 32)).astype(dtype)

        def loss(values: Any, x: Any) -> Any:
            return jnp.vdot(weights, jnp.sin(propagate(dataclasses.replace(graph, data=values), x)))

        gradient = jax.jit(jax.grad(loss, (0, 1)))
        ours = {"value": jax.jit(propagate)(graph, x)}
        ours["by values"], ours["by x"] = gradient(graph.data, x)
        ours["second"] = jax.jit(lambda v, x: jax.jvp(jax.grad(loss, 1), (v, x), (jnp.zeros_like(v), x))[1])(
            graph.data, x
        )
        repeated = {np.asarray(gradient(graph.data, x)[1]).tobytes() for _ in range(RUNS)}
        dense = _dense(graph, x, weights)
    found = {name: deviation(array, dense[name]) for name, array in ours.items()}
    return {"deviation": found, "distinct": len(repeated), "entries": graph.nnz}


def _dense(graph: Any, x: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The same in NumPy and float64, derivatives by hand."""
    rows, columns = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr)), np.asarray(graph.indices)
    matrix = np.zeros(graph.shape)
    matrix[rows, columns] = graph.data
    x, weights = x.astype(np.float64), weights.astype(np.float64)
    y = matrix @ x
    pull = weights * np.cos(y)
    return {
        "value": y,
        "by values": np.sum(pull[rows] * x[columns], axis=1),
        "by x": matrix.T @ pull,
        "second": matrix.T @ (-weights * np.sin(y) * y),  # along x itself
    }


if __name__ == "__main__":
    sys.exit(Benchmark("gpu_graph", __doc__, _measure, kept=False).main())
