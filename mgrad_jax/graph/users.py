"""User graphs: who shares the most items with whom, exact and never dense; sampled anew every epoch, and mixed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Pairs of users with an item in common that are counted at a time: 2 MB an array, which stays in a processor's cache
# (four times faster than 64 MB).
_BLOCK = 1 << 18


@partial(jax.tree_util.register_dataclass, data_fields=["neighbours", "shared"], meta_fields=[])
@dataclass(frozen=True)
class UserGraph:
    """Each user's nearest users.

    Attributes:
        neighbours: (n_users, k) int32, most shared items first, among equals the lower id first; 0 past the user's
        last.
        shared: (n_users, k) int32, number of training items in common; 0 past the user's last neighbour.
    """

    neighbours: Int[Any, "users k"]
    shared: Int[Any, "users k"]


class UserSample(NamedTuple):
    """The user graph of one epoch.

    Attributes:
        neighbours: (n_users, k) int32; a user with fewer than k neighbours has some more than once.
        weights: (n_users, k), softmax over a row's numbers of shared items; all 0 for a user without neighbours.
    """

    neighbours: Int[Array, "users k"]
    weights: Float[Array, "users k"]


def nearest_users(pairs: np.ndarray, n_users: int, n_items: int, k: int) -> UserGraph:
    """The k users that share the most items with each user, itself left out. Host side.

    Exact: all pairs of users with an item in common are counted, in blocks of users by sorting, so that memory does not
    grow with the square of the users.

    Args:
        pairs: (n, 2) distinct rows (user, item), sorted by user.
        n_users, n_items: ids are below these.
        k: neighbours per user.
    """
    users, items = pairs.T
    by_item = users[np.argsort(items, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(items, minlength=n_items))])
    degrees = np.diff(starts)[items]
    id_bits = n_users.bit_length()
    neighbours, shared = np.zeros((2, n_users, k), np.int32)
    for block in _blocks(users, degrees, n_users):
        first = users[block.start]
        own = np.repeat(users[block], degrees[block])
        others = by_item[_ranges(starts[items[block]], degrees[block])]
        different = own != others
        if not different.any():
            continue
        rows, ids, counts = _most_shared((own[different] - first) << id_bits | others[different], id_bits)
        row_starts = np.flatnonzero(np.diff(rows, prepend=-1))
        rank = np.arange(len(rows)) - np.repeat(row_starts, np.diff(row_starts, append=len(rows)))
        kept = rank < k
        places = rows[kept] + first, rank[kept]
        neighbours[places], shared[places] = ids[kept], counts[kept]
    return UserGraph(neighbours, shared)


def sample_user_graph(key: Array, graph: UserGraph, dtype: Any = jnp.float32) -> UserSample:
    """Fill every user's list up to k by members of the growing list, drawn uniformly (a Polya urn, as the reference).

    Inside jit. The entry at place p past a user's n neighbours repeats the entry at a place drawn from 0 to p - 1; it
    comes from one of the first n after at most log2(k) steps of following two draws at once.

    Args:
        key: a PRNG key.
        graph: from `build_user_graph`.
        dtype: of the weights.
    """
    n_users, k = graph.shared.shape
    places = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[None], (n_users, k))
    draws = jax.random.randint(key, places.shape, 0, jnp.maximum(places, 1))
    origins = jnp.where(graph.shared > 0, places, draws)
    for _ in range((k - 1).bit_length()):
        origins = jnp.take_along_axis(origins, origins, axis=1)
    shared = jnp.take_along_axis(graph.shared, origins, axis=1)
    # A user without neighbours has zeros only, and their softmax must not count.
    weights = jnp.where(shared > 0, jax.nn.softmax(shared.astype(dtype), axis=1), 0.0)
    return UserSample(jnp.take_along_axis(graph.neighbours, origins, axis=1), weights)


def mix_neighbours(
    sample: UserSample, x: Float[Array, "users dim"], users: Int[Array, " n"] | None = None
) -> Float[Array, "n dim"]:
    """The weighted sum of x over the neighbours of some users, or of all (one neighbour after another).

    Args:
        sample: the epoch's graph.
        x: (n_users, dim).
        users: ids, e.g. of a batch; None: all.
    """
    if users is not None:
        rows = x[sample.neighbours[users]]
        return jnp.sum(sample.weights[users][..., None] * rows, axis=1)

    def add(total: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        neighbours, weights = column
        return total + weights[:, None] * x[neighbours], None

    return jax.lax.scan(add, jnp.zeros_like(x), (sample.neighbours.T, sample.weights.T))[0]


def _blocks(users: np.ndarray, weights: np.ndarray, n_users: int) -> Iterator[slice]:
    """Runs of whole users whose weights add up to `_BLOCK` at most, or single users."""
    user_ends = np.cumsum(np.bincount(users, minlength=n_users))
    total = np.concatenate([[0], np.cumsum(weights)])
    start = 0
    while start < len(users):
        # The last user who fits entirely, but at least one.
        fits = int(np.searchsorted(total[user_ends], total[start] + _BLOCK, side="right")) - 1
        end = int(user_ends[max(fits, users[start])])
        yield slice(start, end)
        start = end


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers of all ranges, one after another."""
    numbers: np.ndarray = np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return numbers


def _most_shared(codes: np.ndarray, id_bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, neighbour and count of the distinct codes `row << id_bits | neighbour`, ordered by row and falling count."""
    codes = np.sort(codes)
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    counts = np.diff(starts, append=len(codes))
    distinct, most = codes[starts], int(counts.max())
    # One more sort of single numbers, with most - count in between: for millions of users still below 2**63.
    count_bits, ids = most.bit_length(), (1 << id_bits) - 1
    keys = ((distinct >> id_bits) << count_bits | (most - counts)) << id_bits | (distinct & ids)
    keys.sort()
    rows_and_counts = keys >> id_bits
    return rows_and_counts >> count_bits, keys & ids, most - (rows_and_counts & ((1 << count_bits) - 1))
