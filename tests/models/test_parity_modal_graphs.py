"""MMGCN and GRCN against recorded numbers of their published code, on the small set in `tests/golden`.

The recorded numbers are a float64 run. In float64 loss, gradients, embeddings and scores agree to 1e-9 (1e-6 where an
array was stored in float32), in float32 to 1e-4. The options, which have no recorded numbers, are compared with dense
NumPy.
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
from mgrad_jax.models import Constant, Recommender

NAMES = ("mmgcn", "grcn")
SETTINGS: dict[str, dict[str, Any]] = {
    "mmgcn": {"embedding_dim": 8, "reg_weight": 0.01},
    "grcn": {"embedding_dim": 8, "latent_embedding": 8, "n_layers": 3, "reg_weight": 0.01},
}


# MMGCN's tables, which the published checkpoints lack: argument of `use_tables` -> recorded name
TABLES = {"ids": "id_embedding", "image": "v_gcn.preference", "text": "t_gcn.preference"}


def build(name: str, dtype: Any, *, recorded_graph: bool = False, **changes: Any) -> Recommender:
    """A model with the recorded parameters, on its own graph or on the recorded one."""
    model = created(name, dtype=dtype, **(SETTINGS[name] | changes))
    if name == "mmgcn" and recorded_graph:
        model.graph = Constant(graph_of(recorded(name)["graph/mean_adj"], dtype, symmetric=False))
    if name == "mmgcn":
        model.use_tables(**{ours: recorded(name)[f"const/{published}"] for ours, published in TABLES.items()})
    parameters = recorded_parameters(name)
    if changes.get("train_tables"):
        parameters |= {published: recorded(name)[f"const/{published}"] for published in TABLES.values()}
    return interop.load_torch_state(model, parameters)


def compare(name: str, model: Recommender, atol: float, rtol: float = 0.0, stored_float32: float = 0.0) -> None:
    """Loss and every gradient, embeddings and scores."""
    numbers = recorded(name)
    rounded = json.loads(str(numbers["meta"]))["arrays_stored_float32"]
    loss, gradients = loss_and_gradients(model, batch_of(numbers))
    np.testing.assert_allclose(loss, numbers["out/loss"], rtol=max(rtol, atol))
    assert len(gradients) == len(recorded_parameters(name))
    for path, gradient in gradients.items():
        key = f"grad/{model.published_names[path]}"
        bound = max(atol, stored_float32) if key in rounded else atol
        np.testing.assert_allclose(gradient, numbers[key], atol=bound, rtol=rtol, err_msg=path)
    for ours, key in zip(embedded(model), ("out/user_emb", "out/item_emb", "out/scores"), strict=True):
        np.testing.assert_allclose(ours, numbers[key], atol=atol, rtol=rtol)


@pytest.mark.parametrize("recorded_graph", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_equals_the_published_numbers_in_float64(name: str, recorded_graph: bool) -> None:
    model = build(name, jnp.float64, recorded_graph=recorded_graph)
    compare(name, model, atol=1e-9, stored_float32=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_published_numbers_in_float32_on_our_graph(name: str) -> None:
    compare(name, build(name, jnp.float32), atol=1e-5, rtol=1e-4)


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
    model = models.create(name, with_only(modality), **SETTINGS[name])
    loss, gradients = loss_and_gradients(model, batch_of(recorded(name)))
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    users, items, _ = embedded(model)
    assert users.shape[1] == items.shape[1] == (8 if name == "mmgcn" else 16)


# MMGCN: tables


@pytest.mark.usefixtures("x64")
def test_mmgcn_graph_is_the_published_one() -> None:
    model = build("mmgcn", jnp.float64)
    np.testing.assert_allclose(dense_of(model.graph.get_value()), recorded("mmgcn")["graph/mean_adj"], atol=1e-15)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_mmgcn_with_trained_tables_starts_from_the_published_numbers() -> None:
    """Nothing changes but that the tables have gradients, and those are the slopes of the loss."""
    numbers, batch = recorded("mmgcn"), batch_of(recorded("mmgcn"))
    model = build("mmgcn", jnp.float64, train_tables=True)
    loss, gradients = loss_and_gradients(model, batch)
    np.testing.assert_allclose(loss, numbers["out/loss"], rtol=1e-9)
    for path in (
        "image.map.bias",
        "image.layers.0.merge.kernel",
        "text.layers.0.conv",
        "text.layers.2.residual.kernel",
    ):
        np.testing.assert_allclose(gradients[path], numbers[f"grad/{model.published_names[path]}"], atol=1e-9)
    assert set(gradients) == set(model.published_names)
    step = 1e-7  # small enough to meet no kink of the leaky ReLUs
    for path, holder in {
        "id_embedding": model.id_embedding,
        "image.preference": model.image.preference,
        "text.preference": model.text.preference,
    }.items():
        before = holder[...]
        direction = jax.random.normal(jax.random.key(0), before.shape, before.dtype)
        values = []
        for sign in (1, -1):
            holder[...] = before + sign * step * direction
            values.append(float(model.loss(batch, jax.random.key(0))[0]))
        holder[...] = before
        slope = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradients[path] * direction), slope, rtol=1e-5, err_msg=path)


def test_mmgcn_tables_follow_their_own_seed() -> None:
    def tables(**changes: Any) -> list[Any]:
        model = models.create("mmgcn", tiny(), **({"embedding_dim": 8} | changes))
        return [model.id_embedding[...], model.image.preference[...], model.text.preference[...]]

    first, same, other = tables(seed=1), tables(seed=2), tables(seed=1, table_seed=5)
    assert all(map(np.array_equal, first, same))
    assert not any(map(np.array_equal, first, other))
    for table in first:  # Xavier normal, as published
        np.testing.assert_allclose(np.std(table), (2 / sum(table.shape)) ** 0.5, rtol=0.1)


def test_mmgcn_penalty_is_a_constant() -> None:
    batch = batch_of(recorded("mmgcn"))
    without, with_penalty = (
        loss_and_gradients(build("mmgcn", jnp.float32, reg_weight=weight), batch) for weight in (0.0, 0.1)
    )
    assert with_penalty[0] > without[0]
    for path, gradient in without[1].items():
        np.testing.assert_allclose(gradient, with_penalty[1][path], atol=1e-7, err_msg=path)


# GRCN: edges


@pytest.mark.usefixtures("x64")
def test_grcn_attention_and_edge_weights_are_the_published_ones() -> None:
    numbers = recorded("grcn")
    model = build("grcn", jnp.float64)
    graph = model.graph.get_value()
    sources, targets = np.concatenate([numbers["graph/edge_index"], numbers["graph/edge_index"][::-1]], axis=1)

    def as_dense(per_edge: np.ndarray) -> np.ndarray:
        dense = np.zeros(graph.shape)
        dense[targets, sources] = per_edge
        return dense

    attentions = [model._modality_view(graph, modality)[0] for modality in ("image", "text")]
    weights = model._edge_weights(graph, attentions)
    assert 0 < np.count_nonzero(weights) < weights.size
    for ours, published in zip([*attentions, weights], ("v_attention", "t_attention", "edge_weight"), strict=True):
        dense = dataclasses.replace(graph, data=ours).todense()
        np.testing.assert_allclose(dense, as_dense(numbers[f"out/{published}"]), atol=1e-12)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
@pytest.mark.usefixtures("x64")
def test_grcn_routing_from_items_to_users_equals_dense_numpy(n_layers: int) -> None:
    model = build("grcn", jnp.float64, item_to_user_routing=True, n_layers=n_layers)
    users, items = (unit(np.random.default_rng(n).normal(size=(n, 8))) for n in (model.n_users, model.n_items))
    routed = model._routed(model.graph.get_value(), jnp.asarray(users), jnp.asarray(items))
    linked = recorded("grcn")["graph/train_matrix"] > 0
    for _ in range(n_layers):
        weights = np.where(linked, np.exp(users @ items.T), 0.0)
        users = unit(users + weights / weights.sum(axis=1, keepdims=True) @ items)
    np.testing.assert_allclose(routed, users, atol=1e-12)
    default = embedded(build("grcn", jnp.float64))[0]
    assert np.allclose(embedded(model)[0], default) == (n_layers == 0)


@pytest.mark.usefixtures("x64")
def test_grcn_number_of_routing_steps_changes_nothing_as_published() -> None:
    first, other = (embedded(build("grcn", jnp.float64, n_layers=n_layers)) for n_layers in (1, 4))
    assert all(map(np.array_equal, first, other))


# Hyper-parameters


@pytest.mark.parametrize(
    ("name", "hyper_parameters"),
    [
        ("mmgcn", {"dim_latent": 0}),
        ("mmgcn", {"reg_weight": -1.0}),
        ("mmgcn", {"table_seed": -1}),
        ("grcn", {"latent_embedding": 0}),
        ("grcn", {"n_layers": -1}),
        ("grcn", {"reg_weight": -1.0}),
    ],
)
def test_a_value_out_of_range_is_a_user_error(name: str, hyper_parameters: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(hyper_parameters))} is "):
        models.create(name, tiny(), **hyper_parameters)
