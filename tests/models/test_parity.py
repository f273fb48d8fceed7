"""VBPR, BM3 and FREEDOM against recorded numbers of the published implementation, on the small set in `tests/golden`.

In float64, fed the recorded graphs, loss, every gradient, embeddings and scores agree to 1e-9 (the numbers are stored
in float64); in float32, on the graphs built here, to 1e-4.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden import (
    batch_of,
    created,
    dense_of,
    embedded,
    graph_of,
    loss_and_gradients,
    recorded,
    recorded_parameters,
    recorded_pruned_graph,
)

from mgrad_jax import interop
from mgrad_jax.models import Constant, EpochState, Recommender

SETTINGS: dict[str, dict[str, Any]] = {
    "vbpr": {"reg_weight": 0.01},
    "bm3": {"cl_weight": 2.0, "dropout": 0.0, "n_layers": 2, "reg_weight": 0.1},
    "freedom": {"dropout": 0.0, "knn_k": 10, "mm_image_weight": 0.1, "n_ui_layers": 2, "reg_weight": 0.01},
}
# In exact arithmetic these gradients are zero: positive and negative share the bias.
ZERO_GRADIENT = ("image_trs.bias", "text_trs.bias")


def build(name: str, dtype: Any, **changes: Any) -> Recommender:
    model = created(name, dtype=dtype, embedding_dim=8, **(SETTINGS[name] | changes))
    return interop.load_torch_state(model, recorded_parameters(name))


def feed_recorded_graphs(name: str, model: Recommender) -> None:
    if name != "vbpr":
        model.graph = Constant(graph_of(recorded(name)["graph/norm_adj"], jnp.float64))
    if name == "freedom":
        model.item_graph = Constant(graph_of(recorded(name)["graph/mm_adj"], jnp.float64, symmetric=False))


def compare(name: str, model: Recommender, atol: float, rtol: float = 0.0, prefix: str = "") -> None:
    numbers = recorded(name)
    loss, gradients = loss_and_gradients(model, batch_of(numbers))
    np.testing.assert_allclose(loss, numbers[f"{prefix}loss" if prefix else "out/loss"], rtol=max(rtol, atol))
    for path, gradient in gradients.items():
        published = f"{prefix}grad/{model.published_names[path]}"
        if published in numbers and not (name == "freedom" and path in ZERO_GRADIENT and rtol):
            np.testing.assert_allclose(gradient, numbers[published], atol=atol, rtol=rtol, err_msg=path)


def compare_scores(name: str, model: Recommender, atol: float) -> None:
    numbers = recorded(name)
    after = "pred" if name == "bm3" else "emb"
    users, items, scores = embedded(model)
    np.testing.assert_allclose(users, numbers[f"out/user_{after}"], atol=atol)
    np.testing.assert_allclose(items, numbers[f"out/item_{after}"], atol=atol)
    np.testing.assert_allclose(scores, numbers["out/scores"], atol=atol)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("x64")
def test_equals_the_published_numbers_in_float64(name: str) -> None:
    model = build(name, jnp.float64)
    feed_recorded_graphs(name, model)
    compare(name, model, atol=1e-9)
    compare_scores(name, model, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_published_numbers_in_float32_on_our_graphs(name: str) -> None:
    model = build(name, jnp.float32)
    compare(name, model, atol=1e-5, rtol=1e-4)
    compare_scores(name, model, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_bm3_representations_before_the_predictor() -> None:
    model = build("bm3", jnp.float64)
    feed_recorded_graphs("bm3", model)
    users, items = model.representations()
    np.testing.assert_allclose(users, recorded("bm3")["out/user_emb"], atol=1e-9)
    np.testing.assert_allclose(items, recorded("bm3")["out/item_emb"], atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_freedom_on_the_recorded_pruned_graph() -> None:
    numbers = recorded("freedom")
    model = build("freedom", jnp.float64, dropout=float(numbers["prune/dropout"]))
    feed_recorded_graphs("freedom", model)
    assert model.n_keep == numbers["prune/keep_len"]
    pruned = recorded_pruned_graph(numbers, model)
    np.testing.assert_allclose(dense_of(pruned), numbers["prune/masked_adj"], atol=1e-12)
    model.pruned_graph = EpochState(pruned)
    compare("freedom", model, atol=1e-9, prefix="prune/")


@pytest.mark.usefixtures("x64")
def test_freedom_builds_the_published_graphs() -> None:
    numbers = recorded("freedom")
    model = build("freedom", jnp.float64)
    np.testing.assert_allclose(dense_of(model.item_graph.get_value()), numbers["graph/mm_adj"], atol=1e-7)
    np.testing.assert_allclose(dense_of(model.graph.get_value()), numbers["graph/norm_adj"], atol=1e-7)
