"""`mgrad-jax theory --inputs`: Lemma 3.1 where it holds and where it cannot, sensitivity, worst cases, files."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax import models
from mgrad_jax.analysis import reproduce
from mgrad_jax.analysis.inputs import (
    at_loss,
    common_loss,
    first_layer,
    lemma_constant,
    measure_inputs,
    open_inputs,
)
from mgrad_jax.cli import main
from mgrad_jax.data import Batch, Interactions, demo_interactions
from mgrad_jax.models import Recommender

KEY = jax.random.key(0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def data() -> Interactions:
    return demo_interactions(n_users=60, n_items=40, n_groups=4)


def vbpr(data: Interactions, **changes: float) -> tuple[Recommender, tuple[str, ...]]:
    """A small VBPR, its features times `features` and their kernel times `kernel`."""
    model = models.create("vbpr", data, embedding_dim=4, reg_weight=0.0)
    variables = model.item_features, model.item_linear.kernel
    for variable, name in zip(variables, ("features", "kernel"), strict=True):
        variable.set_value(variable.get_value() * changes.get(name, 1.0))
    return open_inputs(model)


def batch(data: Interactions, n: int) -> Batch:
    pairs = jnp.asarray(data.train[:n])
    return Batch(pairs[:, 0], pairs[:, 1], (pairs[:, 1] + 7) % data.n_items)


# --- Lemma 3.1 --------------------------------------------------------------------------------------------------------


def sides(xs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Both sides for L = mean (w x + b - y)^2, with theta = (w, b); the left one of every input."""
    w, b = jnp.array([[0.5], [-1.5]]), jnp.array([0.3])

    def loss(w: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(((x @ w)[:, 0] + b[0] - targets) ** 2)

    by_w, by_b, by_x = jax.grad(loss, argnums=(0, 1, 2))(w, b, jnp.asarray(xs))
    left = jnp.sum(by_x**2, axis=1) * lemma_constant(jnp.asarray(xs), w)
    return np.asarray(left), float(jnp.sum(by_w**2) + jnp.sum(by_b**2))


def test_one_example_with_one_number_behind_its_first_layer_meets_the_bound() -> None:
    left, right = sides(np.array([[2.0, -1.0]]), np.array([0.1]))
    assert left[0] == pytest.approx(right, rel=1e-5)
    assert right > 1


def test_a_batch_may_violate_the_inequality() -> None:
    """The parameters' gradients of two examples cancel, those by the inputs cannot."""
    x = np.array([[2.0, -1.0], [2.0, -1.0]])
    value = 0.5 * 2 + 1.5 + 0.3
    left, right = sides(x, np.array([value + 1, value - 1]))
    assert right < 1e-10
    assert (left > 1).all()


def test_every_single_example_of_a_small_vbpr_holds(data: Interactions) -> None:
    model, tables = vbpr(data)
    found = measure_inputs(model, tables, batch(data, 64), KEY, examples=64)
    assert found.examples == 64
    assert found.holding == {"item_features": 64}


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_sensitivity_is_what_differences_of_the_loss_say(data: Interactions) -> None:
    """Of one item: its row moved along and against the gradient, both by a thousandth of its length."""
    model, tables = vbpr(data)
    some = batch(data, 64)
    table = np.asarray(model.item_features.get_value(), np.float64)
    item, size = int(some.positives[0]), len(some.users)

    @jax.jit
    def total(features: jax.Array) -> jax.Array:
        copy = jax.tree.map(lambda x: x, model)
        copy.item_features.set_value(features)
        return size * copy.loss(some, KEY)[0]

    gradient = np.asarray(jax.grad(total)(jnp.asarray(table, jnp.float32)), np.float64)
    length = np.linalg.norm(table[item])
    step = np.zeros_like(table)
    step[item] = 1e-2 * length * gradient[item] / np.linalg.norm(gradient[item])
    difference = float(total(jnp.asarray(table + step, jnp.float32)) - total(jnp.asarray(table - step, jnp.float32)))
    expected = np.linalg.norm(table, axis=1) * np.linalg.norm(gradient, axis=1)
    assert difference / 2e-2 == pytest.approx(expected[item], rel=1e-2)
    found = measure_inputs(model, tables, some, KEY)
    assert found.tables["item_features"].sensitivity == pytest.approx(expected.mean(), rel=1e-4)
    assert found.tables["item_features"].gradient == pytest.approx(np.linalg.norm(gradient) / size, rel=1e-4)


def test_the_sensitivity_does_not_move_where_features_and_their_layer_are_rescaled(data: Interactions) -> None:
    plain, scaled = (
        measure_inputs(*vbpr(data, **changes), batch(data, 64), KEY).tables["item_features"]
        for changes in ({}, {"features": 4.0, "kernel": 0.25})
    )
    assert scaled.sensitivity == pytest.approx(plain.sensitivity, rel=1e-5)
    assert scaled.gradient == pytest.approx(plain.gradient / 4, rel=1e-5)


def test_the_constant_is_that_of_the_first_layer(data: Interactions) -> None:
    model, tables = vbpr(data)
    rows, kernel = np.asarray(model.item_features.get_value()), np.asarray(model.item_linear.kernel.get_value())
    expected = (1 + (rows**2).sum(axis=1)).mean() / np.linalg.svd(kernel, compute_uv=False)[0] ** 2
    found = measure_inputs(model, tables, batch(data, 8), KEY).tables["item_features"]
    assert found.constant == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("bm3", {"image_embedding": "image_trs.kernel", "text_embedding": "text_trs.kernel"}),
        ("mmgcn", {"image.features": "image.map.kernel", "text.features": None}),
    ],
)
def test_every_table_has_the_layer_that_reads_it(name: str, layers: dict[str, str], data: Interactions) -> None:
    # Features of one width, so that the width does not tell whose layer it is.
    alike = dict.fromkeys(data.features, data.features["image"])
    model, tables = open_inputs(models.create(name, dataclasses.replace(data, features=alike), embedding_dim=8))
    assert {table: first_layer(model, table) for table in tables} == layers


