"""Tables of features held in bfloat16: what changes type, what does not, and that training goes on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mgrad_jax import mirror_gradient, models
from mgrad_jax.cli import main
from mgrad_jax.data import demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training import fit
from mgrad_jax.training.run import load_run

READERS = [name for name in models.names() if models.model_class(name).needs]
SMALL = demo_interactions(n_users=60, n_items=40, n_groups=4)


def _tables(model: models.Recommender) -> list[jax.Array]:
    found = []
    for path in model.expose_features():
        variable = model
        for name in path.split("."):
            variable = getattr(variable, name)
        found.append(variable.get_value())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_tables_are_rounded_and_nothing_else(name: str) -> None:
    exact, narrow = (models.create(name, SMALL, embedding_dim=8, feature_dtype=t) for t in (None, jnp.bfloat16))
    wide = _tables(exact)
    for table, held in zip(wide, _tables(narrow), strict=True):
        assert held.dtype == jnp.bfloat16
        np.testing.assert_array_equal(held, table.astype(jnp.bfloat16))
    left = [x for x in jax.tree.leaves(jax.tree.map(jnp.asarray, nnx.state(narrow))) if x.dtype == jnp.bfloat16]
    assert len(left) == len(wide)
    users, items = narrow.embed()
    assert users.dtype == items.dtype == jnp.float32
    for ours, theirs in zip((users, items), exact.embed(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02 * float(jnp.abs(theirs).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vbpr", "freedom"])
def test_a_model_trains_with_narrow_tables(name: str) -> None:
    model = models.create(name, SMALL, embedding_dim=8, feature_dtype=jnp.bfloat16)
    result = fit(model, SMALL, optax.chain(mirror_gradient(), optax.adam(1e-2)), epochs=8, batch_size=120)
    losses = [report.loss for report in result.history]
    assert losses[-1] < losses[0]
    assert all(table.dtype == jnp.bfloat16 for table in _tables(model))


def test_a_model_without_features_has_nothing_to_hold() -> None:
    with pytest.raises(UserError, match="lightgcn reads no features"):
        models.create("lightgcn", SMALL, feature_dtype=jnp.bfloat16)


def test_the_command_line_keeps_the_type_in_the_run(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--model", "vbpr", "--data", "demo", "--epochs", "1", "--set", "embedding_dim=8"]
    out = str(tmp_path / "run")
    assert main([*arguments, "--feature-dtype", "bfloat16", "--out", out]) == 0
    assert load_run(out).model.item_features.get_value().dtype == jnp.bfloat16
    capfd.readouterr()
    assert main([*arguments, "--feature-dtype", "float8"]) == 2
    assert (
        "unknown feature dtype 'float8'; choose one of float32, bfloat16 (did you mean float32?)."
        in capfd.readouterr().err
    )
