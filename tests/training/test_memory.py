"""What cannot fit into memory is refused by its size and its setting before anything is allocated; nothing else is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mgrad_jax import models
from mgrad_jax.data import Interactions, demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training import memory
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.memory import available_bytes, check_memory, estimate

DATA = demo_interactions(n_users=60, n_items=45, n_groups=3)


def parts(config: RunConfig, data: Interactions = DATA) -> dict[str, Any]:
    own = models.make_config(config.model, dict(config.hyper_parameters))
    return estimate(config.model, own, data, config.transformation(data), batch_size=config.batch_size, ks=config.ks)


@pytest.mark.slow
@pytest.mark.parametrize("model", models.names())
def test_the_parameters_are_counted_exactly(model: str) -> None:
    config = RunConfig(model, "demo")
    state = nnx.state(config.create_model(DATA), nnx.Param)
    found = parts(config)
    assert found["parameters"].size == 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert found["optimizer state"].size == found["parameters"].size // 2  # Adam's two moments


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_state_is_that_of_the_optimizer(optimizer: str) -> None:
    size = parts(RunConfig("vbpr", "demo", optimizer=optimizer, training="ssam-f"))["optimizer state"].size
    table = parts(RunConfig("vbpr", "demo"))["parameters"].size // 4
    assert size == pytest.approx(table * ({"sgd": 0, "adam": 2}[optimizer] + 0.25))  # and the mask, a byte for four


TOO_LARGE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "width": ("vbpr", {"embedding_dim": 10**9}, {}, "lower embedding_dim \\(now 1000000000\\)"),
    "latent width": ("grcn", {"latent_embedding": 10**9}, {}, "lower latent_embedding"),
    "width of image features": ("mmgcn", {"dim_latent": 10**9}, {}, "lower dim_latent"),
    "user graph": ("dualgnn", {"user_k": 10**7}, {}, "lower user_k"),
    "cut-offs": ("vbpr", {}, {"ks": (5, 2**31 - 1)}, "for evaluation: .* lower ks \\(now 2147483647\\)"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_cannot_fit_is_refused_by_size_and_setting(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 64e9)
    model, hyper_parameters, options, sentence = TOO_LARGE[case]
    config = RunConfig(model, "demo", hyper_parameters=hyper_parameters, **options)
    with pytest.raises(UserError, match=sentence) as caught:
        config.create_model(DATA)
    assert f"{model} needs at least " in str(caught.value)
    assert "64 GB are available" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_batch_counts_as_far_as_there_are_interactions() -> None:
    config = RunConfig("slmrec", "demo")
    whole = dataclasses.replace(config, batch_size=2**31 - 1)
    assert parts(whole)["batch"].size == parts(dataclasses.replace(config, batch_size=len(DATA.train)))["batch"].size
    check_memory(parts(whole), "slmrec", {}, available=1e9)


@pytest.mark.parametrize("model", models.names())
def test_large_published_data_fit_into_24_gigabytes(model: str) -> None:
    users, items, pairs = 192_403, 63_001, 1_689_188
    one = np.zeros((1, 2), np.int32)
    data = Interactions("electronics", users, items, one, one[:0], one[:0])
    shapes = {"image": (items, 4096), "text": (items, 384)}
    tables = {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}
    object.__setattr__(data, "features", tables)
    object.__setattr__(data, "train", np.broadcast_to(one, (pairs, 2)))
    check_memory(parts(RunConfig(model, "demo"), data), model, {}, available=24e9)


def test_what_the_process_may_take_is_known_here() -> None:
    assert 0 < available_bytes() < 2**50
