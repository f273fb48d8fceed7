"""Propagation at the size of Amazon Baby: `propagate` beside JAX's own sparse products, and beside the floor.

    python benchmarks/propagation.py

Two graphs on made-up data of that size, or another with `--size`: `user-item` (26,495 nodes, 237,102 entries,
symmetrically normalised) and `item` (7,050 nodes, the blend of two kNN graphs with k = 10). Each case is two steps of propagation of 64 columns,
y = A (A x), in value (`value`) or in value and gradient by x (`gradient`), with the graph an argument of the program:

    propagate   mgrad_jax.graph.propagate
    bipartite   mgrad_jax.graph.propagate_bipartite, what the models call (user-item only)
    bcoo        BCOO @ x of jax.experimental.sparse with its own derivative
    bcsr        BCSR @ x, likewise
    segment     gather and segment_sum over sorted rows, with the automatic derivative

and on a GPU, besides

    rows, split, cusparse   `propagate` by the other products of mgrad_jax.graph.kernels
    bcoo/cusparse, ...      bcoo and bcsr with JAX's cuSPARSE lowering on

The cases take turns in every round; `ratio` is the time over propagate's in the same round (above 1: slower). The
floor counts the bytes that a product must move (entries and row starts, x once, y once) at the bandwidth of a copy,
measured in the same rounds; on a machine whose cache holds x, nothing can be faster and much is slower. Before the
timing all cases are compared: `largest_difference` is relative to propagate's largest number.
"""

from __future__ import annotations

import argparse
import contextlib
import operator
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _frame import Benchmark, Parser
from _settings import SIZES, dataset
from _tables import Row
from _timing import interleaved, ratios, spread
from jax.experimental import sparse
from matplotlib.figure import Figure

from mgrad_jax.graph import (
    SparseGraph,
    blend_graphs,
    gpu_product,
    knn_graph,
    normalized_bipartite,
    propagate,
    propagate_bipartite,
)
from mgrad_jax.graph.kernels import PRODUCTS

TRAINING_PAIRS = 118_551  # of Amazon Baby's split
LAYERS = 2
COPY = "copy"
CUSPARSE = "/cusparse"
Array = jax.Array


def _options(parser: Parser) -> None:
    parser.option("--size", "baby", "of the paper's Table 1", "quick", choices=list(SIZES))
    parser.number("--columns", 64, "width of x")
    parser.number("--repeats", 15, "rounds", 2)
    parser.number("--calls", 10, "calls per case and round, of which the mean is taken", 1)


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    for name, graph in _graphs(options.size).items():
        yield _rows(name, graph, options)


def _graphs(size: str) -> dict[str, SparseGraph]:
    data = dataset(size)
    pairs = np.random.default_rng(0).permutation(data.train)[: TRAINING_PAIRS if size == "baby" else None]
    near = [(weight, knn_graph(data.features[name], 10)) for weight, name in ((0.1, "image"), (0.9, "text"))]
    return {
        "user-item": normalized_bipartite(pairs[:, 0], pairs[:, 1], data.n_users, data.n_items),
        "item": blend_graphs(near),
    }


def _products(graph: SparseGraph) -> dict[str, tuple[Any, Callable[[Any, Array], Array]]]:
    """By case: the matrix in its own format, an argument of the program, and the product."""
    indices = jnp.stack([graph.rows(), graph.indices], axis=1)
    compressed = (graph.data, graph.indices, graph.indptr)
    products: dict[str, tuple[Any, Callable[[Any, Array], Array]]] = {
        "propagate": (graph, propagate),
        "bcoo": (
            sparse.BCOO((graph.data, indices), shape=graph.shape, indices_sorted=True, unique_indices=True),
            operator.matmul,
        ),
        "bcsr": (
            sparse.BCSR(compressed, shape=graph.shape, indices_sorted=True, unique_indices=True),
            operator.matmul,
        ),
        "segment": ((graph.data, indices), partial(_segment, graph.shape[0])),
    }
    if graph.n_users is not None:
        products["bipartite"] = graph, _bipartite
    if jax.default_backend() == "gpu":
        products |= {name: (graph, partial(_by, name)) for name in PRODUCTS if name != gpu_product.value}
        products |= {f"{name}{CUSPARSE}": products[name] for name in ("bcoo", "bcsr")}
    return products


def _by(name: str, graph: SparseGraph, x: Array) -> Array:
    with gpu_product(name):
        return propagate(graph, x)


@contextlib.contextmanager
def _lowering(case: str) -> Iterator[None]:
    """JAX's own products call cuSPARSE while this is on, if the case asks for it."""
    before = jax.config.jax_bcoo_cusparse_lowering  # type: ignore[attr-defined]
    jax.config.update("jax_bcoo_cusparse_lowering", case.endswith(CUSPARSE))
    yield
    jax.config.update("jax_bcoo_cusparse_lowering", before)


def _segment(n_rows: int, matrix: tuple[Array, Array], x: Array) -> Array:
    values, indices = matrix
    gathered = values[:, None] * x[indices[:, 1]]
    return jax.ops.segment_sum(gathered, indices[:, 0], n_rows, indices_are_sorted=True)


def _bipartite(graph: SparseGraph, x: Array) -> Array:
    return jnp.concatenate(propagate_bipartite(graph, x[: graph.n_users], x[graph.n_users :]))


