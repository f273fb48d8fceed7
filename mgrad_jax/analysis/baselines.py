"""Recommenders without training: by popularity, and by the neighbours of a user's items.

Every comparison shows them: what a trained model adds is what it has above them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from scipy import sparse

from mgrad_jax.data import Interactions
from mgrad_jax.declaration import check_choice
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import make_eval_split, metrics_of_scores

Scores = Callable[[np.ndarray], np.ndarray]
NEIGHBOURS = (10, 20, 50, 100, 200)
SHRINKS = (0.0, 10.0, 100.0)
# Names, and what each ranks by.
BASELINES: Mapping[str, str] = {
    "popularity": "training interactions of an item",
    "itemknn": "items with the same users as those of the user",
    "itemknn-features": "items with features like those of the user's items",
}
_BLOCK = 1024


class Baseline(NamedTuple):
    """A recommender without training.

    Attributes:
        scores: gives the scores (n, n_items) of all items for users (n,).
        setting: what was chosen on validation, in words; "" where there is nothing to choose.
    """

    scores: Scores
    setting: str


def check_baseline(name: str, data: Interactions) -> None:
    """Refuse a name that does not exist, and neighbours by features where the data have none."""
    check_choice("unknown recommender", name, BASELINES)
    if name == "itemknn-features" and not data.features:
        raise UserError(f"itemknn-features compares features, and {data.source} has none; choose itemknn.")


def make_baseline(name: str, data: Interactions, metric: str) -> Baseline:
    """A recommender without training; how many neighbours an item has, and the shrinkage, are chosen on validation.

    Args:
        name: one of `BASELINES`.
        data: the interactions.
        metric: what is best on validation, e.g. "recall@5"; among `NEIGHBOURS` and, by interactions, `SHRINKS`.

    Raises:
        UserError: see `check_baseline`.
    """
    check_baseline(name, data)
    if name == "popularity":
        return Baseline(popularity(data), "")
    features, shrinks = (None, SHRINKS) if name == "itemknn" else (data.features, (0.0,))
    tried: dict[tuple[float, int], Scores] = {}
    for shrink in shrinks:
        nearest = nearest_items(data, max(NEIGHBOURS), features, shrink)
        tried.update({(shrink, k): itemknn(data, nearest, k) for k in NEIGHBOURS})
    eval_split = make_eval_split(data, "valid", (int(metric.partition("@")[2]),))
    valid = {setting: metrics_of_scores(eval_split, scores)[1][metric].mean() for setting, scores in tried.items()}
    shrink, k = max(valid, key=valid.__getitem__)
    chosen = f"{k} neighbours" + (f", shrink {shrink:g}" if features is None else "")
    return Baseline(tried[shrink, k], f"{chosen}, the best of {len(tried)} settings by validation {metric}")


def baselines(data: Interactions, metric: str) -> dict[str, Baseline]:
    """Every recommender without training that the data allow, by name; see `make_baseline`."""
    able = (name for name in BASELINES if name != "itemknn-features" or data.features)
    return {name: make_baseline(name, data, metric) for name in able}


def popularity(data: Interactions) -> Scores:
    """An item's score is its number of training interactions, the same for every user."""
    counts = np.bincount(data.train[:, 1], minlength=data.n_items).astype(np.float32)
    return lambda users: np.tile(counts, (len(users), 1))


def itemknn(data: Interactions, nearest: tuple[np.ndarray, np.ndarray], k: int) -> Scores:
    """Score of an item: the sum of its similarities to the user's training items whose k nearest it is among.

    Args:
        data: the interactions.
        nearest: from `nearest_items`, at least k of them where there are.
        k: neighbours an item.
    """
    items, similarities = (table[:, :k] for table in nearest)
    starts = np.arange(data.n_items + 1) * items.shape[1]
    graph = sparse.csr_matrix((similarities.ravel(), items.ravel(), starts), shape=(data.n_items, data.n_items))
    history = _history(data)
    return lambda users: (history[users] @ graph).toarray()


def nearest_items(
    data: Interactions, k: int, features: Mapping[str, np.ndarray] | None = None, shrink: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The k items most similar to each, best first, and their similarities, (n_items, at most k) each.

    With U_i the training users of item i and x_i its features, the similarity is

        |U_i & U_j| / (sqrt(|U_i| |U_j|) + shrink)     (Sarwar et al. 2001; shrinkage holds chance meetings down)
        mean over the modalities of cos(x_i, x_j)      where features are given.

    An item is no neighbour of itself; a negative similarity counts as none. Of equal ones the lower id comes first.

    Args:
        data: the interactions.
        k: how many; at most all the others.
        features: (n_items, dim) by modality; None for the interactions.
        shrink: see above.
    """
    rows_of = _co_occurrence(data, shrink) if features is None else _cosine(features)
    blocks = []
    for start in range(0, data.n_items, _BLOCK):
        rows = slice(start, min(start + _BLOCK, data.n_items))
        values = rows_of(rows)
        values[np.arange(len(values)), np.arange(data.n_items)[rows]] = -np.inf
        best, columns = jax.lax.top_k(values, min(k, data.n_items - 1))
        blocks.append((np.asarray(columns), np.maximum(np.asarray(best), 0.0)))
    return np.concatenate([items for items, _ in blocks]), np.concatenate([best for _, best in blocks])


def _co_occurrence(data: Interactions, shrink: float) -> Callable[[slice], np.ndarray]:
    items = _history(data).T.tocsr()
    norms = np.sqrt(np.diff(items.indptr)).astype(np.float32)

    def rows_of(rows: slice) -> np.ndarray:
        shared = (items[rows] @ items.T).toarray()
        cosines: np.ndarray = shared / np.maximum(norms[rows, None] * norms + np.float32(shrink), np.float32(1e-9))
        return cosines

    return rows_of


def _cosine(features: Mapping[str, np.ndarray]) -> Callable[[slice], np.ndarray]:
    tables = [_unit_rows(table) for table in features.values()]
    return lambda rows: np.mean([table[rows] @ table.T for table in tables], axis=0)


def _history(data: Interactions) -> sparse.csr_matrix:
    """Which items each user has in training, (n_users, n_items)."""
    pairs = np.unique(data.train, axis=0)
    ones = np.ones(len(pairs), np.float32)
    return sparse.csr_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(data.n_users, data.n_items))


def _unit_rows(table: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    return (table / np.where(norms > 0, norms, 1.0)).astype(np.float32)
