"""Adversarial training on features: AMR's loss by hand on VBPR, what it means for every other model, whole runs."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden import Structure, batch_of, loss_and_gradients, recorded, recorded_parameters
from golden import created as created_on_tiny

from mgrad_jax import interop, mirror_gradient, mirror_step, models
from mgrad_jax.cli import main
from mgrad_jax.data import Batch, demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.models.adversarial import AdversarialRecommender, adversarial

NAMES = [name for name in models.names() if models.model_class(name).needs]
# Models that read no other rows of the tables than the batch's.
GATHERING = ["bm3", "freedom", "vbpr"]
DATA = demo_interactions(n_users=60, n_items=80, n_groups=4)
KEY = jax.random.key(0)
EPSILON, WEIGHT, REG_WEIGHT = 0.3, 0.7, 0.01


@functools.cache
def created(name: str, dtype: Any, x64: bool) -> models.Recommender:
    return models.create(name, DATA, seed=1, dtype=dtype, embedding_dim=8)


def create(name: str, dtype: Any = jnp.float32) -> models.Recommender:
    return nnx.clone(created(name, dtype, jax.config.jax_enable_x64))


def first_batch(n: int = 24) -> Batch:
    users, positives = DATA.train[:n].T
    negatives = (positives + 1 + np.arange(n) % 7) % DATA.n_items
    return Batch(*(jnp.asarray(x, jnp.int32) for x in (users, positives, negatives)))


def by_path(state: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}


def variable(model: models.Recommender, path: str) -> nnx.Variable[Any]:
    for part in path.split("."):
        model = getattr(model, part)
    return model


def moved(model: models.Recommender, deltas: dict[str, Any]) -> models.Recommender:
    """A copy of a plain model whose features are others, made anew what was made of them ahead."""
    copy = nnx.clone(model)
    for path, delta in deltas.items():
        features = variable(copy, path)
        features[...] = features[...] + delta
    if copy.name == "mmgcn":
        copy.use_tables(copy.id_embedding[...], **{m: getattr(copy, m).preference[...] for m in copy.modalities})
    return copy


def perturbation_of(structure: Structure, state: Any, batch: Batch) -> Any:
    return nnx.merge(structure.graph_def, state).perturbation(batch, KEY)


jitted_perturbation = jax.jit(perturbation_of, static_argnums=0)


def perturbation(model: AdversarialRecommender, batch: Batch) -> dict[str, np.ndarray]:
    graphdef, state = nnx.split(model)
    return by_path(jitted_perturbation(Structure(graphdef), state, batch))


def ranking(model: models.Recommender, batch: Batch) -> Any:
    """The loss without its penalties."""
    total, parts = model.loss(batch, KEY)
    return total - sum(parts[name] for name in model.penalties)


# --- VBPR by hand -----------------------------------------------------------------------------------------------------


class VBPRByHand:
    """VBPR's and AMR's loss with derivatives written out in NumPy; parameters by our paths, the kernel as published."""

    def __init__(self, batch: Batch, features: np.ndarray) -> None:
        self.users, self.positives, self.negatives = map(np.asarray, batch)
        self.features = features

    def plain(self, p: dict[str, np.ndarray], x: np.ndarray) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
        """Ranking alone: its value, its gradients, and that by the features."""
        items = np.hstack([p["item_embedding"], x @ p["item_linear.kernel"].T + p["item_linear.bias"]])
        users = p["user_embedding"][self.users]
        difference = items[self.positives] - items[self.negatives]
        sigmoid = 1 / (1 + np.exp(-np.sum(users * difference, axis=1)))
        slope = -sigmoid * (1 - sigmoid) / (1e-10 + sigmoid) / len(self.users)
        by_users, by_items = np.zeros_like(p["user_embedding"]), np.zeros_like(items)
        np.add.at(by_users, self.users, slope[:, None] * difference)
        np.add.at(by_items, self.positives, slope[:, None] * users)
        np.add.at(by_items, self.negatives, -slope[:, None] * users)
        by_ids, by_projected = np.split(by_items, 2, axis=1)
        gradients = {
            "user_embedding": by_users,
            "item_embedding": by_ids,
            "item_linear.kernel": by_projected.T @ x,
            "item_linear.bias": by_projected.sum(axis=0),
        }
        return -np.mean(np.log(1e-10 + sigmoid)), gradients, by_projected @ p["item_linear.kernel"]

    def penalty(self, p: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """The regulariser, of clean features."""
        items = np.hstack([p["item_embedding"], self.features @ p["item_linear.kernel"].T + p["item_linear.bias"]])
        factor = REG_WEIGHT / len(self.users)
        value, by_users, by_items = 0.0, np.zeros_like(p["user_embedding"]), np.zeros_like(items)
        for table, index, gradient in (
            (p["user_embedding"], self.users, by_users),
            (items, self.positives, by_items),
            (items, self.negatives, by_items),
        ):
            norm = np.sqrt((table[index] ** 2).sum())
            value += factor * norm
            np.add.at(gradient, index, factor * table[index] / norm)
        by_ids, by_projected = np.split(by_items, 2, axis=1)
        return value, {
            "user_embedding": by_users,
            "item_embedding": by_ids,
            "item_linear.kernel": by_projected.T @ self.features,
            "item_linear.bias": by_projected.sum(axis=0),
        }

    def adversarial(
        self, p: dict[str, np.ndarray], epsilon: float = EPSILON, weight: float = WEIGHT
    ) -> tuple[float, dict[str, np.ndarray]]:
        """AMR's loss and its gradients, the perturbation held constant."""
        clean, gradients, by_features = self.plain(p, self.features)
        gamma = len(self.users) * by_features
        delta = epsilon * gamma / np.sqrt(np.maximum((gamma**2).sum(axis=1, keepdims=True), 1e-12))
        perturbed, perturbed_gradients, _ = self.plain(p, self.features + delta)
        penalty, penalty_gradients = self.penalty(p)
        total = {name: gradients[name] + penalty_gradients[name] + weight * perturbed_gradients[name] for name in p}
        return clean + penalty + weight * perturbed, total


