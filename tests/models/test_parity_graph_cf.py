"""LayerGCN, SelfCF and SLMRec against recorded numbers of their published code; LightGCN against dense NumPy.

The recorded numbers are a float64 run on the small set in `tests/golden/tiny`. Fed the recorded graph, loss, gradients,
embeddings and scores agree to rounding in float64; on the graph built here, in float32, to 1e-4.
"""

from __future__ import annotations

import functools
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
    dotted,
    embedded,
    graph_of,
    loss_and_gradients,
    recorded,
    recorded_pruned_graph,
    tiny,
)

from mgrad_jax import models
from mgrad_jax.data import Batch
from mgrad_jax.errors import UserError
from mgrad_jax.graph import drop_entries, propagate
from mgrad_jax.models import Constant, EpochState, Recommender

KEY = 0

# model -> file of recorded numbers, hyper-parameters they were recorded with, parameters whose true gradient is zero
RECORDED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "layergcn": ("layergcn", {"n_layers": 4, "dropout": 0.0, "reg_weight": 1e-3}, ()),
    "selfcf": (
        "selfcfed_lgn",
        {"n_layers": 2, "dropout": 0.0, "reg_weight": 1e-3, "edge_dropout": False},
        (),
    ),
    "slmrec": (
        "slmrec",
        {"layer_num": 3, "ssl_alpha": 0.1, "ssl_temp": 0.2, "temp": 0.2},
        ("head_image.bias", "head_text.bias"),
    ),
}


def build(name: str, dtype: Any, **changes: Any) -> Recommender:
    """A model with the recorded parameters, on the graph it builds itself."""
    file, hyper_parameters, _ = RECORDED[name]
    model = created(name, dtype=dtype, embedding_dim=8, **(hyper_parameters | changes))
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert {dotted(path) for path in parameters} == set(model.published_names)
    for path, parameter in parameters.items():
        value = recorded(file)[f"param/{model.published_names[dotted(path)]}"]
        value = value.T if path[-1] == "kernel" else value
        assert parameter.shape == value.shape
        parameter[...] = jnp.asarray(value, dtype)
    return model


def assert_recorded(
    name: str, model: Recommender, loss: float, gradients: dict[str, np.ndarray], **bounds: Any
) -> None:
    """Loss and gradients equal those recorded, under `prefix` in the file where one is given."""
    file, _, no_gradient = RECORDED[name]
    prefix, atol, rtol = bounds.get("prefix", ""), bounds["atol"], bounds.get("rtol", 0.0)
    numbers = recorded(file)
    recorded_loss = numbers[f"{prefix}loss" if prefix else "out/loss"]
    np.testing.assert_allclose(loss, recorded_loss, rtol=max(rtol, atol))
    for path, gradient in gradients.items():
        if path not in no_gradient:
            expected = numbers[f"{prefix}grad/{model.published_names[path]}"]
            np.testing.assert_allclose(gradient, expected, atol=atol, rtol=rtol, err_msg=path)


def assert_scores(name: str, model: Recommender, atol: float) -> None:
    numbers = recorded(RECORDED[name][0])
    users, items, scores = embedded(model)
    if name == "slmrec":  # the sigmoid that ranking does not need
        scores = np.asarray(jax.nn.sigmoid(scores))
    if name == "selfcf":
        expected_users = np.concatenate([numbers["out/user_pred"], numbers["out/user_emb"]], axis=1)
        expected_items = np.concatenate([numbers["out/item_emb"], numbers["out/item_pred"]], axis=1)
    else:
        expected_users, expected_items = numbers["out/user_emb"], numbers["out/item_emb"]
    np.testing.assert_allclose(users, expected_users, atol=atol)
    np.testing.assert_allclose(items, expected_items, atol=atol)
    np.testing.assert_allclose(scores, numbers["out/scores"], atol=atol)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.usefixtures("x64")
def test_equals_the_published_numbers_in_float64(name: str) -> None:
    numbers = recorded(RECORDED[name][0])
    model = build(name, jnp.float64)
    model.graph = Constant(graph_of(numbers["graph/norm_adj"], jnp.float64))
    assert_recorded(name, model, *loss_and_gradients(model, batch_of(numbers)), atol=1e-9)
    assert_scores(name, model, atol=1e-9)


