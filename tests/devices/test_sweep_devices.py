"""A sweep over several devices: the members of one device's sweep, each on a device of its own, and nothing sent."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax import models
from mgrad_jax.data import demo_interactions
from mgrad_jax.devices import mesh
from mgrad_jax.errors import UserError
from mgrad_jax.training import engine, side_by_side
from mgrad_jax.training import sweep as sweeping
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.sweep import MemberResult, SweepReport, sweep

DATA = demo_interactions(n_users=60, n_items=40)
VBPR = RunConfig(
    "vbpr",
    "demo",
    epochs=4,
    patience=0,
    batch_size=240,  # three batches, none partial: one scan to compile
    training="plain",
    optimizer="sgd",
    learning_rate=1.0,
    weight_decay=1e-4,
    hyper_parameters={"embedding_dim": 4},
)
FREEDOM = dataclasses.replace(VBPR, model="freedom", epochs=2)
SENDS = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter")


def members(base: RunConfig, *epochs: int) -> list[RunConfig]:
    """So many that differ in seed and learning rate, each with its own most epochs."""
    rate = base.learning_rate
    return [dataclasses.replace(base, seed=i, learning_rate=rate / (i + 1), epochs=n) for i, n in enumerate(epochs)]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that are compiled in the test."""
    found: list[Any] = []
    account = engine._bytes
    monkeypatch.setattr(engine, "_bytes", lambda program: (found.append(program), account(program))[1])
    return found


@pytest.fixture
def float64(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in float64, in which two orders of a sum differ by less than any mistake."""

    def create(config: RunConfig, data: Any) -> models.Recommender:
        return models.create(config.model, data, seed=config.seed, dtype=jnp.float64, **config.hyper_parameters)

    monkeypatch.setattr(RunConfig, "create_model", create)


def assert_equal(results: list[MemberResult], expected: list[MemberResult]) -> None:
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.config == theirs.config
        assert (ours.epochs_run, ours.best_epoch, ours.diverged) == (
            theirs.epochs_run,
            theirs.best_epoch,
            theirs.diverged,
        )
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-12)
        assert (ours.valid, ours.test) == (theirs.valid, theirs.test)


# --- the same members -------------------------------------------------------------------------------------------------


def test_members_are_those_of_one_device_and_nothing_is_sent(float64: None, programs: list[Any]) -> None:
    asked = members(VBPR, 4, 4, 4, 4, 4)
    asked[1] = dataclasses.replace(asked[1], learning_rate=3e38, weight_decay=3e38)
    expected = sweep(DATA, asked, slots=1)
    assert [result.diverged for result in expected] == [False, True, False, False, False]
    assert len({result.epochs_run for result in expected}) > 2  # some stopped early and had others take their lane
    for n in (1, 2, 4, 8):
        assert_equal(sweep(DATA, asked, slots=1, mesh=mesh(n)), expected)
    widths = [len(jax.tree.leaves(program.input_shardings)[0].device_set) for program in programs]
    assert widths == [1, 1, 1, 1, 2, 2, 4, 4, 5, 5]  # eight devices are more than members
    assert not any(SENDS.search(program.as_text()) for program in programs)


@pytest.mark.slow
def test_a_model_of_graphs_over_devices(float64: None, programs: list[Any]) -> None:
    asked = members(FREEDOM, 2, 1, 2)
    expected = sweep(DATA, asked, slots=1)
    assert_equal(sweep(DATA, asked, slots=2, mesh=mesh(2)), expected)
    assert not any(SENDS.search(program.as_text()) for program in programs)


def test_lanes_left_over_are_shared_out_anew(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []
    keep = sweeping.Lanes.keep
    monkeypatch.setattr(sweeping.Lanes, "keep", lambda self, *of: (kept.append(of[0]), keep(self, *of)))
    reports: list[SweepReport] = []
    asked = members(dataclasses.replace(VBPR, patience=9), 1, 1, 1, 1, 2, 3, 3)  # the last of eight lanes idles
    results = sweep(DATA, asked, slots=2, mesh=mesh(4), on_epoch=reports.append)
    assert kept == [[4, 5, 6, 0]]  # those of two devices, and an idle one, come to lie on four
    assert [report.running for report in reports] == [[1, 1, 1], [2, 2], []]
    assert_equal(results, sweep(DATA, asked, slots=1))


# --- what a device holds ----------------------------------------------------------------------------------------------


def test_each_of_four_devices_holds_a_quarter(float64: None, programs: list[Any]) -> None:
    asked = members(VBPR, *[4] * 8)
    alone, spread = (sweeping._Group(asked, DATA, over) for over in (None, mesh(4)))
    alone.compile(8)
    lanes = sweeping._GroupRun(spread, 8).lanes
    shared = sum(x.nbytes for x in jax.tree.leaves((alone.engine._shared, alone.engine._train_data)))
    one, _, four, _ = (program.memory_analysis() for program in programs)
    own = one.argument_size_in_bytes - shared
    assert four.argument_size_in_bytes - shared == pytest.approx(own / 4, rel=0.01)
    assert four.temp_size_in_bytes < 0.3 * one.temp_size_in_bytes
    for leaf in jax.tree.leaves((lanes.state, lanes.own)):
        assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [2] * 4


def test_one_device_is_no_mesh(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "over_devices", lambda *_: pytest.fail("it is spread over devices"))
    for asked, over in ((members(VBPR, 1, 1), mesh(1)), (members(VBPR, 1), mesh(4))):
        for result in sweep(DATA, asked, slots=1, mesh=over):
            assert result.epochs_run == 1


def test_a_member_too_large_for_a_device_is_split_over_all(
    float64: None, programs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = members(VBPR, 1, 2)
    expected = sweep(DATA, asked, slots=1)
    monkeypatch.setattr(sweeping, "available_bytes", lambda: 0)
    assert_equal(sweep(DATA, asked, mesh=mesh(2)), expected)
    assert SENDS.search(programs[-2].as_text())
    with pytest.raises(UserError, match="does not fit into the memory of one device, and 5 devices cannot share"):
        sweep(DATA, asked, mesh=mesh(5))