class Golden(NamedTuple):
    """VBPR with recorded parameters, adversarial, and the same by hand."""

    model: AdversarialRecommender
    batch: Batch
    by_hand: VBPRByHand
    parameters: dict[str, np.ndarray]


def golden() -> Golden:
    plain = created_on_tiny("vbpr", dtype=jnp.float64, embedding_dim=8, reg_weight=REG_WEIGHT)
    interop.load_torch_state(plain, recorded_parameters("vbpr"))
    batch = batch_of(recorded("vbpr"))
    published = recorded_parameters("vbpr")
    parameters = {path: published[name].astype(np.float64) for path, name in plain.published_names.items()}
    by_hand = VBPRByHand(batch, np.asarray(plain.item_features[...]))
    return Golden(adversarial(plain, EPSILON, WEIGHT), batch, by_hand, parameters)


@pytest.mark.usefixtures("x64")
def test_the_hand_written_vbpr_is_the_published_one() -> None:
    _, _, by_hand, parameters = golden()
    value = by_hand.plain(parameters, by_hand.features)[0] + by_hand.penalty(parameters)[0]
    np.testing.assert_allclose(value, recorded("vbpr")["out/loss"], rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_loss_and_gradients_of_vbpr_equal_those_by_hand() -> None:
    model, batch, by_hand, parameters = golden()
    loss, gradients = loss_and_gradients(model, batch)
    expected, expected_gradients = by_hand.adversarial(parameters)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(sum(model.loss(batch, KEY)[1].values()), expected, rtol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected_gradients[path], atol=1e-12, err_msg=path)


@pytest.mark.usefixtures("x64")
def test_the_second_pass_of_mirror_gradient_perturbs_anew() -> None:
    model, batch, by_hand, parameters = golden()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.5, interval=1), optax.sgd(1.0))
    step = mirror_step(lambda p, b: nnx.merge(graphdef, p, rest).loss(b, KEY)[0], tx)
    params, _, _ = jax.jit(step)(params, tx.init(params), batch)
    _, first = by_hand.adversarial(parameters)
    between = {path: x - first[path] for path, x in parameters.items()}
    _, second = by_hand.adversarial(between)
    for path, value in by_path(params).items():
        value = value.T if path.endswith("kernel") else value
        np.testing.assert_allclose(value, between[path] + 0.5 * second[path], atol=1e-12, err_msg=path)


