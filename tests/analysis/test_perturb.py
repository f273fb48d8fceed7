"""Changes at inference against what they must do: known probabilities, untouched rows, permuted features."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mgrad_jax import models
from mgrad_jax.analysis.perturb import (
    FeatureChange,
    NoiseCase,
    ShareCase,
    TableNoise,
    choose,
    item_tables,
    variable_at,
)
from mgrad_jax.data import demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.models.base import Constant, Recommender

DATA = demo_interactions(n_users=40, n_items=30, n_groups=3)
NAMES = models.names()
SLOW = ("dragon", "dualgnn", "freedom", "grcn", "mmgcn")  # to make
KEY = jax.random.key(3)
GIVEN = {"own": {m: jnp.asarray(t) for m, t in DATA.features.items()}, "other": {}}


class Factors(Recommender):
    """User and item vectors, and nothing else."""

    name = "factors"
    item_tables = ("item_embedding",)

    def __init__(self, users: Any, items: Any) -> None:
        self.n_users, self.n_items, self.dtype = len(users), len(items), jnp.float32
        self.user_embedding = Constant(jnp.asarray(users, jnp.float32))
        self.item_embedding = nnx.Param(jnp.asarray(items, jnp.float32))

    def embed(self) -> tuple[jax.Array, jax.Array]:
        return self.user_embedding[...], self.item_embedding[...]


def create(name: str, **hyper_parameters: Any) -> Recommender:
    return models.create(name, DATA, seed=1, embedding_dim=8, **hyper_parameters)


def noise(scale: float, key: Any = KEY, gain: float = 1.0) -> NoiseCase:
    return NoiseCase(jnp.float32(gain), jnp.float32(scale), key)


@partial(jax.jit, static_argnums=1)
def scored(model: Recommender, change: TableNoise | None = None, case: Any = None) -> tuple[jax.Array, jax.Array]:
    """The model's vectors inside a program, as the analysis makes them."""
    model = jax.tree.map(lambda x: x, model)
    return model.embed() if change is None else change.embed(model, {}, case)


def embed(model: Recommender, change: TableNoise, case: NoiseCase) -> tuple[np.ndarray, np.ndarray]:
    users, items = scored(model, change, case)
    return np.asarray(users), np.asarray(items)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_two_items_keep_their_order_with_the_known_probability(scale: float) -> None:
    user, items = np.array([[0.6, 0.8]]), np.array([[1.0, 0.2], [0.1, 0.5]])
    model, change = Factors(user, items), TableNoise(("item_embedding",))
    margin, sigma = float(user[0] @ (items[0] - items[1])), scale * math.sqrt(np.mean(items**2))
    keys = jax.random.split(KEY, 20_000)

    @jax.jit
    def kept(model: Recommender) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            users, noisy = change.embed(jax.tree.map(lambda x: x, model), {}, noise(scale, key))
            return jnp.dot(users[0], noisy[0] - noisy[1]) > 0

        return jnp.mean(jax.vmap(one)(keys))

    expected = 0.5 * (1 + math.erf(margin / (math.sqrt(2) * sigma) / math.sqrt(2)))
    assert float(kept(model)) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(keys)))


def test_noise_of_scale_0_changes_nothing_and_gain_0_leaves_only_noise_of_the_tables_size() -> None:
    model, change = Factors(np.ones((2, 3)), np.arange(300.0).reshape(100, 3)), TableNoise(("item_embedding",))
    table = np.asarray(model.item_embedding[...])
    np.testing.assert_array_equal(embed(model, change, noise(0.0))[1], table)
    np.testing.assert_array_equal(embed(model, change, noise(0.0, gain=0.0))[1], np.zeros_like(table))
    rms = math.sqrt(np.mean(table**2))
    for per in ("table", "row", "none"):
        alone = embed(model, TableNoise(("item_embedding",), per), noise(1.0, gain=0.0))[1]
        assert math.sqrt(np.mean(alone**2)) == pytest.approx(rms, rel=0.1)
        assert abs(np.mean(alone)) < rms / 4
    assert (np.asarray(model.item_embedding[...]) == table).all()


