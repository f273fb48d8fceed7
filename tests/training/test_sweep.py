"""A member of a sweep equals the single run with its settings; members that stop or diverge leave the others alone."""

from __future__ import annotations

import dataclasses
import re
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest

from mgrad_jax import models
from mgrad_jax.data import demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training import FitResult, fit
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import expand_grid, group_members, published_grid
from mgrad_jax.training.sweep import MemberResult, SweepReport, sweep

DATA = demo_interactions(n_users=60, n_items=40)
VBPR = RunConfig(
    "vbpr",
    "demo",
    epochs=5,
    patience=0,
    batch_size=240,  # three batches, none partial: one scan to compile
    learning_rate=1e-2,
    hyper_parameters={"embedding_dim": 4},
)


@cache
def _single(key: str) -> FitResult:
    config = _CONFIGS[key]
    model = models.create(config.model, DATA, seed=config.seed, **config.hyper_parameters)
    return fit(
        model,
        DATA,
        config.transformation(),
        epochs=config.epochs,
        patience=config.patience,
        seed=config.seed,
        batch_size=config.batch_size,
        metric=config.metric,
        ks=config.ks,
        learning_rate_decay=config.learning_rate_decay,
        evaluate=config.evaluate,  # type: ignore[arg-type]
    )


_CONFIGS: dict[str, RunConfig] = {}


def single(config: RunConfig) -> FitResult:
    """The single run, once for all tests."""
    key = repr(config.to_dict())
    _CONFIGS[key] = config
    return _single(key)


def assert_equal(result: MemberResult, alone: FitResult) -> None:
    assert (result.epochs_run, result.best_epoch) == (alone.epochs_run, alone.best_epoch)
    assert not result.diverged
    np.testing.assert_allclose(result.losses, [report.loss for report in alone.history], rtol=1e-5)
    for split in ("valid", "test"):
        ours, theirs = getattr(result, split), getattr(alone, split)
        assert list(ours) == list(theirs)
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-6)


# --- equality with single runs ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_vbpr_members_equal_single_runs_through_any_number_of_slots(slots: int) -> None:
    members = expand_grid(VBPR, {"alpha1": [1.0, 0.5], "reg_weight": [1e-3, 0.1], "seed": [1, 2]})[:5]
    assert len(group_members(members)) == 1
    finished: list[int] = []
    reports: list[SweepReport] = []
    results = sweep(DATA, members, slots=slots, on_result=lambda i, _: finished.append(i), on_epoch=reports.append)
    assert sorted(finished) == list(range(5))
    assert reports[-1] == SweepReport(5, 5, 1, 1, [])
    assert max(len(report.running) for report in reports) <= slots
    assert [result.config for result in results] == members
    for index in (0, 1, 4):  # default factors, another seed, another alpha1
        assert_equal(results[index], single(members[index]))
    assert len({result.epochs_run for result in results}) > 1  # some stopped early, at different epochs


@pytest.mark.slow
def test_plain_mirror_and_replay_are_groups_of_freedom() -> None:
    members = expand_grid(
        dataclasses.replace(VBPR, model="freedom", epochs=2),
        {"training": ["plain", "mirror", "replay"], "seed": [1, 2]},
    )
    assert group_members(members) == [[0, 1], [2, 3], [4, 5]]
    results = sweep(DATA, members, slots=1)
    for index in (0, 3, 4):
        assert_equal(results[index], single(members[index]))


@pytest.mark.slow
def test_stale_evaluation_decay_clipping_and_a_partial_batch() -> None:
    base = dataclasses.replace(
        VBPR, evaluate="stale", learning_rate_decay=(0.5, 1.0), max_norm=0.01, batch_size=200, epochs=3, patience=9
    )
    members = expand_grid(base, {"seed": [1, 2]})
    # Each member has a decay of its own in the same program.
    members[0] = dataclasses.replace(members[0], learning_rate_decay=(0.9, 2.0))
    assert group_members(members) == [[0, 1]]
    results = sweep(DATA, members, slots=2)
    assert_equal(results[1], single(members[1]))


@pytest.mark.slow
def test_bm3_with_weight_decay_and_other_learning_rates() -> None:
    base = dataclasses.replace(VBPR, model="bm3", interval=2, weight_decay=1e-3, epochs=2)
    members = expand_grid(base, {"learning_rate": [1e-2, 1e-3], "weight_decay": [1e-3, 1e-2]})
    assert len(group_members(members)) == 1
    results = sweep(DATA, members, slots=2)
    assert_equal(results[1], single(members[1]))
    assert len({result.losses for result in results}) == 4


def test_idle_slots_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from mgrad_jax.training import sweep as module

    widths: list[int] = []
    keep = module.Lanes.keep
    monkeypatch.setattr(module.Lanes, "keep", lambda self, *kept: (keep(self, *kept), widths.append(self.width)))
    members = [dataclasses.replace(VBPR, epochs=epochs, patience=9, seed=1) for epochs in (1, 2, 3)]
    results = sweep(DATA, members, slots=3)
    assert widths == [1]
    assert [result.epochs_run for result in results] == [1, 2, 3]
    assert results[2].losses[:2] == pytest.approx(results[1].losses, rel=1e-5)