@pytest.mark.usefixtures("x64")
def test_the_loss_rises_by_epsilon_times_the_norms_of_the_gradient() -> None:
    model, batch, by_hand, parameters = golden()
    value, _, gamma = by_hand.plain(parameters, by_hand.features)
    model.epsilon.set_value(jnp.asarray(1e-6))
    model.weight.set_value(jnp.asarray(1.0))
    rise = float(model.loss(batch, KEY)[1]["adversarial"]) - value
    np.testing.assert_allclose(rise / 1e-6, np.linalg.norm(gamma, axis=1).sum(), rtol=1e-5)


# --- every model that reads features ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_the_loss_is_the_plain_one_here_and_at_moved_features(name: str) -> None:
    plain, batch = create(name, jnp.float64), first_batch()
    model = adversarial(plain, EPSILON, WEIGHT)
    there = moved(plain, perturbation(model, batch))
    loss, gradients = loss_and_gradients(model, batch)
    here, here_gradients = loss_and_gradients(plain, batch)
    adverse, adverse_gradients = loss_and_gradients(there, batch, lambda m: ranking(m, batch))
    np.testing.assert_allclose(loss, here + WEIGHT * adverse, rtol=1e-12)
    assert gradients.keys() == here_gradients.keys()
    for path, gradient in gradients.items():
        expected = here_gradients[path] + WEIGHT * adverse_gradients[path]
        np.testing.assert_allclose(gradient, expected, atol=1e-12, rtol=1e-9, err_msg=path)
    names = [list(jax.eval_shape(lambda m=m: m.loss(batch, KEY)[1])) for m in (plain, model)]
    assert set(names[1]) == {*names[0], "adversarial"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bm3"])
@pytest.mark.usefixtures("x64")
def test_no_other_perturbation_as_large_hurts_more(name: str) -> None:
    """To first order. BM3 is left out: its targets follow the features, and no gradient passes through them."""
    plain, batch = create(name, jnp.float64), first_batch()
    deltas = perturbation(adversarial(plain, 1e-5, WEIGHT), batch)
    rise_of = jax.jit(lambda deltas: ranking(moved(plain, deltas), batch) - ranking(plain, batch))
    rise = float(rise_of(deltas))
    assert rise > 0
    rng = np.random.default_rng(0)
    for path, delta in deltas.items():
        for share in (0.2, 0.2, 1.0, 1.0):
            other = rng.normal(size=delta.shape)
            other *= np.linalg.norm(delta, axis=1, keepdims=True) / np.linalg.norm(other, axis=1, keepdims=True)
            assert float(rise_of({**deltas, path: (1 - share) * delta + share * other})) < rise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_perturbed_rows_have_norm_epsilon(name: str) -> None:
    batch = first_batch()
    model = adversarial(create(name, jnp.float64), EPSILON, WEIGHT)
    items = [batch.positives, batch.negatives] if model.uses_negatives else [batch.positives]
    for path, delta in perturbation(model, batch).items():
        assert path in model.tables
        assert delta.shape == variable(model, path)[...].shape
        norms = np.linalg.norm(delta, axis=1)
        assert norms.max() == pytest.approx(EPSILON, rel=1e-12)
        if name in GATHERING:
            touched = np.isin(np.arange(DATA.n_items), np.concatenate(items))
            assert 0 < touched.sum() < DATA.n_items
            np.testing.assert_allclose(norms, np.where(touched, EPSILON, 0.0), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_scale_of_the_gradient_does_not_matter() -> None:
    """FREEDOM's gradient by the features is as small as its `reg_weight`; without one there is nothing to perturb."""
    model, batch = adversarial(create("freedom", jnp.float64), EPSILON, WEIGHT), first_batch()
    sizes = []
    for reg_weight in (1e-3, 1e-6, 0.0):
        model.reg_weight.set_value(jnp.asarray(reg_weight))
        sizes.append(perturbation(model, batch)["image_embedding"])
    np.testing.assert_allclose(sizes[1], sizes[0], rtol=1e-6, atol=1e-12)
    assert np.abs(sizes[0]).max() > 0
    assert not sizes[2].any()
    _, gradients = loss_and_gradients(model, batch)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["vbpr", "bm3"])
def test_without_weight_it_is_the_plain_model(name: str) -> None:
    plain, batch = create(name), first_batch()
    model = adversarial(plain, EPSILON, WEIGHT)
    model.weight.set_value(jnp.zeros(()))
    loss, gradients = loss_and_gradients(model, batch)
    expected, expected_gradients = loss_and_gradients(plain, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected_gradients[path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_names_and_resampling_are_those_of_the_model(name: str) -> None:
    plain = create(name)
    model = adversarial(plain, EPSILON, WEIGHT)
    assert type(model) is type(adversarial(create(name), 1.0, 1.0))
    assert isinstance(model, type(plain))
    assert (model.name, model.config, model.uses_negatives) == (plain.name, plain.config, plain.uses_negatives)
    for ours, theirs in zip(model.embed(), plain.embed(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    users = jnp.asarray([3, 0, 3])
    np.testing.assert_allclose(model.scores(users), plain.scores(users), rtol=1e-5, atol=1e-6)
    drawn, expected = model.resample(KEY), plain.resample(KEY)
    assert drawn.keys() == expected.keys()
    assert all(map(np.array_equal, jax.tree.leaves(drawn), jax.tree.leaves(expected)))
    assert interop.torch_state(model).keys() == interop.torch_state(plain).keys()
    assert not hasattr(plain, "epsilon")
    assert name != "mmgcn" or plain.text.constant_start


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_jitted_mirror_step_trains_every_model(name: str) -> None:
    graphdef, before, rest = nnx.split(adversarial(create(name), EPSILON, WEIGHT), nnx.Param, ...)
    tx = optax.chain(mirror_gradient(interval=2), optax.adam(1e-3))
    step = jax.jit(mirror_step(lambda p, b, key: nnx.merge(graphdef, p, rest).loss(b, key)[0], tx))
    params, state, losses = before, tx.init(before), []
    for number in range(3):
        params, state, loss = step(params, state, first_batch(), jax.random.key(number))
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        assert np.isfinite(new).all()
        # The biases of FREEDOM's projections and of SLMRec's last heads cancel.
        assert name in ("freedom", "slmrec") or not np.array_equal(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vbpr", "freedom", "mmgcn"])
def test_vmap_over_epsilon_equals_a_loop(name: str) -> None:
    model, batch = adversarial(create(name), EPSILON, WEIGHT), first_batch()
    graphdef, params, epsilons, rest = nnx.split(model, nnx.Param, lambda path, _: path == ("epsilon",), ...)

    def run(epsilon: Any) -> Any:
        own = jax.tree.map(lambda _: epsilon, epsilons)
        return jax.value_and_grad(lambda p: nnx.merge(graphdef, p, own, rest).loss(batch, KEY)[0])(params)

    values = jnp.asarray([0.1, 0.5, 2.0])
    together = jax.jit(jax.vmap(run))(values)
    run_alone = jax.jit(run)
    assert len(set(together[0].tolist())) == 3
    for member, epsilon in enumerate(values):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(run_alone(epsilon)), strict=True):
            np.testing.assert_allclose(a[member], b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vbpr", "freedom"])
def test_narrow_features_are_perturbed_in_the_models_own_type(name: str) -> None:
    plain, batch = models.create(name, DATA, embedding_dim=8, feature_dtype=jnp.bfloat16), first_batch()
    model = adversarial(plain, EPSILON, WEIGHT)
    for path, delta in perturbation(model, batch).items():
        assert (variable(model, path)[...].dtype, delta.dtype) == (jnp.bfloat16, jnp.float32)
        norms = np.linalg.norm(delta, axis=1)
        np.testing.assert_allclose(norms[norms > 0], EPSILON, rtol=1e-5)
    loss, gradients = loss_and_gradients(model, batch)
    assert np.isfinite(loss)
    assert gradients.keys() == by_path(nnx.state(plain, nnx.Param)).keys()


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "slmrec"])
def test_one_modality_is_enough(name: str, modality: str) -> None:
    data = dataclasses.replace(DATA, features={modality: DATA.features[modality]})
    model = adversarial(models.create(name, data, embedding_dim=8), EPSILON, WEIGHT)
    graphdef, state = nnx.split(model)
    deltas = jax.eval_shape(lambda state: perturbation_of(Structure(graphdef), state, first_batch()), state)
    shapes = {".".join(map(str, path)): delta.get_value().shape for path, delta in nnx.to_flat_state(deltas)}
    assert shapes.keys() == set(model.tables)
    assert list(shapes.values()) == [DATA.features[modality].shape]


@pytest.mark.parametrize("name", models.names())
def test_penalties_are_parts_of_the_loss(name: str) -> None:
    model = create(name)
    parts = jax.eval_shape(lambda batch: model.loss(batch, KEY)[1], first_batch())
    assert set(models.model_class(name).penalties) <= parts.keys()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in models.names() if name not in NAMES])
def test_a_model_without_features_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} reads no features in training.*choose one of bm3, .*, vbpr"):
        adversarial(create(name), EPSILON, WEIGHT)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["epsilon", "weight"])
