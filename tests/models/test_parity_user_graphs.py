"""DualGNN and DRAGON against recorded numbers of their published code, on the small set in `tests/golden`.

The recorded numbers are a float64 run. In float64 loss, gradients, embeddings and scores agree to 1e-9 (1e-6 where an
array was stored in float32), in float32 to 1e-4. What the epoch draws at random is fed as recorded.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import (
    batch_of,
    created,
    dense_of,
    embedded,
    graph_of,
    loss_and_gradients,
    recorded,
    recorded_parameters,
    tiny,
)

from mgrad_jax import interop, models
from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError
from mgrad_jax.graph import UserGraph, UserSample, sample_user_graph
from mgrad_jax.models import Constant, Recommender

NAMES = ("dualgnn", "dragon")


def build(name: str, dtype: Any, *, recorded_graph: bool = False, **changes: Any) -> Recommender:
    """A model with the recorded parameters and draws, on its own graphs or on the recorded ones."""
    numbers = recorded(name)
    model = created(name, dtype=dtype, **({"reg_weight": 0.01} | changes))
    if recorded_graph:
        model.graph = Constant(graph_of(numbers["graph/conv_adj"], dtype))
        if name == "dragon":
            model.item_graph = Constant(graph_of(numbers["graph/mm_adj"], dtype, symmetric=False))
    neighbours = jnp.asarray(numbers["graph/epoch_user_graph"], jnp.int32)
    model.user_sample.set_value(UserSample(neighbours, jnp.asarray(numbers["graph/user_weight_matrix"], dtype)))
    return interop.load_torch_state(model, recorded_parameters(name))


def compare(name: str, model: Recommender, atol: float, rtol: float = 0.0, stored_float32: float = 0.0) -> None:
    """Loss and every gradient, embeddings and scores."""
    numbers = recorded(name)
    rounded = json.loads(str(numbers["meta"]))["arrays_stored_float32"]

    def close(ours: Any, key: str) -> None:
        bound = max(atol, stored_float32) if key in rounded else atol
        np.testing.assert_allclose(ours, numbers[key], atol=bound, rtol=rtol, err_msg=key)

    loss, gradients = loss_and_gradients(model, batch_of(numbers))
    np.testing.assert_allclose(loss, numbers["out/loss"], rtol=max(rtol, atol))
    without = json.loads(str(numbers["meta"]))["params_without_gradient"]
    assert len(gradients) == len(recorded_parameters(name)) - len(without)
    for path, gradient in gradients.items():
        close(gradient, f"grad/{model.published_names[path]}")
    for ours, key in zip(embedded(model), ("out/user_emb", "out/item_emb", "out/scores"), strict=True):
        close(ours, key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_equals_the_published_numbers_in_float64(name: str) -> None:
    compare(name, build(name, jnp.float64, recorded_graph=True), atol=1e-9, stored_float32=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_own_graphs_are_the_published_ones(name: str) -> None:
    numbers, model = recorded(name), build(name, jnp.float64)
    np.testing.assert_allclose(dense_of(model.graph.get_value()), numbers["graph/conv_adj"], atol=1e-14)
    if name == "dragon":  # the published item graph has float32 values
        np.testing.assert_allclose(dense_of(model.item_graph.get_value()), numbers["graph/mm_adj"], atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_published_numbers_in_float32_on_our_graphs(name: str) -> None:
    compare(name, build(name, jnp.float32), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_the_users_neighbours_are_the_published_ones(name: str) -> None:
    """The same users with the same numbers; the order among equals is not published."""
    numbers, graph = recorded(name), jax.device_get(build(name, jnp.float64).user_graph.get_value())
    starts = numbers["graph/user_neighbours_indptr"]
    for user in range(tiny().n_users):
        rows = slice(starts[user], starts[user + 1])
        n = starts[user + 1] - starts[user]
        published = {
            "ids": numbers["graph/user_neighbours_indices"][rows],
            "counts": numbers["graph/user_neighbours_counts"][rows],
        }
        np.testing.assert_array_equal(graph.shared[user, :n], published["counts"])
        ours = dict(zip(graph.neighbours[user, :n].tolist(), graph.shared[user, :n].tolist(), strict=True))
        assert ours == dict(zip(published["ids"].tolist(), published["counts"].tolist(), strict=True))
        assert not graph.shared[user, n:].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_published_draws_can_come_from_our_rule(name: str) -> None:
    """Recorded lists begin with all neighbours and then repeat them; weights are the softmax over the list."""
    numbers, graph = recorded(name), jax.device_get(build(name, jnp.float32).user_graph.get_value())
    for user, (ids, weights) in enumerate(
        zip(numbers["graph/epoch_user_graph"], numbers["graph/user_weight_matrix"], strict=True)
    ):
        n = np.count_nonzero(graph.shared[user])
        assert set(ids) == set(ids[:n]) == set(graph.neighbours[user, :n].tolist())
        counts = np.exp(numbers["graph/user_cooccurrence"][user, ids])
        np.testing.assert_allclose(weights, counts / counts.sum(), atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_batch_users_see_the_same_neighbours_as_all_users(name: str) -> None:
    """The loss, which smooths the batch's users only, ranks by the differences of `scores`."""
    model, batch = build(name, jnp.float64), batch_of(recorded(name))
    users, positives, negatives = map(np.asarray, batch)
    scores = embedded(model)[2]
    differences = scores[users, positives] - scores[users, negatives]
    parts = jax.jit(model.loss)(batch, jax.random.key(0))[1]
    np.testing.assert_allclose(parts["bpr"], np.mean(np.logaddexp(0.0, -differences)) / np.log(2), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.usefixtures("x64")
def test_every_float_has_the_models_dtype(name: str, dtype: Any) -> None:
    model = models.create(name, tiny(), dtype=dtype, embedding_dim=8)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kinds == {jnp.dtype(dtype)}
    outputs = [model.loss(batch_of(recorded(name)), jax.random.key(0)), model.embed()]
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}