def test_the_unit_of_a_scale_is_the_table_the_row_or_1() -> None:
    table = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    model = Factors(np.ones((1, 2)), table)
    unit = embed(model, TableNoise(("item_embedding",), "none"), noise(2.0))[1] - table
    by_table = embed(model, TableNoise(("item_embedding",), "table"), noise(2.0))[1] - table
    by_row = embed(model, TableNoise(("item_embedding",), "row"), noise(2.0))[1] - table
    np.testing.assert_allclose(by_table, unit * math.sqrt(np.mean(table**2)), rtol=1e-5)
    np.testing.assert_allclose(by_row, unit * np.sqrt(np.mean(table**2, axis=1, keepdims=True)), rtol=1e-5, atol=1e-7)
    assert (by_row[1] == 0).all()


def test_the_same_draw_reaches_every_training() -> None:
    change = TableNoise(("item_embedding",), "none")
    tables = np.random.default_rng(0).normal(size=(2, 20, 4))
    made = [embed(Factors(np.ones((1, 4)), t), change, noise(1.0))[1] - t for t in tables]
    np.testing.assert_allclose(made[0], made[1], atol=1e-6)
    other = embed(Factors(np.ones((1, 4)), tables[0]), change, noise(1.0, jax.random.key(4)))[1] - tables[0]
    assert np.abs(made[0] - other).max() > 0.5


def test_noise_may_enter_the_scored_vectors() -> None:
    model = create("lightgcn")
    users, items = scored(model)
    noisy_users, noisy_items = embed(model, TableNoise((), "table"), noise(1.0))
    np.testing.assert_allclose(noisy_users, users, atol=1e-6)
    assert np.sqrt(np.mean((noisy_items - np.asarray(items)) ** 2)) == pytest.approx(
        float(jnp.sqrt(jnp.mean(items**2))), rel=0.2
    )


def test_huge_noise_leaves_chance_of_pure_factors() -> None:
    rng = np.random.default_rng(0)
    users = rng.normal(size=(400, 8))
    items = np.concatenate([3 * users.mean(axis=0, keepdims=True), rng.normal(size=(99, 8))])
    model, change = Factors(users, items), TableNoise(("item_embedding",))
    noisy = [embed(model, change, noise(1e6, jax.random.key(draw)))[1] for draw in range(20)]
    share = [np.mean((users @ items.T).argmax(axis=1) == 0) for items in noisy]
    assert np.mean(share) == pytest.approx(1 / 100, abs=0.03)


