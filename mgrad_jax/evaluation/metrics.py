"""Recall, precision, average precision and NDCG of ranked lists, as the reference evaluator defines them, unrounded.

For a user with P positives and hits h_1 .. h_K among the first K ranks:

    recall@K    = sum h_r / P
    precision@K = sum h_r / K
    map@K       = sum h_r precision@r / min(K, P)
    ndcg@K      = sum h_r / log2(r + 1)  /  sum over r <= min(K, P) of 1 / log2(r + 1)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

METRICS = ("recall", "precision", "map", "ndcg")


def ranking_metrics(
    hits: Bool[Array, "users ranks"], positive_counts: Int[Array, " users"], ks: Sequence[int]
) -> dict[str, Float[Array, " users"]]:
    """Every metric at every cut-off, user by user.

    Args:
        hits: whether the item at each rank, best first, is a positive of the user.
        positive_counts: how many positives a user has, found or not; a user without any gets 0 everywhere.
        ks: cut-offs, none larger than the number of ranks.

    Returns:
        A value per user by names such as "recall@5", in the order of `METRICS`; shape (users,), JAX's default float
        type.

    Raises:
        ValueError: a cut-off below 1 or beyond the ranks.

    >>> found = jnp.array([[True, False, True]])
    >>> {name: round(float(x[0]), 3) for name, x in ranking_metrics(found, jnp.array([2]), (3,)).items()}
    {'recall@3': 1.0, 'precision@3': 0.667, 'map@3': 0.833, 'ndcg@3': 0.92}
    """
    n_ranks = hits.shape[1]
    if not ks or min(ks) < 1 or max(ks) > n_ranks:
        raise ValueError(f"cut-offs {tuple(ks)} do not lie between 1 and the {n_ranks} ranks given.")
    dtype = jax.dtypes.canonicalize_dtype(float)
    hit = hits.astype(dtype)
    ranks = jnp.arange(1, n_ranks + 1, dtype=dtype)
    discounts = 1.0 / jnp.log2(ranks + 1.0)
    found = jnp.cumsum(hit, axis=1)
    precision_sum = jnp.cumsum(hit * found / ranks[None, :], axis=1)
    gain = jnp.cumsum(hit * discounts[None, :], axis=1)
    ideal = jnp.cumsum(discounts)
    positives = jnp.maximum(positive_counts, 1)
    values: dict[str, Array] = {}
    for k in ks:
        reachable = jnp.minimum(positives, k)
        values[f"recall@{k}"] = found[:, k - 1] / positives.astype(dtype)
        values[f"precision@{k}"] = found[:, k - 1] / k
        values[f"map@{k}"] = precision_sum[:, k - 1] / reachable.astype(dtype)
        values[f"ndcg@{k}"] = gain[:, k - 1] / ideal[reachable - 1]
    return {f"{name}@{k}": values[f"{name}@{k}"] for name in METRICS for k in ks}