def with_only(modality: str) -> Interactions:
    return dataclasses.replace(tiny(), features={modality: tiny().features[modality]})


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_one_modality_suffices(name: str, modality: str) -> None:
    model = models.create(name, with_only(modality), embedding_dim=8)
    loss, gradients = loss_and_gradients(model, batch_of(recorded(name)))
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    users, items, _ = embedded(model)
    assert users.shape[1] == items.shape[1] == 8


@pytest.mark.parametrize("name", NAMES)
def test_initial_modality_weights_add_up_to_one(name: str) -> None:
    model = created(name, embedding_dim=8)
    weights = model.user_weights[...]
    np.testing.assert_allclose(jnp.sum(weights, axis=1), 1.0, atol=1e-6)
    assert 0 < np.std(weights) < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_draws_the_user_graph_anew(name: str) -> None:
    model = created(name, embedding_dim=8)
    resample = jax.jit(model.resample)
    first, other = (np.asarray(resample(jax.random.key(seed))["user_sample"].neighbours) for seed in (1, 2))
    assert not np.array_equal(first, other)
    graph = model.user_graph.get_value()
    neighbours, n = np.asarray(graph.neighbours), np.count_nonzero(graph.shared, axis=1)
    for sample in (first, other):
        for user in range(model.n_users):
            np.testing.assert_array_equal(sample[user, : n[user]], neighbours[user, : n[user]])


def test_another_user_graph_takes_effect() -> None:
    model = created("dualgnn", embedding_dim=8)
    alone = UserGraph(*np.zeros((2, tiny().n_users, 40), np.int32))
    before, _ = model.embed()
    model.use_user_graph(alone, jax.random.key(0))
    own, _ = model._representations()
    np.testing.assert_allclose(model.embed()[0], own, atol=1e-7)
    assert not np.allclose(before, own)
    with pytest.raises(UserError, match=r"shape \(40, 7\) and the model needs \(40, 40\)"):
        model.use_user_graph(UserGraph(*np.zeros((2, tiny().n_users, 7), np.int32)), jax.random.key(0))


@pytest.mark.usefixtures("x64")
def test_dualgnn_separate_modalities_equals_dense_numpy() -> None:
    numbers = recorded("dualgnn")
    users, items, _ = embedded(build("dualgnn", jnp.float64, separate_modalities=True))
    parts = {key.removeprefix("param/"): np.float64(x) for key, x in numbers.items() if key.startswith("param/")}
    views = []
    for branch, modality in (("v_gcn", "image"), ("t_gcn", "text")):
        hidden = tiny().features[modality] @ parts[f"{branch}.MLP.weight"].T + parts[f"{branch}.MLP.bias"]
        hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
        mapped = hidden @ parts[f"{branch}.MLP_1.weight"].T + parts[f"{branch}.MLP_1.bias"]
        x = np.concatenate([parts[f"{branch}.preference"], mapped])
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        adjacency = numbers["graph/conv_adj"]
        views.append(x + adjacency @ x + adjacency @ adjacency @ x)
    own = sum(weight * view[:40] for weight, view in zip(parts["weight_u"].transpose(1, 0, 2), views, strict=True))
    np.testing.assert_allclose(users, own + numbers["graph/user_graph_dense"] @ own, atol=1e-6)
    np.testing.assert_allclose(items, numbers["out/item_emb"], atol=1e-9)
    assert not np.allclose(users, numbers["out/user_emb"], atol=1e-2)


def test_dragon_steps_over_the_item_graph() -> None:
    """Without steps an item counts twice, as in the published sum h0 + M^n h0."""
    items = {n: embedded(build("dragon", jnp.float32, n_mm_layers=n))[1] for n in (0, 1, 2)}
    graph = recorded("dragon")["graph/mm_adj"]
    own = items[0] / 2
    np.testing.assert_allclose(items[1], own + graph @ own, atol=1e-5)
    np.testing.assert_allclose(items[2], own + graph @ graph @ own, atol=1e-5)


def test_resampling_compiles() -> None:
    model = created("dragon", embedding_dim=8)
    graph = model.user_graph.get_value()
    ours, compiled = (run(jax.random.key(3), graph) for run in (sample_user_graph, jax.jit(sample_user_graph)))
    np.testing.assert_array_equal(ours.neighbours, compiled.neighbours)
    np.testing.assert_allclose(ours.weights, compiled.weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "hyper_parameters"),
    [
        ("dualgnn", {"user_k": 0}),
        ("dualgnn", {"reg_weight": -1.0}),
        ("dragon", {"user_k": 0}),
        ("dragon", {"reg_weight": -1.0}),
        ("dragon", {"n_mm_layers": -1}),
        ("dragon", {"mm_image_weight": 1.5}),
        ("dragon", {"knn_k": 0}),
    ],
)
def test_a_value_out_of_range_is_a_user_error(name: str, hyper_parameters: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(hyper_parameters))} is "):
        models.create(name, tiny(), **hyper_parameters)