# --- the contract of the models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NAMES])
def test_scores_are_made_of_the_tables_and_features_that_a_model_names(name: str) -> None:
    model = create(name)
    clean = np.asarray(scored(model)[1])
    for path in model.item_tables:
        changed = nnx.clone(model)
        variable = variable_at(changed, path)
        variable.set_value(variable.get_value()[::-1])
        assert np.abs(np.asarray(scored(changed)[1]) - clean).max() > 1e-3
    for path in model.feature_graphs:
        assert variable_at(model, path).get_value().shape == (DATA.n_items, DATA.n_items)
    if model.features_in_scores:
        swapped = FeatureChange("swap", ("image", "text")).features(GIVEN, ShareCase(30, KEY))
        changed = nnx.clone(model)
        tables = changed.feature_tables(swapped)
        assert set(tables) == set(changed.expose_features())
        for path, table in tables.items():
            variable_at(changed, path).set_value(table)
        vectors = [np.asarray(x) for x in scored(changed)]
        assert np.abs(vectors[1] - clean).max() > 1e-3
        if not model.feature_graphs:  # which are of the features before the change
            permuted = dataclasses.replace(DATA, features={m: np.asarray(t) for m, t in swapped.items()})
            expected = scored(models.create(name, permuted, seed=1, embedding_dim=8))
            for ours, theirs in zip(vectors, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
def test_a_table_that_scores_are_not_made_of_changes_nothing() -> None:
    model = create("freedom")
    for path in ("image_embedding", "text_embedding"):
        assert item_tables(model, [path]) == (path,)
    change = TableNoise(("image_embedding", "text_embedding"))
    for before, after in zip(scored(model), scored(model, change, noise(5.0)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_rows_of_users_in_a_shared_table_stay() -> None:
    users, items = np.ones((4, 3)), np.ones((6, 3))

    class Shared(Factors):
        def embed(self) -> tuple[jax.Array, jax.Array]:
            return self.item_embedding[...][:4], self.item_embedding[...][4:]

    model = Shared(users, items)
    model.item_embedding = nnx.Param(jnp.ones((10, 3)))
    noisy_users, noisy_items = embed(model, TableNoise(item_tables(model)), noise(1.0))
    np.testing.assert_array_equal(noisy_users, users)
    assert (noisy_items != items).all()


def test_a_model_without_a_learned_table_says_what_to_do() -> None:
    model = Factors(np.ones((2, 3)), np.ones((4, 3)))
    model.item_embedding = Constant(jnp.ones((4, 3)))  # as MMGCN's, which stays as it was drawn
    with pytest.raises(UserError, match=r"learns no table of items .*; change its features with --adjust"):
        item_tables(model)


@pytest.mark.parametrize("name", ["dualgnn", "dragon"])
def test_models_made_of_features_name_no_table(name: str) -> None:
    assert models.model_class(name).item_tables == ()


def test_an_unknown_table_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="no learned table 'items' with a row per item; choose among item_embedding"):
        item_tables(create("lightgcn"), ["items"])


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 7, 30])
def test_the_chosen_items_pass_their_features_round(count: int) -> None:
    chosen, partner = (np.asarray(x) for x in choose(ShareCase(count, KEY), 30))
    assert chosen.sum() == count
    np.testing.assert_array_equal(partner[~chosen], np.flatnonzero(~chosen))
    assert sorted(partner[chosen]) == list(np.flatnonzero(chosen))
    if count > 1:
        assert (partner[chosen] != np.flatnonzero(chosen)).all()
        place, seen = int(np.flatnonzero(chosen)[0]), set()
        while place not in seen:
            seen.add(place)
            place = int(partner[place])
        assert len(seen) == count  # one cycle


def features(kind: str, count: int, **options: Any) -> dict[str, np.ndarray]:
    change = FeatureChange(kind, ("image", "text"), **options)
    return {m: np.asarray(t) for m, t in change.features(GIVEN, ShareCase(count, KEY)).items()}


def test_each_kind_of_change_follows_its_formula() -> None:
    chosen, partner = (np.asarray(x) for x in choose(ShareCase(12, KEY), 30))
    for modality, x in DATA.features.items():
        swapped = features("swap", 12)[modality]
        np.testing.assert_array_equal(swapped, x[partner])
        mixed = features("mix", 12, share=0.3)[modality]
        np.testing.assert_allclose(mixed[chosen], (0.7 * x + 0.3 * x[partner])[chosen], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(features("mix", 12, share=1.0)[modality], swapped)
        np.testing.assert_allclose(features("mean", 30)[modality], np.tile(x.mean(axis=0), (30, 1)), atol=1e-5)
        noisy = features("noise", 12, scale=2.0)[modality]
        np.testing.assert_array_equal(noisy[~chosen], x[~chosen])
        scaled = (noisy - x)[chosen] / np.sqrt(np.mean(x**2, axis=0)) / 2
        assert scaled.std() == pytest.approx(1, abs=0.2)
    only_text = FeatureChange("swap", ("text",)).features(GIVEN, ShareCase(12, KEY))
    np.testing.assert_array_equal(only_text["image"], DATA.features["image"])
