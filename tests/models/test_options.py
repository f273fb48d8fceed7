"""Options that follow a paper where the published code does not, and the reverse; defaults give the code's numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import batch_of, recorded, recorded_parameters, tiny

from mgrad_jax import interop, models
from mgrad_jax.models import Recommender

# model -> what its option is by default, which is what the recorded numbers were made with
DEFAULTS = {
    "dualgnn": {"separate_modalities": False},
    "grcn": {"item_to_user_routing": False},
    "lightgcn": {"original_loss": False},
    "mmgcn": {"train_tables": False, "sum_modalities": False},
    "selfcf": {"edge_dropout": True},
    "slmrec": {"sigmoid_scores": False},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_is_the_published_form(name: str) -> None:
    config = models.make_config(name, {})
    assert {option: getattr(config, option) for option in DEFAULTS[name]} == DEFAULTS[name]


def mmgcn(**changes: Any) -> Recommender:
    numbers = recorded("mmgcn")
    model: Any = models.create("mmgcn", tiny(), dtype=jnp.float64, embedding_dim=8, reg_weight=0.01, **changes)
    model.use_tables(
        numbers["const/id_embedding"],
        image=numbers["const/v_gcn.preference"],
        text=numbers["const/t_gcn.preference"],
    )
    return interop.load_torch_state(model, recorded_parameters("mmgcn"))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_mmgcn_adds_its_modalities() -> None:
    """Twice the recorded mean of two, and a loss that ranks by four times the recorded scores."""
    numbers, batch = recorded("mmgcn"), batch_of(recorded("mmgcn"))
    model = mmgcn(sum_modalities=True)
    for vectors, name in zip(model.embed(), ("user_emb", "item_emb"), strict=True):
        np.testing.assert_allclose(vectors, 2 * numbers[f"out/{name}"], atol=1e-9)
    scores = 4 * numbers["out/scores"]
    difference = scores[batch.users, batch.positives] - scores[batch.users, batch.negatives]
    _, parts = model.loss(batch, jax.random.key(0))
    np.testing.assert_allclose(parts["bpr"], np.mean(np.logaddexp(0.0, -difference)), rtol=1e-9)
    _, averaged = mmgcn().loss(batch, jax.random.key(0))
    assert parts["table_squares"] == averaged["table_squares"]


@pytest.mark.usefixtures("x64")
def test_slmrec_gives_the_published_sigmoid() -> None:
    numbers = recorded("slmrec")
    parameters = recorded_parameters("slmrec")
    known = {name: parameters[name] for name in models.model_class("slmrec").published_names.values()}
    with_sigmoid, without = (
        interop.load_torch_state(
            models.create("slmrec", tiny(), dtype=jnp.float64, embedding_dim=8, sigmoid_scores=sigmoid), known
        )
        for sigmoid in (True, False)
    )
    users = jnp.arange(with_sigmoid.n_users)
    np.testing.assert_allclose(with_sigmoid.scores(users), numbers["out/scores"], atol=1e-6)
    products = np.asarray(without.scores(users), np.float64)
    np.testing.assert_allclose(with_sigmoid.scores(users), 1 / (1 + np.exp(-products)), rtol=1e-12)
    assert all(map(np.array_equal, with_sigmoid.embed(), without.embed()))  # what rankings are made of
