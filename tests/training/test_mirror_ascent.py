"""The training method `mirror-ascent`: what it is made of, alone, in a sweep and beside what it cannot be made of."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from mgrad_jax.cli import main
from mgrad_jax.data import demo_interactions
from mgrad_jax.mirror import mirrored
from mgrad_jax.training import fit
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.epoch import split_model
from mgrad_jax.training.sweep import sweep

SETTINGS = {"epochs": 2, "batch_size": 3000, "hyper_parameters": {"embedding_dim": 8}}


@pytest.mark.slow
def test_a_run_is_the_form_made_by_hand_and_a_member_of_a_sweep_the_run() -> None:
    data = demo_interactions()
    results = []
    config = RunConfig("vbpr", "demo", training="mirror-ascent", alpha2=0.3, interval=2, **SETTINGS)
    for tx in (config.transformation(data), mirrored(optax.adam(1e-3), 1.0, 0.3, 2, ascent=True)):
        model = config.create_model(data)
        result = fit(model, data, tx, epochs=2, batch_size=3000)
        results.append((result.history[-1].loss, jax.device_get(split_model(model).params)))
    (loss, params), (loss_by_hand, by_hand) = results
    assert loss == loss_by_hand
    jax.tree.map(np.testing.assert_array_equal, params, by_hand)
    member = sweep(data, [config])[0]
    assert member.losses[-1] == pytest.approx(loss, rel=1e-5)
    mirror = RunConfig("vbpr", "demo", alpha2=0.3, interval=2, **SETTINGS)
    other = fit(mirror.create_model(data), data, mirror.transformation(data), epochs=2, batch_size=3000)
    assert abs(other.history[-1].loss - loss) > 1e-3


def test_an_optimizer_without_a_second_moment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--model", "vbpr", "--data", "demo", "--method", "mirror-ascent", "--optimizer", "lion"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "takes its step sizes from the optimizer's second moment" in capsys.readouterr().err
