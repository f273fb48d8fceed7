"""One contract for every registered model, on a dataset with a planted answer."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mgrad_jax import interop, mirror_gradient, models
from mgrad_jax.data import Batch, demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.models.adversarial import adversarial
from mgrad_jax.training import fit
from mgrad_jax.training.epoch import split_model

NAMES = models.names()
DATA = demo_interactions(n_users=120, n_items=80, n_groups=4)


@functools.cache
def created(name: str) -> models.Recommender:
    return models.create(name, DATA, seed=1, embedding_dim=16)


def create(name: str) -> models.Recommender:
    return nnx.clone(created(name))


def first_batch(n: int = 64) -> Batch:
    users, positives = DATA.train[:n].T
    negatives = (positives + 1 + np.arange(n) % 7) % DATA.n_items
    return Batch(*(jnp.asarray(x, jnp.int32) for x in (users, positives, negatives)))


def loss_of(model: models.Recommender) -> tuple[Any, models.Recommender]:
    parts = split_model(model)

    def loss(params: Any, batch: Batch, key: Any) -> Any:
        return nnx.merge(parts.graphdef, params, parts.epoch_state, parts.constants).loss(batch, key)[0]

    return loss, parts


@functools.cache
def loss_and_gradients(name: str) -> tuple[Any, models.Recommender]:
    """Their program, and the model's parts."""
    loss, parts = loss_of(created(name))
    return jax.jit(jax.value_and_grad(loss)), parts


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_finite_and_deterministic(name: str) -> None:
    run, parts = loss_and_gradients(name)
    value, gradients = run(parts.params, first_batch(), jax.random.key(0))
    again, _ = run(parts.params, first_batch(), jax.random.key(0))
    chex.assert_shape(value, ())
    assert value == again
    chex.assert_tree_all_finite(gradients)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_planted_groups_are_found(name: str) -> None:
    """Items of the user's own group, a quarter of all, fill well over a quarter of the lists after a short training."""
    model = create(name)
    tx = optax.chain(mirror_gradient(), optax.adam(1e-2))
    result = fit(model, DATA, tx, epochs=25, batch_size=256, seed=1)
    scores = np.array(model.scores(jnp.arange(DATA.n_users)))
    scores[DATA.train[:, 0], DATA.train[:, 1]] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :5]
    own_group = (best % 4 == np.arange(DATA.n_users)[:, None] % 4).mean()
    assert own_group > 0.5, own_group
    assert result.history[-1].loss < result.history[0].loss


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_products_of_the_embeddings(name: str) -> None:
    chosen = jnp.asarray([3, 0, 3, 1, 2])
    model = created(name)
    users, items = model.embed()
    assert users.shape == (DATA.n_users, items.shape[1])
    assert items.shape[0] == DATA.n_items
    np.testing.assert_allclose(model.scores(chosen), users[chosen] @ items.T, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_parameters_equals_a_loop(name: str) -> None:
    first, parts = loss_of(create(name))
    other = jax.tree.map(lambda x: x * 1.1, parts.params)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), parts.params, other)
    run = jax.value_and_grad(first)
    together = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(stacked, first_batch(), jax.random.key(0))
    run_alone = jax.jit(run)
    for member, params in enumerate((parts.params, other)):
        alone = run_alone(params, first_batch(), jax.random.key(0))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[member], b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_resampling_keeps_shapes_and_follows_its_key(name: str) -> None:
    model = created(name)
    resample = jax.jit(model.resample)
    first, again, other = (resample(jax.random.key(seed)) for seed in (1, 1, 2))
    for attribute, value in first.items():
        before = getattr(model, attribute).get_value()
        assert jax.tree.map(jnp.shape, value) == jax.tree.map(jnp.shape, before)
        assert jax.tree.map(jnp.result_type, value) == jax.tree.map(jnp.result_type, before)
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    if name == "freedom":
        assert not all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(other)))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_does_not_compile_again(name: str) -> None:
    run, parts = loss_and_gradients(name)
    for seed in range(3):
        run(jax.tree.map(lambda x, s=seed: x + s, parts.params), first_batch(), jax.random.key(seed))
    assert run._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_embeddings_lower_for_a_gpu(name: str) -> None:
    """Without a GPU nothing can be run on one, but a primitive without a rule for it would be refused here."""
    model = create(name)
    loss, parts = loss_of(model)
    batch = first_batch()
    traced = (
        jax.jit(jax.value_and_grad(loss)).trace(parts.params, batch, jax.random.key(0)),
        jax.jit(lambda parts: nnx.merge(*parts).embed()).trace(nnx.split(model)),
        jax.jit(model.resample).trace(jax.random.key(0)),
    )
    for program in traced:
        assert "func.func public @main" in program.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", NAMES)
