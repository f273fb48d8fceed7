"""`fit` drives any optimizer rightly or says why not: decayed rates, line searches, averages, two-step optimizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from mgrad_jax import mirror_gradient, mirrored, models
from mgrad_jax.data import Interactions, demo_interactions
from mgrad_jax.training import FitResult, TrainingDiverged, fit
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.diagnosis import Diagnosis
from mgrad_jax.training.epoch import TrainState
from mgrad_jax.training.grid import no_advice

DATA = demo_interactions(n_users=60, n_items=40)


def model() -> models.Recommender:
    return models.create("lightgcn", DATA, embedding_dim=4, n_layers=1, seed=1)


def flat(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def trained(tx: optax.GradientTransformation, **options: Any) -> tuple[np.ndarray, FitResult]:
    """Parameters of the best epoch, and the result."""
    own = model()
    result = fit(own, DATA, tx, **{"epochs": 2, "seed": 1, "batch_size": 240, **options})
    return flat(nnx.state(own, nnx.Param)), result


# --- decayed learning rates -------------------------------------------------------------------------------------------


def test_both_forms_of_mirror_gradient_train_alike_at_a_decayed_rate() -> None:
    options = {"learning_rate_decay": (0.3, 1.0), "epochs": 3}
    visible, _ = trained(optax.chain(mirror_gradient(1.0, 0.5, 1), optax.sgd(0.5)), **options)
    opaque, _ = trained(mirrored(optax.sgd(0.5), 1.0, 0.5, 1), **options)
    np.testing.assert_allclose(visible, opaque, atol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_goes_on_at_the_rate_of_its_epoch(tmp_path: Path) -> None:
    options = {"learning_rate_decay": (0.3, 1.0), "patience": 9}
    tx = mirrored(optax.sgd(0.5))
    _, whole = trained(tx, epochs=3, **options)
    with_checkpoints = {"checkpoints": Checkpoints(tmp_path), "resume": True, **options}
    trained(tx, epochs=2, **with_checkpoints)
    _, rest = trained(tx, epochs=3, **with_checkpoints)
    assert [report.epoch for report in rest.history] == [3]
    assert rest.history[0].loss == whole.history[2].loss


# --- optimizers of every kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optax.lbfgs(),
        optax.contrib.sam(optax.sgd(0.5), optax.sgd(0.05), opaque_mode=True),
    ],
    ids=["lbfgs", "sam of optax"],
)
def test_any_optimizer_trains(tx: Any) -> None:
    _, result = trained(tx, patience=9)
    assert result.history[1].loss < result.history[0].loss


class Kept:
    """In the place of checkpoints: what `fit` saves last."""

    directory = Path("nowhere")
    state: TrainState

    def save(self, epoch: int, state: Any, is_best: bool) -> None:
        self.state = jax.tree.map(np.asarray, state["state"])

    def wait(self) -> None:
        """Nothing is on its way."""


@pytest.mark.parametrize("evaluate", ["fresh", "stale"])
def test_an_averaging_optimizer_is_evaluated_and_kept_with_its_average(evaluate: Any) -> None:
    kept: Any = Kept()
    tx = optax.chain(mirror_gradient(interval=2), optax.contrib.schedule_free_sgd(0.5))
    found, _ = trained(tx, epochs=1, evaluate=evaluate, checkpoints=kept)
    _, state = kept.state.opt_state
    average = optax.contrib.schedule_free_eval_params(state, kept.state.params)
    if evaluate == "fresh":
        np.testing.assert_allclose(found, flat(average), rtol=1e-6)
    else:  # the average before the last update is on the way from there to the last one
        np.testing.assert_array_equal(found, flat(kept.state.stale_params))
        assert 0 < np.abs(found - flat(average)).max() < np.abs(found - flat(kept.state.params)).max()
    assert np.abs(found - flat(kept.state.params)).max() > 1e-5


@pytest.mark.parametrize(
    ("tx", "sentence"),
    [
        (optax.MultiSteps(optax.chain(mirror_gradient(), optax.sgd(0.1)), 2), "accumulates or holds back updates"),
        (mirrored(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()), "accumulates or holds back updates"),
        (optax.lookahead(optax.sgd(0.1), 5, 0.5), "optax.lookahead trains a pair of parameters"),
        (optax.chain(mirror_gradient(steps_per_epoch=7), optax.sgd(0.1)), "built with steps_per_epoch=7"),
    ],
    ids=["accumulation around", "accumulation inside", "lookahead", "another epoch"],
)
def test_what_fit_cannot_drive_is_refused_before_anything_is_compiled(tx: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        trained(tx)


# --- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_is_told_with_its_cause_and_what_is_kept() -> None:
    with pytest.raises(TrainingDiverged, match=r"^epoch 1, batch \d: the (loss|scores) became NaN") as caught:
        trained(optax.sgd(1e38))
    assert "the parameters grew without bound: lower the learning rate, or clip" in str(caught.value)
    assert "No checkpoint was asked for" in str(caught.value)


def diagnosis(of: Interactions = DATA, **changes: Any) -> Diagnosis:
    return dataclasses.replace(Diagnosis.of(models.create("vbpr", DATA, embedding_dim=4), of), **changes)


@pytest.mark.parametrize(("size", "shown"), [(1e30, "1e+30"), (np.nan, "nan"), (-1e5, "1e+05")])
def test_features_that_no_model_is_made_for_are_named(size: float, shown: str) -> None:
    text = DATA.features["text"].copy()
    text[3, 1] = size
    features = {**DATA.features, "text": text}
    assert f"the text features reach {shown}" in diagnosis(features=features).cause(updated=True)


def test_before_the_first_update_it_is_not_the_step() -> None:
    assert "a hyper-parameter of the loss is too large or too small" in diagnosis().cause(updated=False)
    assert "adversarial epsilon" not in diagnosis().cause(updated=True)
    assert "adversarial epsilon" in diagnosis(adversarial=True).cause(updated=True)


def test_the_truth_about_checkpoints_is_told(tmp_path: Path) -> None:
    kept = diagnosis(checkpoints=tmp_path)
    assert "there is no checkpoint: start again with other settings, in the same place" in kept.kept(0, 0)
    assert f"checkpoints of epoch 7 and of the best one, 4, are kept in {tmp_path}" in kept.kept(7, 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e10}, "learning_rate 1e+10"),
        ({"alpha1": 1e6}, "alpha1 1e+06"),
        ({"alpha1": 0.1, "alpha2": 0.2}, "alpha2 0.2 beside alpha1 0.1, at which mirror batches ascend"),
        ({"adversarial": {"epsilon": 1e6, "weight": 1.0}}, "epsilon 1e+06"),
        ({"learning_rate_decay": (2.0, 50.0)}, "learning_rate_decay 2, with which the rate grows"),
        ({"training": "sam", "alpha1": 1e6}, ""),
        ({}, ""),
    ],
)
def test_the_settings_that_are_far_from_usual_are_named(changes: dict[str, Any], named: str) -> None:
    with no_advice():
        suspicion = RunConfig("vbpr", "demo", **changes).suspicion
    assert suspicion == (f" Far from what is usual: {named}." if named else "")
