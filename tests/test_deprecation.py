"""Public names that were changed work for one version more, and say what they are called now."""

from __future__ import annotations

import importlib

import jax
import numpy as np
import pytest

from mgrad_jax import models
from mgrad_jax.data import demo_interactions
from mgrad_jax.graph import mean_bipartite

# Old name -> new one.
RENAMED = {
    "mgrad_jax.data.interactions.Batch": "mgrad_jax.data.sampling.Batch",
    "mgrad_jax.data.interactions.read_features": "mgrad_jax.data.features.read_features",
    "mgrad_jax.data.mmrec.problems": "mgrad_jax.data.mmrec.diagnose",
    "mgrad_jax.data.problems": "mgrad_jax.data.diagnose",
    "mgrad_jax.data.user_graph.UserSample": "mgrad_jax.graph.users.UserSample",
    "mgrad_jax.data.user_graph.mix_neighbours": "mgrad_jax.graph.users.mix_neighbours",
    "mgrad_jax.data.user_graph.sample_user_graph": "mgrad_jax.graph.users.sample_user_graph",
    "mgrad_jax.evaluation.ranking.Pairs": "mgrad_jax.evaluation.ranking.BlockedPairs",
    "mgrad_jax.evaluation.ranking.Ranker": "mgrad_jax.evaluation.ranking.EvalSplit",
    "mgrad_jax.evaluation.ranking.make_ranker": "mgrad_jax.evaluation.ranking.make_eval_split",
    "mgrad_jax.evaluation.ranking.rank_metrics": "mgrad_jax.evaluation.ranking.full_sort_metrics",
    "mgrad_jax.losses.bpr_loss": "mgrad_jax.models.losses.bpr_loss",
    "mgrad_jax.losses.half_squares": "mgrad_jax.models.losses.l2_penalty",
    "mgrad_jax.models.Frozen": "mgrad_jax.models.Constant",
    "mgrad_jax.models.Scalar": "mgrad_jax.models.TracedHyperParameter",
    "mgrad_jax.models.base.Frozen": "mgrad_jax.models.base.Constant",
    "mgrad_jax.models.base.Scalar": "mgrad_jax.models.base.TracedHyperParameter",
    "mgrad_jax.models.base.hold_features": "mgrad_jax.models.base.cast_features",
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


def test_arrays_of_graphs_answer_to_their_old_names() -> None:
    graph = mean_bipartite(np.array([0, 1]), np.array([0, 0]), 2, 1)
    for node, names in (
        (graph, {"values": "data", "columns": "indices", "row_starts": "indptr"}),
        (graph.transpose, {"columns": "indices", "row_starts": "indptr", "entries": "permutation"}),
    ):
        for old, new in names.items():
            with pytest.warns(DeprecationWarning, match=rf"{type(node).__name__}\.{old} is .*\.{new} now"):
                assert getattr(node, old) is getattr(node, new)


def test_paths_into_a_graph_are_those_of_the_checkpoints_that_hold_one() -> None:
    graph = mean_bipartite(np.array([0, 1]), np.array([0, 0]), 2, 1)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(graph)]
    transpose = [".transpose.columns", ".transpose.row_starts", ".transpose.entries"]
    assert paths == [".values", ".columns", ".row_starts", *transpose]
    again = jax.tree.map(lambda x: x, graph)
    assert again.shape == graph.shape
    assert again.n_users == graph.n_users
    assert again.transpose.permutation is graph.transpose.permutation


def test_the_old_way_to_a_models_features_is_the_new_one_with_a_warning() -> None:
    model = models.create("vbpr", demo_interactions(n_users=20, n_items=16, n_groups=2, per_user=6), embedding_dim=2)
    with pytest.warns(DeprecationWarning, match="open_feature_tables is expose_features now"):
        assert model.open_feature_tables() == model.feature_paths == ("item_features",)