def test_published_names_go_out_and_come_back(name: str) -> None:
    model, other = created(name), models.create(name, DATA, seed=2, embedding_dim=16)
    state = interop.torch_state(model)
    assert set(state) <= set(model.published_names.values())
    interop.load_torch_state(other, state)
    np.testing.assert_array_equal(model.scores(jnp.arange(5)), other.scores(jnp.arange(5)))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_hyper_parameter_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"no hyper-parameter 'n_laiers'; choose among embedding_dim"):
        models.create(name, DATA, n_laiers=2)


@pytest.mark.parametrize("name", [n for n in NAMES if models.model_class(n).needs])
def test_missing_features_are_named(name: str) -> None:
    with pytest.raises(UserError, match=r"needs image (or|and) text features and there are none; add image_feat.npy"):
        models.create(name, dataclasses.replace(DATA, features={}))


@pytest.mark.parametrize("name", [n for n in NAMES if models.model_class(n).compares_items])
def test_items_without_a_direction_are_named_with_modality_and_rows(name: str) -> None:
    text = DATA.features["text"].copy()
    text[[3, 8]] = 0
    data = dataclasses.replace(DATA, features={**DATA.features, "text": text})
    with pytest.raises(UserError, match=r"2 rows \(3, 8\) of text_feat\.npy are all zero; .*--fill-features"):
        models.create(name, data)
    assert models.model_class("vbpr").obstacle(data, models.make_config("vbpr", {})) is None


@pytest.mark.parametrize("name", [n for n in NAMES if models.model_class(n).needs])
def test_one_feature_suffices_where_the_words_say_or(name: str) -> None:
    cls, config = models.model_class(name), models.make_config(name, {})
    data = dataclasses.replace(DATA, features={"text": DATA.features["text"]})
    assert (cls.obstacle(data, config) is None) == (" or " in cls.needs_in_words())


@pytest.mark.parametrize("name", [n for n in NAMES if not models.model_class(n).needs])
def test_models_without_features_train_without_them(name: str) -> None:
    model = models.create(name, dataclasses.replace(DATA, features={}), seed=1, embedding_dim=16)
    assert np.isfinite(jax.jit(model.loss)(first_batch(), jax.random.key(0))[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_explains_itself(name: str) -> None:
    model = models.model_class(name)
    assert model.name == name
    assert model.paper
    assert all(field.metadata["help"] for field in dataclasses.fields(model.config_class))
    axes = {field.name for field in dataclasses.fields(model.config_class)} | {"learning_rate"}
    assert set(model.grid) <= axes
    for axis, values in model.grid.items():
        for value in values:
            if axis != "learning_rate":
                models.make_config(name, {axis: value})


@pytest.mark.parametrize("name", [*NAMES, "adversarial"])
def test_a_model_says_whether_its_loss_stops_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adversarial(create("vbpr"), epsilon=0.1, weight=1.0) if name == "adversarial" else created(name)
    original, callers = jax.lax.stop_gradient, []

    def stop_gradient(x: Any) -> Any:
        callers.append(sys._getframe(1).f_globals["__name__"])
        return original(x)

    monkeypatch.setattr(jax.lax, "stop_gradient", stop_gradient)
    jax.eval_shape(lambda batch, key: model.loss(batch, key), first_batch(), jax.random.key(0))
    # JAX's own functions, softmax for one, stop what no value depends on.
    assert any(caller.startswith("mgrad_jax.") for caller in callers) == model.stops_gradient