def test_numbers_at_equal_loss_lie_between_the_places_around_it() -> None:
    fast = [(0.7, {"x": 1.0}), (0.5, {"x": 2.0}), (0.3, {"x": 4.0})]
    slow = [(0.7, {"x": 1.0}), (0.4, {"x": 5.0})]
    assert common_loss([fast, slow]) == 0.4
    assert at_loss(fast, 0.4) == {"x": pytest.approx(3.0)}
    assert at_loss(slow, 0.4) == {"x": pytest.approx(5.0)}
    assert at_loss(slow, 0.3) is None


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("theory") / "inputs"
    runs = [str(study / "runs" / f"vbpr-{name}-s999") for name in ("plain-adam", "replay-adam-i3", "mirror-adam-i3")]
    assert main(["theory", *runs, "--inputs", "--pairs", "256", "--examples", "16", "--out", str(out)]) == 0
    return out


def test_runs_are_measured_along_the_way_and_at_equal_loss(inputs: Path) -> None:
    rows = read(inputs / "inputs.csv")
    assert {row["method"] for row in rows} == {"plain", "replay", "mirror"}
    assert {row["epoch"] for row in rows} == {"1", "2"}
    assert {row["kind"] for row in rows} == {"features"}
    assert all(float(row["sensitivity"]) > 0 and float(row["constant"]) > 0 for row in rows)
    result = json.loads((inputs / "result.json").read_text(encoding="utf-8"))
    assert len({row["loss"] for row in result["equal_loss"]}) == 1
    assert [row["method"] for row in result["equal_loss"] if row["sensitivity"]][:2] == ["plain", "mirror"]
    assert (inputs / "inputs.png").stat().st_size > 500


def test_the_presets_find_what_they_read(inputs: Path) -> None:
    found = list(reproduce._of_lemma(SimpleNamespace(out=inputs.parent)))  # type: ignore[arg-type]
    assert {ours.metric for ours in found} == {"constant", "|dL/dX|", "sensitivity"}
    assert {ours.method for ours in found} == {"plain", "replay", "mirror"}


def test_no_change_is_what_the_run_reports_and_the_worst_one_is_not(inputs: Path, study: Path) -> None:
    rows = [row for row in read(inputs / "worst-case.csv") if row["method"] == "plain"]
    assert [float(row["change"]) for row in rows] == [0.0, 0.01, 0.05, 0.1]
    reported = json.loads((study / "runs" / "vbpr-plain-adam-s999" / "result.json").read_text(encoding="utf-8"))["test"]
    for metric in ("recall@20", "recall@5"):
        assert float(rows[0][metric]) == pytest.approx(reported[metric], abs=1e-6)
    assert rows[0]["recall@20"] != rows[-1]["recall@20"]


@pytest.mark.slow
def test_trained_tables_are_called_so_and_no_score_is_said_to_read_them(tmp_path: Path) -> None:
    words = ["theory", "--model", "bm3", "--data", "demo", "--inputs", "--epochs", "0", "--set", "embedding_dim=8"]
    assert main([*words, "--pairs", "64", "--examples", "2", "--out", str(tmp_path / "out")]) == 0
    rows = read(tmp_path / "out" / "inputs.csv")
    assert {row["inputs"]: row["kind"] for row in rows} == dict.fromkeys(
        ("image_embedding", "text_embedding"), "trained table"
    )
    assert not (tmp_path / "out" / "worst-case.csv").exists()
    assert json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))["worst_case"] is None