@pytest.mark.parametrize("name", RECORDED)
def test_equals_the_published_numbers_in_float32_on_our_graph(name: str) -> None:
    model = build(name, jnp.float32)
    loss, gradients = loss_and_gradients(model, batch_of(recorded(RECORDED[name][0])))
    assert_recorded(name, model, loss, gradients, atol=1e-5, rtol=1e-4)
    assert_scores(name, model, atol=1e-5)


# LayerGCN: pruning


@pytest.mark.usefixtures("x64")
def test_layergcn_on_the_recorded_pruned_graph() -> None:
    numbers = recorded("layergcn")
    model = build("layergcn", jnp.float64, dropout=float(numbers["prune/dropout"]))
    assert model.n_keep == numbers["prune/keep_len"]
    pruned = recorded_pruned_graph(numbers, model)
    np.testing.assert_allclose(dense_of(pruned), numbers["prune/masked_adj"], atol=1e-12)
    model.pruned_graph = EpochState(pruned)
    assert_recorded("layergcn", model, *loss_and_gradients(model, batch_of(numbers)), prefix="prune/", atol=1e-9)
    user_vectors, item_vectors = jax.jit(model._refine)(pruned)
    np.testing.assert_allclose(user_vectors, numbers["prune/user_emb"], atol=1e-9)
    np.testing.assert_allclose(item_vectors, numbers["prune/item_emb"], atol=1e-9)
    np.testing.assert_allclose(embedded(model)[0], numbers["out/user_emb"], atol=1e-6)  # scores: the whole graph


def test_layergcn_alternates_weighted_and_uniform_pruning() -> None:
    """Weighted drawing keeps the popular items' pairs less often, uniform drawing keeps all alike."""
    model = build("layergcn", jnp.float32, dropout=0.4)
    pairs = tiny().train
    popularity = np.bincount(pairs[:, 1])[pairs[:, 1]] * np.bincount(pairs[:, 0])[pairs[:, 0]]
    popular = popularity > np.median(popularity)
    user_of, item_of = jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1])

    graph_def, state = nnx.split(model)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, None))
    def kept(state: Any, key: Any, epoch: Any) -> Any:
        lane = nnx.merge(graph_def, state)
        lane.epoch.set_value(epoch)
        drawn = lane.resample(key)
        dense = propagate(drawn["pruned_graph"], jnp.eye(lane.n_users + lane.n_items))
        return dense[user_of, lane.n_users + item_of] > 0, drawn["epoch"]

    keys = jax.random.split(jax.random.key(1), 400)
    for epoch in range(4):
        drawn, following = kept(state, keys, jnp.asarray(epoch, jnp.int32))
        np.testing.assert_array_equal(following, epoch + 1)
        np.testing.assert_array_equal(np.sum(drawn, axis=1), 101)
        share = np.mean(drawn, axis=0)
        gap = share[~popular].mean() - share[popular].mean()
        assert (gap > 0.1) if epoch % 2 == 0 else (abs(gap) < 0.02)


def test_layergcn_without_dropout_has_nothing_to_resample() -> None:
    assert build("layergcn", jnp.float32).resample(jax.random.key(0)) == {}


def test_layergcn_survives_nodes_that_lose_all_their_edges() -> None:
    model = build("layergcn", jnp.float32, dropout=0.9)
    assert model.n_keep < model.n_items
    _, gradients = loss_and_gradients(model, batch_of(recorded("layergcn")))
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


# SelfCF: edge dropout


@pytest.mark.usefixtures("x64")
def test_selfcf_on_the_recorded_dropped_graph() -> None:
    numbers = recorded("selfcfed_lgn")
    model = build("selfcf", jnp.float64)
    batch = batch_of(numbers)
    dropped = graph_of(numbers["edge_dropout/adj"], jnp.float64, symmetric=False)
    loss, gradients = loss_and_gradients(model, batch, lambda m: m._loss_on(dropped, batch, jax.random.key(KEY))[0])
    assert_recorded("selfcf", model, loss, gradients, prefix="edge_dropout/", atol=1e-9)


