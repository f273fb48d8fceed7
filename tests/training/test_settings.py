"""The settings of a training: what earlier versions wrote is read, and `fit`, files and options agree on them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
import yaml

from mgrad_jax import models
from mgrad_jax.data import demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training import fit
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.identity import identity
from mgrad_jax.training.settings import FitSettings, RunSettings

# Written by an earlier version, and the digest by which it knew the run.
WRITTEN = """\
model: vbpr
data: demo
training: ssam-d
alpha1: 1.0
alpha2: 0.2
interval: 3
flat_minima_args:
  rho: 0.1
adversarial:
  epsilon: 0.1
  weight: 1
feature_dtype: float32
matmul_precision: highest
deterministic: false
optimizer: sgd
learning_rate: 0.01
weight_decay: 0.0001
optimizer_args:
  momentum: 0.9
learning_rate_decay:
- 0.96
- 50.0
max_norm: 2.0
seed: 3
epochs: 10
patience: 2
batch_size: 64
metric: ndcg@10
ks:
- 5
- 10
evaluate: stale
hyper_parameters:
  embedding_dim: 8
  reg_weight: 0.0
start_from: null
out: somewhere
data_digest: x
"""
DIGEST = "44f91a04cede8f697747139574d9561d"


def test_a_configuration_of_an_earlier_version_is_the_same_run() -> None:
    settings = yaml.safe_load(WRITTEN)
    config = RunConfig.of({name: value for name, value in settings.items() if name != "data_digest"})
    assert {**config.to_dict(), "data_digest": "x"} == settings
    assert identity(settings) == DIGEST
    assert config.learning_rate_decay == (0.96, 50.0)


def test_numbers_of_numpy_are_written_as_plain_ones() -> None:
    config = RunConfig("vbpr", "demo", seed=np.int64(3), learning_rate=np.float64(0.5))
    assert yaml.safe_load(yaml.safe_dump(config.to_dict()))["seed"] == 3
    assert config.to_dict() == RunConfig("vbpr", "demo", seed=3, learning_rate=0.5).to_dict()


def test_every_setting_of_fit_is_one_of_a_run() -> None:
    own, of_run = ({f.name: f for f in dataclasses.fields(kind)} for kind in (FitSettings, RunSettings))
    assert own.keys() < of_run.keys()
    assert all(field.metadata["help"] for field in of_run.values())
    assert isinstance(RunConfig("vbpr", "demo"), FitSettings)


def test_fit_takes_settings_and_names_in_place_of_them() -> None:
    data = demo_interactions(n_users=60, n_items=40)
    small = FitSettings(epochs=1, batch_size=1000, seed=5)
    given = [(small, {}), (FitSettings(epochs=9, seed=5), {"epochs": 1, "batch_size": 1000}), (None, small.values)]
    results = [
        fit(models.create("vbpr", data, embedding_dim=4), data, optax.adam(1e-3), settings, **named)
        for settings, named in given
    ]
    assert len({(result.epochs_run, result.history[0].loss) for result in results}) == 1


def test_fit_refuses_what_is_no_setting_or_out_of_range() -> None:
    data = demo_interactions(n_users=60, n_items=40)
    model = models.create("vbpr", data, embedding_dim=4)
    with pytest.raises(TypeError, match="epoch"):
        fit(model, data, optax.adam(1e-3), epoch=3)
    for named, sentence in (
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"metric": "recall@7"}, "unknown metric 'recall@7'; choose one of recall@5,"),
        ({"evaluate": "late"}, "unknown evaluate 'late'; choose one of fresh, stale"),
    ):
        with pytest.raises(UserError, match=sentence):
            fit(model, data, optax.adam(1e-3), **named)


def test_a_configuration_that_fits_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, eval_shape = [], jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", lambda *what: (traced.append(what), eval_shape(*what))[1])
    RunConfig("vbpr", "demo", alpha1=0.7)
    assert len(traced) == 1


def test_an_optimizer_is_blamed_before_the_method_around_it() -> None:
    with pytest.raises(UserError, match=r"^the adam optimizer does not take \{'b1': 'high'\}"):
        RunConfig("vbpr", "demo", training="ssam-f", optimizer_args={"b1": "high"}, flat_minima_args={"samples": 3})
    with pytest.raises(UserError, match=r"^ssam-f has no argument 'samples'"):
        RunConfig("vbpr", "demo", training="ssam-f", flat_minima_args={"samples": 3})