def test_numbers_must_be_positive(argument: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{argument} {value}; it must be a positive number"):
        adversarial(create("vbpr"), **{"epsilon": EPSILON, "weight": WEIGHT, argument: value})


def test_twice_is_once_too_often() -> None:
    with pytest.raises(UserError, match=r"vbpr is trained adversarially already"):
        adversarial(adversarial(create("vbpr"), EPSILON, WEIGHT), EPSILON, WEIGHT)


# --- whole runs -------------------------------------------------------------------------------------------------------

MODEL = ["--model", "vbpr", "--set", "embedding_dim=8", "--data", "demo"]
AMR = ["--adversarial", "epsilon=0.1,weight=1"]


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_a_run_is_recorded_evaluated_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, unbroken, plain = tmp_path / "run", tmp_path / "unbroken", tmp_path / "plain"
    train = ["train", *MODEL, "--mirror"]
    assert main([*train, *AMR, "--epochs", "1", "--out", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["adversarial"] == {"epsilon": 0.1, "weight": 1}
    assert result["mirror"]["interval"] == 3
    users = tmp_path / "users.csv"
    assert main(["evaluate", str(run), "--per-user", str(users)]) == 0
    with users.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for name, value in result["test"].items():
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(value, abs=1e-6)

    assert main([*train, *AMR, "--epochs", "2", "--out", str(unbroken)]) == 0
    assert main([*train, *AMR, "--epochs", "2", "--out", str(run), "--resume"]) == 0
    assert main([*train, "--epochs", "2", "--out", str(plain)]) == 0
    timed = ("seconds_train", "seconds_evaluate")
    resumed, whole = ([{k: v for k, v in row.items() if k not in timed} for row in history(r)] for r in (run, unbroken))
    assert resumed == whole
    assert float(whole[0]["loss_adversarial"]) > float(whole[0]["loss_bpr"])
    assert whole[1]["loss_bpr"] != history(plain)[1]["loss_bpr"]
    capfd.readouterr()
    other = ["--adversarial", "epsilon=0.2,weight=1"]
    assert main([*train, *other, "--epochs", "3", "--out", str(run), "--resume"]) == 2
    assert "adversarial was" in capfd.readouterr().err


@pytest.mark.slow
def test_a_sweep_trains_the_same_as_single_runs() -> None:
    from mgrad_jax.training import fit
    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.grid import expand_grid
    from mgrad_jax.training.sweep import sweep

    base = RunConfig(
        "vbpr",
        "demo",
        adversarial={"epsilon": 0.1, "weight": 1.0},
        epochs=2,
        hyper_parameters={"embedding_dim": 8},
        batch_size=240,
    )
    members = expand_grid(base, {"alpha2": [0.1, 0.3]})
    for member, result in zip(members, sweep(DATA, members, slots=2), strict=True):
        alone = fit(member.create_model(DATA), DATA, member.transformation(DATA), epochs=2, batch_size=240)
        assert "adversarial" in alone.history[0].parts
        np.testing.assert_allclose(result.losses, [report.loss for report in alone.history], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--adversarial", "epsilon=0.1"], "adversarial training lacks its weight; give epsilon and weight."),
        ([*MODEL, "--adversarial", "epsilon=0.1,weight=1,size=2"], "no argument 'size'; choose among epsilon, weight."),
        ([*MODEL, "--adversarial", "epsilon=0.1,weight=0"], "weight is 0; it must be a positive number."),
        ([*MODEL, "--adversarial", "epsilon=high,weight=1"], "epsilon is 'high'; it must be a positive number."),
        ([*MODEL, "--adversarial", "strong"], "--adversarial strong is not of the form key=value"),
        (["--model", "lightgcn", "--data", "demo", *AMR], "lightgcn reads no features in training"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--epochs", "1", "--out", str(tmp_path / "run")]) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "run").exists()
