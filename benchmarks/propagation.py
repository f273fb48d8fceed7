"""Propagation at the size of Amazon Baby: `propagate` beside JAX's own sparse products, and beside the floor.

    python benchmarks/propagation.py

Two graphs on made-up data of that size, or another with `--size`: `user-item` (26,495 nodes, 237,102 entries,
symmetrically normalised) and `item` (7,050 nodes, the blend of two kNN graphs with k = 10). Each case is two steps of
propagation of 64 columns, y = A (A x), in value (`value`) or in value and gradient by x (`gradient`), the graph an
argument of the program:

    propagate   mgrad_jax.graph.propagate
    bipartite   mgrad_jax.graph.propagate_bipartite, what the models call (user-item only)
    bcoo        BCOO @ x of jax.experimental.sparse with its own derivative
    bcsr        BCSR @ x, likewise
    segment     gather and segment_sum over sorted rows, with the automatic derivative

and on a GPU, besides

    rows, split, cusparse   `propagate` by the other products of mgrad_jax.graph.kernels
    bcoo/cusparse, ...      bcoo and bcsr with JAX's cuSPARSE lowering on

`ratio` is the time over propagate's in the same round (above 1: slower). The floor counts the bytes that a product must
move (entries and row starts, x once, y once) at the bandwidth of a copy, measured in the same rounds; what lies in the
cache goes below it. `largest_difference` of the results is relative to propagate's largest number.
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
from _plots import bars
from _settings import SIZES, dataset
from _steps import deviation
from _tables import Row
from _timing import interleaved, ratios, spread
from jax.experimental import sparse
from matplotlib.figure import Figure

from mgrad_jax import graph as graphs
from mgrad_jax.graph import SparseGraph, gpu_product, propagate
from mgrad_jax.graph.kernels import PRODUCTS

TRAINING_PAIRS = 118_551  # of Amazon Baby's split
LAYERS = 2
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
    near = [(weight, graphs.knn_graph(data.features[name], 10)) for weight, name in ((0.1, "image"), (0.9, "text"))]
    return {
        "user-item": graphs.normalized_bipartite(pairs[:, 0], pairs[:, 1], data.n_users, data.n_items),
        "item": graphs.blend_graphs(near),
    }


def _products(graph: SparseGraph) -> dict[str, tuple[Any, Callable[[Any, Array], Array]]]:
    """By case: the matrix in its own format, an argument of the program, and the product."""
    indices = jnp.stack([graph.rows(), graph.indices], axis=1)
    compressed = (graph.data, graph.indices, graph.indptr)
    kind: dict[str, Any] = {"shape": graph.shape, "indices_sorted": True, "unique_indices": True}
    products: dict[str, tuple[Any, Callable[[Any, Array], Array]]] = {
        "propagate": (graph, propagate),
        "bcoo": (sparse.BCOO((graph.data, indices), **kind), operator.matmul),
        "bcsr": (sparse.BCSR(compressed, **kind), operator.matmul),
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
    return jnp.concatenate(graphs.propagate_bipartite(graph, x[: graph.n_users], x[graph.n_users :]))


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
                results[what, case] = jax.tree.leaves(jax.block_until_ready(compiled(*arguments)))
            except Exception as error:  # a product that this version or card does not have
                print(f"{name}, {what}, {case}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            compile_seconds[what, case] = time.perf_counter() - started
            runs[what, case] = partial(_repeated, partial(compiled, *arguments), options.calls)
    copy, copied_bytes = _copy(4 if options.quick else 256)
    runs["copy", ""] = partial(_repeated, copy, options.calls)
    jax.block_until_ready([run() for run in runs.values()])
    seconds = {key: np.array(times) / options.calls for key, times in interleaved(runs, options.repeats).items()}
    bandwidth = copied_bytes / seconds.pop(("copy", ""))
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
                "largest_difference": max(map(deviation, results[what, case], results[what, "propagate"])),
                "compile_seconds": compile_seconds[what, case],
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


def _plot(rows: list[Row]) -> Figure:
    """Milliseconds by case."""
    figure = bars(
        rows,
        panel="graph",
        groups=["case"],
        colour="what",
        value=lambda row: tuple(1e3 * row["seconds"][key] for key in ("median", "min", "max")),
        mark=lambda row: 1e3 * row["seconds_floor"]["median"],
        label="ms (black: floor)",
    )
    for axes in figure.axes:
        axes.set_yscale("log")
    return figure


if __name__ == "__main__":
    sys.exit(Benchmark("propagation", __doc__, _measure, _options, plot=_plot).main())
