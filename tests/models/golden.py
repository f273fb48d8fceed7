"""What the parity tests share: recorded numbers of the published code, and models fed with them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mgrad_jax import models
from mgrad_jax.data import Batch, Interactions, load_interactions
from mgrad_jax.graph import SparseGraph, bipartite_edges, keep_edges, propagate, sparse_graph
from mgrad_jax.models import Recommender

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def recorded(file: str) -> dict[str, np.ndarray]:
    """The arrays of one file of recorded numbers."""
    with np.load(GOLDEN / f"{file}.npz") as numbers:
        return {key: numbers[key] for key in numbers.files}


@functools.cache
def tiny() -> Interactions:
    """The small set the numbers were recorded on."""
    return load_interactions(GOLDEN / "tiny")


def recorded_parameters(file: str) -> dict[str, np.ndarray]:
    """The published parameters of one file by published name."""
    return {key.removeprefix("param/"): x for key, x in recorded(file).items() if key.startswith("param/")}


def graph_of(dense: np.ndarray, dtype: Any, *, symmetric: bool = True) -> SparseGraph:
    """A dense matrix as a graph."""
    rows, columns = np.nonzero(dense)
    return sparse_graph(rows, columns, dense[rows, columns], dense.shape, symmetric=symmetric, dtype=dtype)


def dense_of(graph: SparseGraph) -> np.ndarray:
    """A graph as a dense matrix, by propagating the identity."""
    return np.asarray(propagate(graph, jnp.eye(graph.shape[1], dtype=graph.data.dtype)))


def recorded_pruned_graph(numbers: dict[str, np.ndarray], model: Any) -> SparseGraph:
    """The user-item graph of the edges that the recorded epoch kept, in float64."""
    edges = bipartite_edges(*numbers["graph/edge_indices"], model.n_users, model.n_items, dtype=jnp.float64)
    kept = np.isin(np.arange(edges.users.size), numbers["prune/kept_indices"])
    return keep_edges(edges, jnp.asarray(kept), model.n_keep)


def batch_of(numbers: dict[str, np.ndarray]) -> Batch:
    """The recorded batch."""
    names = ("users", "pos_items", "neg_items")
    return Batch(*(jnp.asarray(numbers[f"batch/{name}"], jnp.int32) for name in names))


def dotted(path: tuple[Any, ...]) -> str:
    """A parameter's path as `published_names` spells it."""
    return ".".join(map(str, path))


@functools.cache
def _created(name: str, x64: bool, hyper_parameters: tuple[tuple[str, Any], ...]) -> Recommender:
    return models.create(name, tiny(), **dict(hyper_parameters))


def created(name: str, **hyper_parameters: Any) -> Recommender:
    """A model of the small set, made once for all who ask for it and copied."""
    return nnx.clone(_created(name, jax.config.jax_enable_x64, tuple(hyper_parameters.items())))


class Structure:
    """A model without its arrays, as a static argument: equal models share a compiled program."""

    def __init__(self, graph_def: nnx.GraphDef[Recommender]) -> None:
        self.graph_def = graph_def

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.graph_def == other.graph_def

    def __hash__(self) -> int:
        """The same for all, as models hold lists."""
        return 0


@functools.partial(jax.jit, static_argnums=0)
def _embedded(structure: Structure, state: Any) -> Any:
    model = nnx.merge(structure.graph_def, state)
    return *model.embed(), model.scores(jnp.arange(model.n_users))


def embedded(model: Recommender) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of users and items, and all scores, in one program; equal models share it."""
    graph_def, state = nnx.split(model)
    return tuple(map(np.asarray, _embedded(Structure(graph_def), state)))


@functools.partial(jax.jit, static_argnums=(0, 4))
@functools.partial(jax.value_and_grad, argnums=1)
def _loss_and_gradients(structure: Structure, parameters: Any, rest: Any, batch: Any, loss: Any) -> Any:
    merged = nnx.merge(structure.graph_def, parameters, rest)
    return merged.loss(batch, jax.random.key(0))[0] if loss is None else loss(merged)


def loss_and_gradients(model: Recommender, batch: Batch, loss: Any = None) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and its gradients by path, kernels transposed as published; `loss(model)` replaces the training loss."""
    graph_def, parameters, rest = nnx.split(model, nnx.Param, ...)
    value, gradients = _loss_and_gradients(Structure(graph_def), parameters, rest, batch, loss)
    flat = {path: np.asarray(gradient[...]) for path, gradient in nnx.to_flat_state(gradients)}
    return float(value), {dotted(path): g.T if path[-1] == "kernel" else g for path, g in flat.items()}
