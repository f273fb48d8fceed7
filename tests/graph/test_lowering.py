"""Every program that the library compiles is one that a GPU has rules for: lowered for CUDA, not compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgrad_jax import mirror_gradient, mirrored, models
from mgrad_jax.data import demo_interactions
from mgrad_jax.graph import (
    bipartite_edges,
    drop_entries,
    edge_dot,
    edge_softmax,
    gpu_product,
    items,
    mean_bipartite,
    prune_edges,
    replace_values,
)
from mgrad_jax.sharpness_aware import sam
from mgrad_jax.training import fit
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.sweep import sweep

DATA = demo_interactions(n_users=60, n_items=40, n_groups=4)
SMALL = {"embedding_dim": 4}
FORMS = {
    "plain": lambda: optax.adam(1e-3),
    "mirror": lambda: optax.chain(mirror_gradient(), optax.adam(1e-3)),
    "opaque": lambda: mirrored(optax.adam(1e-3)),
    "sam": lambda: sam(optax.adam(1e-3)),
}


@functools.cache
def model_of(name: str, **hyper_parameters: Any) -> models.Recommender:
    return models.create(name, DATA, **SMALL, **hyper_parameters)


class Lowered(Exception):
    """Both programs of a training are lowered; what follows would compile them."""


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, for_cuda: Callable[..., str]) -> Callable[[Callable[[], Any]], list[str]]:
    """The programs for CUDA of the epoch and of the evaluation that a call would compile for this machine."""
    texts: list[str] = []
    jit = jax.jit

    class Jitted:
        def __init__(self, function: Any, **options: Any) -> None:
            self.function = jit(function, **options)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return self.function(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.function, name)

        def lower(self, *arguments: Any) -> Any:
            texts.append(for_cuda(self.function, *arguments))
            return self

        def compile(self) -> Any:
            if len(texts) == 2:
                raise Lowered
            return self

    def lowered_by(call: Callable[[], Any]) -> list[str]:
        monkeypatch.setattr(jax, "jit", Jitted)
        try:
            with pytest.raises(Lowered):
                call()
        finally:
            monkeypatch.setattr(jax, "jit", jit)
        return texts

    return lowered_by


@pytest.mark.parametrize("form", FORMS)
def test_the_epoch_and_the_evaluation_of_every_form(form: str, programs: Any) -> None:
    train, evaluate = programs(lambda: fit(model_of("vbpr"), DATA, FORMS[form](), batch_size=240))
    assert "stablehlo.while" in train
    assert "stablehlo.while" in evaluate


def test_the_epoch_of_a_graph_model_by_a_product_of_its_own(programs: Any) -> None:
    with gpu_product("split"):
        texts = programs(lambda: fit(model_of("freedom", n_ui_layers=1), DATA, FORMS["mirror"](), batch_size=240))
    assert all("xla.gpu.triton" in text for text in texts)


def test_members_of_a_sweep_side_by_side(programs: Any) -> None:
    members = [RunConfig("freedom", "demo", seed=seed, batch_size=240, hyper_parameters=SMALL) for seed in (1, 2)]
    train, evaluate = programs(lambda: sweep(DATA, members, slots=2))
    assert f"tensor<2x{DATA.n_users}x4xf32>" in train
    assert f"tensor<2x{DATA.n_users}x4xf32>" in evaluate
    assert "xla.gpu.triton" not in train


def test_the_building_of_graphs(for_cuda: Callable[..., str]) -> None:
    users, chosen = DATA.train.T
    key, x = jax.random.key(0), jnp.ones((DATA.n_users + DATA.n_items, 4))
    edges = bipartite_edges(*np.unique(DATA.train, axis=0).T, DATA.n_users, DATA.n_items)
    graph = mean_bipartite(users, chosen, DATA.n_users, DATA.n_items)

    def attentive(graph: Any, x: Any) -> Any:
        return drop_entries(key, replace_values(graph, edge_softmax(graph, edge_dot(graph, x))), 0.1)

    table = jnp.asarray(DATA.features["image"])
    assert "top_k" in for_cuda(jax.jit(lambda table: items._knn(table, 5, 16)), table)
    assert "stablehlo.sort" in for_cuda(jax.jit(lambda key, edges: prune_edges(key, edges, 10)), key, edges)
    assert "stablehlo.scatter" in for_cuda(jax.jit(attentive), graph, x)
