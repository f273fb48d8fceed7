"""`fit` drives any optimizer rightly or says why not: decayed rates, line searches, averages, optimizers of two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from mgrad_jax import mirror_gradient, mirrored, models
from mgrad_jax.data import demo_interactions
from mgrad_jax.training import FitResult, fit
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.epoch import TrainState

# Equations are asked for and no more.
pytestmark = pytest.mark.quick_compilation

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
        optax.MultiSteps(optax.adam(0.1), 2),
    ],
    ids=["lbfgs", "sam of optax", "accumulation without a mirror"],
)
def test_any_optimizer_trains(tx: Any) -> None:
    _, result = trained(tx, patience=9)
    assert result.history[1].loss < result.history[0].loss


class Kept:
    """In the place of checkpoints: what `fit` saves last."""

    state: TrainState

    def save(self, epoch: int, state: Any, is_best: bool) -> None:
        self.state = jax.tree.map(np.asarray, state["state"])


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
