"""Public names that were changed work for one version more, and say what they are called now."""

from __future__ import annotations

import importlib

import pytest

# Old name -> new one.
RENAMED = {
    "mgrad_jax.data.interactions.Batch": "mgrad_jax.data.sampling.Batch",
    "mgrad_jax.data.interactions.read_features": "mgrad_jax.data.features.read_features",
    "mgrad_jax.data.user_graph.UserSample": "mgrad_jax.graph.users.UserSample",
    "mgrad_jax.data.user_graph.mix_neighbours": "mgrad_jax.graph.users.mix_neighbours",
    "mgrad_jax.data.user_graph.sample_user_graph": "mgrad_jax.graph.users.sample_user_graph",
    "mgrad_jax.evaluation.ranking.Pairs": "mgrad_jax.evaluation.ranking.BlockedPairs",
    "mgrad_jax.evaluation.ranking.Ranker": "mgrad_jax.evaluation.ranking.EvalSplit",
    "mgrad_jax.evaluation.ranking.make_ranker": "mgrad_jax.evaluation.ranking.make_eval_split",
    "mgrad_jax.evaluation.ranking.rank_metrics": "mgrad_jax.evaluation.ranking.full_sort_metrics",
    "mgrad_jax.losses.bpr_loss": "mgrad_jax.models.losses.bpr_loss",
    "mgrad_jax.models.Frozen": "mgrad_jax.models.Constant",
    "mgrad_jax.models.Scalar": "mgrad_jax.models.TracedHyperParameter",
    "mgrad_jax.models.base.Frozen": "mgrad_jax.models.base.Constant",
    "mgrad_jax.models.base.Scalar": "mgrad_jax.models.base.TracedHyperParameter",
    "mgrad_jax.models.propagation.lightgcn_layers": "mgrad_jax.graph.lightgcn_mean",
    "mgrad_jax.selection.largest": "mgrad_jax.selection.top_k_mask",
}


def named(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_the_new_one_with_a_warning(old: str) -> None:
    new = RENAMED[old]
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now; the old name goes with the next version") as told:
        assert named(old) is named(new)
    assert told[0].filename == __file__


@pytest.mark.parametrize("module", sorted({path.rpartition(".")[0] for path in RENAMED}))
def test_a_name_that_never_was_is_an_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        named(f"{module}.no_such_name")