def test_selfcf_drops_each_entry_by_itself_and_scales_the_rest() -> None:
    model = build("selfcf", jnp.float32, edge_dropout=True)
    full = dense_of(model.graph.get_value())
    rates = []
    training_graph = jax.jit(model._training_graph)
    for seed in range(20):
        dense = dense_of(training_graph(jax.random.key(seed)))
        kept = dense > 0
        scale = dense[kept] / full[kept]
        np.testing.assert_allclose(scale, scale[0], rtol=1e-5)  # one factor for all, 1 / (1 - rate)
        rate = 1 - 1 / scale[0]
        rates.append(rate)
        stored = np.count_nonzero(full)
        assert abs(kept.sum() / stored - (1 - rate)) < 5 * (rate * (1 - rate) / stored) ** 0.5 + 1e-6
        assert rate < 0.1 or rate > 0.9 or (kept != kept.T).any()  # the directions of an edge drop apart
    assert min(rates) < 0.3
    assert max(rates) > 0.7


@pytest.mark.usefixtures("x64")
def test_selfcf_dropped_graph_has_the_gradient_of_its_dense_matrix() -> None:
    model = build("selfcf", jnp.float64, edge_dropout=True)
    graph = drop_entries(jax.random.key(3), model.graph.get_value(), jnp.asarray(0.4))
    x = jax.random.normal(jax.random.key(4), (graph.shape[1], 3), jnp.float64)
    weights = jax.random.normal(jax.random.key(5), (graph.shape[0], 3), jnp.float64)
    gradient = jax.grad(lambda y: jnp.sum(weights * propagate(graph, y)))(x)
    np.testing.assert_allclose(gradient, dense_of(graph).T @ weights, atol=1e-12)


def test_selfcf_loss_follows_its_key() -> None:
    batch = batch_of(recorded("selfcfed_lgn"))
    for changes, depends in (
        ({"edge_dropout": True, "dropout": 0.0}, True),
        ({"edge_dropout": False, "dropout": 0.2}, True),
        ({"edge_dropout": False, "dropout": 0.0}, False),
    ):
        model = build("selfcf", jnp.float32, **changes)
        loss = jax.jit(model.loss)
        first, second = (float(loss(batch, jax.random.key(seed))[0]) for seed in (0, 1))
        assert (first != second) == depends, changes


# LightGCN: no recorded numbers; a dense reference in NumPy with gradients derived by hand