# --- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
def test_a_diverging_member_ends_alone(slots: int) -> None:
    members = expand_grid(VBPR, {"learning_rate": [1e30, 1e-2], "seed": [1, 2]})
    results = sweep(DATA, members, slots=slots)
    assert [result.diverged for result in results] == [True, True, False, False]
    for result in results[:2]:
        assert result.epochs_run < 5
        assert len(result.losses) == result.epochs_run
        assert np.isfinite(list(result.losses)).all()
        assert (result.best_epoch == 0) == (result.valid == {})
    for member, result in zip(members[2:], results[2:], strict=True):
        assert_equal(result, single(member))


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_expand_grid() -> None:
    members = expand_grid(VBPR, {"alpha2": [0.1, 0.2], "reg_weight": [1e-3, 1e-2], "seed": [1, 2, 3]})
    assert len(members) == 12
    assert members[0].hyper_parameters == {"embedding_dim": 4, "reg_weight": 1e-3}
    assert [member.seed for member in members[:4]] == [1, 2, 3, 1]


def test_no_setting_of_a_run_is_unknown_here() -> None:
    """A new field must reach the members' training: through the transformation or through `sweep` itself."""
    by_transformation = {"optimizer", "optimizer_args", "max_norm", "training", "alpha1", "alpha2", "interval"}
    by_transformation |= {"learning_rate", "weight_decay", "flat_minima_args"}
    by_sweep = {"model", "hyper_parameters", "seed", "batch_size", "epochs", "patience", "metric", "ks", "evaluate"}
    by_sweep |= {"learning_rate_decay"}
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    by_model = {"adversarial", "feature_dtype"}  # through `RunConfig.create_model`
    by_numerics = {"matmul_precision", "deterministic"}  # through `numerics.as_configured`
    assert fields == by_transformation | by_sweep | by_model | by_numerics | {"data", "out", "keep_every", "start_from"}


def test_what_has_no_effect_makes_no_member() -> None:
    members = expand_grid(VBPR, {"training": ["plain", "replay", "mirror"], "alpha1": [0.5, 0.7], "interval": [2, 3]})
    assert [member.training for member in members] == ["plain"] + ["replay"] * 2 + ["mirror"] * 4


def test_structure_makes_groups() -> None:
    freedom = dataclasses.replace(VBPR, model="freedom", hyper_parameters={})
    grid = {"dropout": [0.8, 0.9], "reg_weight": [0.0, 1e-3], "weight_decay": [0.0, 1e-3, 1e-2], "seed": [1, 2]}
    groups = group_members(expand_grid(freedom, grid))
    assert [len(group) for group in groups] == [4, 8, 4, 8]  # dropout, and whether there is weight decay
    rates = [dataclasses.replace(VBPR, learning_rate_decay=decay) for decay in ((1.0, 50.0), (0.9, 1.0), (0.5, 2.0))]
    assert group_members(rates) == [[0], [1, 2]]  # whether there is a decay of the learning rate
    metrics = [dataclasses.replace(VBPR, metric=metric) for metric in ("recall@5", "ndcg@20", "recall@5")]
    assert group_members(metrics) == [[0, 2], [1]]  # the program scores test by the metric on validation


def test_a_grid_may_contain_what_a_run_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(expand_grid(VBPR, {"alpha1": [0.1, 1.0], "alpha2": [0.1, 0.2]})) == 4


@pytest.mark.parametrize("model", models.names())
def test_published_grid_expands(model: str) -> None:
    grid = published_grid(model)
    assert grid
    members = expand_grid(RunConfig(model, "demo"), grid)
    assert len(members) == np.prod([len(values) for values in grid.values()])


BAD_GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown axis": ({"alpha3": [1.0]}, "has no axis 'alpha3'; choose among alpha1, alpha2, batch_size,"),
    "not for a grid": ({"epochs": [1, 2]}, "has no axis 'epochs'"),
    "no values": ({"alpha1": []}, "axis 'alpha1' has no values"),
    "value out of range": ({"alpha1": [1.0, -1.0]}, "alpha1 is -1.0; it must be a positive number"),
    "value of another type": ({"learning_rate": ["high"]}, "learning_rate is 'high'; it must be a positive number"),
    "whole number needed": ({"interval": [1.5]}, "interval is 1.5; it must be a whole number"),
    "no number for weight decay": ({"weight_decay": [True]}, "weight_decay is True; it must be a number"),
    "unknown training": ({"training": ["mirrored"]}, "unknown training 'mirrored'"),
    "unknown optimizer": ({"optimizer": ["adamm"]}, "unknown optimizer 'adamm'"),
    "hyper-parameter of another type": (
        {"embedding_dim": [8, "wide"]},
        "embedding_dim is 'wide'; it must be a whole number",
    ),
    "repeated value": ({"alpha1": [0.5, 1, 1.0]}, "names 1.0 twice"),
    "no effect": ({"training": ["plain"], "alpha1": [0.5, 1.0]}, "axis 'alpha1' has no effect in plain training"),
}


@pytest.mark.parametrize("case", BAD_GRIDS)
def test_bad_grid(case: str) -> None:
    grid, part = BAD_GRIDS[case]
    with pytest.raises(UserError, match=re.escape(part)):
        expand_grid(VBPR, grid)


def test_bad_sweep() -> None:
    with pytest.raises(UserError, match="no members"):
        sweep(DATA, [])
    with pytest.raises(UserError, match="slots is 0"):
        sweep(DATA, [VBPR], slots=0)
    with pytest.raises(UserError, match="start_from is for single runs"):
        sweep(DATA, [dataclasses.replace(VBPR, start_from="run")])
    empty = dataclasses.replace(DATA, valid=DATA.valid[:0])
    with pytest.raises(UserError, match="valid split is empty"):
        sweep(empty, [VBPR])
    with pytest.raises(UserError, match="needs image or text features"):
        sweep(dataclasses.replace(DATA, features={}), [VBPR])