def _program(what: str, product: Callable[[Any, Array], Array]) -> Any:
    """y = A (A x), or the value and gradient of <weights, y>; the sum keeps the compiler from dropping the value."""

    def layers(matrix: Any, x: Array) -> Array:
        for _ in range(LAYERS):
            x = product(matrix, x)
        return x

    if what == "value":
        return jax.jit(lambda matrix, x, weights: layers(matrix, x))
    return jax.jit(jax.value_and_grad(lambda x, matrix, weights: jnp.vdot(weights, layers(matrix, x))))


def _rows(name: str, graph: SparseGraph, options: argparse.Namespace) -> list[Row]:
    """All cases of one graph, and the copy, in turns: rows."""
    shape = graph.shape[0], options.columns
    x, weights = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    compile_seconds, results = {}, {}
    for what in ("value", "gradient"):
        for case, (matrix, product) in _products(graph).items():
            arguments = (matrix, x, weights) if what == "value" else (x, matrix, weights)
            started = time.perf_counter()
            try:
                with _lowering(case):
                    compiled = _program(what, product).lower(*arguments).compile()
                results[what, case] = jax.block_until_ready(compiled(*arguments))
            except Exception as error:  # a product that this version or card does not have
                print(f"{name}, {what}, {case}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            compile_seconds[what, case] = time.perf_counter() - started
            runs[what, case] = partial(_repeated, partial(compiled, *arguments), options.calls)
    copy, copied_bytes = _copy(4 if options.quick else 256)
    runs[COPY, COPY] = partial(_repeated, copy, options.calls)
    jax.block_until_ready([run() for run in runs.values()])
    seconds = {key: np.array(times) / options.calls for key, times in interleaved(runs, options.repeats).items()}
    bandwidth = copied_bytes / seconds.pop((COPY, COPY))
    rows = []
    for (what, case), times in seconds.items():
        floor = _bytes_to_move(graph, options.columns, what) / bandwidth
        rows.append(
            {
                "graph": name,
                "size": options.size,
                "what": what,
                "case": case,
                "nodes": graph.shape[0],
                "entries": graph.nnz,
                "columns": options.columns,
                "layers": LAYERS,
                "seconds": spread(times.tolist()),
                "ratio": ratios(times, seconds[what, "propagate"]),
                "seconds_floor": spread(floor.tolist()),
                "times_floor": ratios(times, floor),
                "copy_bytes_per_second": spread(bandwidth.tolist()),
                "largest_difference": _difference(results[what, case], results[what, "propagate"]),
                "compile_seconds": compile_seconds[what, case],
                "repeats": options.repeats,
                "calls": options.calls,
            }
        )
    return rows


def _repeated(run: Callable[[], Any], calls: int) -> Any:
    for _ in range(calls):
        result = jax.block_until_ready(run())
    return result


def _copy(mebibytes: int) -> tuple[Callable[[], Any], int]:
    """A copy far larger than any cache, and the bytes it moves: read once, written once."""
    table = jnp.ones((mebibytes * 2**18,), jnp.float32)
    # Not a bare copy, which the runtime might hand to another engine than the one that computes.
    compiled = jax.jit(lambda table: -table).lower(table).compile()
    return partial(compiled, table), 2 * table.nbytes


def _bytes_to_move(graph: SparseGraph, columns: int, what: str) -> int:
    """Entries, row starts, x and y of every product; the gradient takes as many products again."""
    product = 8 * graph.nnz + 4 * (graph.shape[0] + 1) + 2 * 4 * graph.shape[0] * columns
    return LAYERS * product * (1 if what == "value" else 2)


def _difference(result: Any, expected: Any) -> float:
    """The largest difference of any number, relative to the largest number of its array."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def _plot(rows: list[Row]) -> Figure:
    """Milliseconds by case, a panel per graph; a black bar marks the floor."""
    graphs, whats = (list(dict.fromkeys(row[key] for row in rows)) for key in ("graph", "what"))
    figure = Figure(figsize=(5 * len(graphs), 3.6), layout="constrained")
    for axes, graph in zip(figure.subplots(1, len(graphs), squeeze=False)[0], graphs, strict=True):
        shown = [row for row in rows if row["graph"] == graph]
        cases = list(dict.fromkeys(row["case"] for row in shown))
        for column, what in enumerate(whats):
            mine = [row for row in shown if row["what"] == what]
            x = np.array([cases.index(row["case"]) + 0.4 * column - 0.2 for row in mine])
            middle, low, high = (1e3 * np.array([row["seconds"][key] for row in mine]) for key in spread([0.0]))
            axes.bar(x, middle, 0.36, yerr=[middle - low, high - middle], label=what, error_kw={"elinewidth": 0.8})
            floor = 1e3 * np.array([row["seconds_floor"]["median"] for row in mine])
            axes.hlines(floor, x - 0.18, x + 0.18, colors="black")
        axes.set_xticks(range(len(cases)), cases)
        axes.set_yscale("log")
        axes.set_ylabel("ms (black: floor)")
        axes.set_title(f"{graph}, {shown[0]['entries']:,} entries")
        axes.legend()
    figure.suptitle(rows[0]["device"])
    return figure


if __name__ == "__main__":
    sys.exit(Benchmark("propagation", __doc__, _measure, _options, plot=_plot).main())