def lightgcn_reference(
    ego: np.ndarray, n_layers: int, batch: Batch, reg_weight: float, original: bool
) -> dict[str, np.ndarray | float]:
    data = tiny()
    n_users, n_nodes = data.n_users, data.n_users + data.n_items
    adjacency = np.zeros((n_nodes, n_nodes))
    adjacency[data.train[:, 0], n_users + data.train[:, 1]] = 1.0
    adjacency += adjacency.T
    degree = adjacency.sum(axis=1) + 1e-7
    normal = adjacency / np.sqrt(np.outer(degree, degree))
    smoother = sum(np.linalg.matrix_power(normal, layer) for layer in range(n_layers + 1)) / (n_layers + 1)
    nodes = smoother @ ego

    users = np.asarray(batch.users)
    positives, negatives = n_users + np.asarray(batch.positives), n_users + np.asarray(batch.negatives)
    size = len(users)
    apart = nodes[positives] - nodes[negatives]
    probability = 1.0 / (1.0 + np.exp(-np.sum(nodes[users] * apart, axis=1)))
    clip = 0.0 if original else 1e-10
    ranking = -np.mean(np.log(clip + probability))
    slope = (-probability * (1 - probability) / (clip + probability) / size)[:, None]
    by_node = np.zeros_like(nodes)
    np.add.at(by_node, users, slope * apart)
    np.add.at(by_node, positives, slope * nodes[users])
    np.add.at(by_node, negatives, -slope * nodes[users])
    gradient = smoother.T @ by_node

    penalty = 0.0
    for ids in (users, positives, negatives):
        norm = np.sqrt(np.sum(ego[ids] ** 2))
        penalty += norm**2 / (2 * size) if original else norm / size
        np.add.at(gradient, ids, reg_weight * ego[ids] / (size if original else size * norm))
    return {"loss": ranking + reg_weight * penalty, "gradient": gradient, "nodes": nodes}


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("n_layers", [0, 1, 3])
@pytest.mark.usefixtures("x64")
def test_lightgcn_equals_dense_numpy(n_layers: int, original: bool) -> None:
    model = created(
        "lightgcn",
        dtype=jnp.float64,
        embedding_dim=8,
        n_layers=n_layers,
        reg_weight=0.05,
        original_loss=original,
    )
    model.user_embedding[...] = 4 * model.user_embedding[...]  # differences large enough to tell losses apart
    ego = np.concatenate([model.user_embedding[...], model.item_embedding[...]])
    batch = batch_of(recorded("layergcn"))
    expected = lightgcn_reference(ego, n_layers, batch, 0.05, original)

    loss, gradients = loss_and_gradients(model, batch)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-12)
    gradient = np.concatenate([gradients["user_embedding"], gradients["item_embedding"]])
    np.testing.assert_allclose(gradient, expected["gradient"], atol=1e-12)
    users, items = np.split(expected["nodes"], [model.n_users])
    for ours, theirs in zip(embedded(model), (users, items, users @ items.T), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_lightgcn_in_float32() -> None:
    model = models.create("lightgcn", tiny(), embedding_dim=8)
    ego = np.concatenate([model.user_embedding[...], model.item_embedding[...]]).astype(np.float64)
    batch = batch_of(recorded("layergcn"))
    expected = lightgcn_reference(ego, 3, batch, 1e-4, original=False)
    loss, gradients = loss_and_gradients(model, batch)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    gradient = np.concatenate([gradients["user_embedding"], gradients["item_embedding"]])
    np.testing.assert_allclose(gradient, expected["gradient"], atol=1e-6)


# Hyper-parameters


@pytest.mark.parametrize(
    ("name", "hyper_parameters"),
    [
        ("layergcn", {"dropout": 1.0}),
        ("layergcn", {"dropout": -0.1}),
        ("layergcn", {"dropout": 0.999}),
        ("layergcn", {"n_layers": 0}),
        ("layergcn", {"reg_weight": -1.0}),
        ("selfcf", {"dropout": 1.0}),
        ("selfcf", {"n_layers": -1}),
        ("selfcf", {"reg_weight": -1.0}),
        ("lightgcn", {"n_layers": -1}),
        ("lightgcn", {"reg_weight": -1.0}),
        ("slmrec", {"embedding_dim": 1}),
        ("slmrec", {"layer_num": -1}),
        ("slmrec", {"ssl_temp": 0.0}),
        ("slmrec", {"temp": -1.0}),
        ("slmrec", {"ssl_alpha": -0.1}),
    ],
)
def test_a_value_out_of_range_is_a_user_error(name: str, hyper_parameters: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(hyper_parameters))):
        models.create(name, tiny(), **hyper_parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layergcn", "lightgcn", "selfcf", "slmrec"])
def test_losses_train_under_vmap_over_seeds(name: str) -> None:
    """Several models at once, as a grid trains them, give the losses they give one by one."""
    batch = batch_of(recorded("layergcn"))
    changes = {"dropout": 0.3} if name in ("layergcn", "selfcf") else {}
    lanes = [models.create(name, tiny(), embedding_dim=8, seed=seed, **changes) for seed in (0, 1)]
    graph_def = nnx.graphdef(lanes[0])
    states = [nnx.state(lane) for lane in lanes]
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(state: Any, key: Any) -> Any:
        model = nnx.merge(graph_def, state)
        for attribute, value in model.resample(key).items():
            getattr(model, attribute).set_value(value)
        return model.loss(batch, key)[0]

    together = jax.jit(jax.vmap(loss))(jax.tree.map(lambda *x: jnp.stack(x), *states), keys)
    apart = [jax.jit(loss)(state, key) for state, key in zip(states, keys, strict=True)]
    np.testing.assert_allclose(together, jnp.stack(apart), rtol=1e-5)
