"""Ranking a held-out item among candidates that were sampled for its user, as AMR's authors do (Tang et al. 2019).

A metric on sampled candidates is no estimate of the one over all items, and may order models otherwise (Krichene and
Rendle, KDD 2020). With r the number of candidates that score at least as high as the held-out item,

    hr@K   = 1 where r < K, else 0
    ndcg@K = ln 2 / ln(r + 2) where r < K, else 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mgrad_jax.data import Interactions
from mgrad_jax.data.features import read_features
from mgrad_jax.devices import everywhere
from mgrad_jax.errors import UserError

KS = (5, 10, 20)
CANDIDATE_METRICS = tuple(f"candidates_{name}@{k}" for name in ("hr", "ndcg") for k in KS)
CAPTION = (
    "candidates_hr@K and candidates_ndcg@K rank the held-out item among the candidates sampled for its user; metrics "
    "on sampled candidates are no full-ranking metrics and do not compare with recall@K and ndcg@K."
)
_BLOCK = 512


class Candidates(NamedTuple):
    """Who is ranked among what.

    Attributes:
        users: (n,) user ids, ascending.
        items: (n, width) item ids; the held-out one first, -1 where a user has fewer.
        digest: of both.
    """

    users: np.ndarray
    items: np.ndarray
    digest: str


def read_candidates(file: Path, data: Interactions) -> Candidates:
    """Candidates from an .npy file as `mgrad-jax prepare --amr` writes it.

    Args:
        file: (n_users, width) whole numbers, row = user: the held-out item, then the items it is ranked among; -1 where
            there are fewer. Users whose first number is -1, and those without training interactions, are left out.
        data: the dataset whose ids these are.

    Raises:
        UserError: the file cannot be read or does not fit the data.
    """
    table = read_features(file, None)
    if table is None:
        raise UserError(f"{file} does not exist; `mgrad-jax prepare --amr` writes candidates.npy.")
    if len(table) != data.n_users:
        raise UserError(f"{file} has {len(table)} rows and {data.source} {data.n_users} users; give one row per user.")
    if table.shape[1] < 2:
        raise UserError(f"{file} has no candidates beside the held-out items; give at least two columns.")
    bad = np.argwhere((table != np.floor(table)) | (table < -1) | (table >= data.n_items))
    if len(bad):
        row, column = bad[0]
        raise UserError(
            f"{file}: row {row}, column {column} is {table[row, column]:g}, no item id from 0 to {data.n_items - 1} "
            "and not -1; correct it."
        )
    items = table.astype(np.int32)
    known = np.bincount(data.train[:, 0], minlength=data.n_users) > 0
    users = np.flatnonzero(known & (items[:, 0] >= 0))
    if not len(users):
        raise UserError(f"{file} holds out no item of a user with training interactions; give the items to be found.")
    lonely = users[(items[users, 1:] < 0).all(axis=1)]
    if len(lonely):
        raise UserError(f"{file}: row {lonely[0]} has a held-out item and no candidates; give it some.")
    return Candidates(users, items[users], hashlib.blake2b(items.tobytes(), digest_size=16).hexdigest())


def candidate_metrics(
    candidates: Candidates, scores: Callable[[np.ndarray], np.ndarray], ks: Sequence[int] = KS
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every metric at every cut-off, user by user; nothing is masked, and a score that is NaN ranks last.

    Args:
        candidates: from `read_candidates`.
        scores: gives the scores (n, n_items) of all items for users (n,).
        ks: cut-offs.

    Returns:
        The users' ids (n,) and `{"candidates_hr@5": (n,), ...}`.

    >>> candidates = Candidates(np.array([0]), np.array([[0, 1, 2, -1]]), "")
    >>> _, found = candidate_metrics(candidates, lambda users: np.array([[0.5, 0.5, 0.1]]), (1, 2))
    >>> {name: round(float(values[0]), 3) for name, values in found.items()}
    {'candidates_hr@1': 0.0, 'candidates_hr@2': 1.0, 'candidates_ndcg@1': 0.0, 'candidates_ndcg@2': 0.631}
    """
    ranks = []
    for start in range(0, len(candidates.users), _BLOCK):
        block = slice(start, start + _BLOCK)
        items = candidates.items[block]
        own = np.take_along_axis(scores(candidates.users[block]), np.maximum(items, 0), axis=1)
        at_least = ~(own[:, 1:] < own[:, :1]) & (items[:, 1:] >= 0)
        ranks.append(at_least.sum(axis=1))
    rank = np.concatenate(ranks)
    found = {f"candidates_hr@{k}": (rank < k).astype(np.float32) for k in ks}
    gain = (np.log(2) / np.log(rank + 2)).astype(np.float32)
    return candidates.users, {**found, **{f"candidates_ndcg@{k}": np.where(rank < k, gain, 0) for k in ks}}


def scores_of(
    user_vectors: Float[Array, "users dim"], item_vectors: Float[Array, "items dim"]
) -> Callable[[np.ndarray], np.ndarray]:
    """Scores that are dot products of vectors, in the form of `candidate_metrics`."""
    return lambda users: np.asarray(_products(user_vectors[users], item_vectors))


@jax.jit
def _products(users: Float[Array, "block dim"], items: Float[Array, "items dim"]) -> Float[Array, "block items"]:
    return jnp.matmul(everywhere(users), everywhere(items).T, precision="highest")
