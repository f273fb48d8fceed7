"""Batches, and sampling inside the compiled epoch: the order of the interactions, and their negatives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mgrad_jax.data.interactions import Interactions, check_negatives, distinct_pairs
from mgrad_jax.deprecation import Formerly


class Batch(NamedTuple):
    """A training batch.

    Attributes:
        users, positives, negatives: (B,) int32; a negative is an item the user does not have in training.
    """

    users: Int[Array, " batch"]
    positives: Int[Array, " batch"]
    negatives: Int[Array, " batch"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["indptr", "ranks", "candidates"],
    meta_fields=["max_degree"],
)
@dataclass(frozen=True)
class UserHistory:
    """Each user's training items, as positions in the list of candidates.

    Attributes:
        indptr: (n_users + 1,) int32; user u owns ranks[indptr[u]:indptr[u + 1]].
        ranks: (n_pairs,) int32, ascending within a user: positions of the user's items in `candidates`.
        candidates: (n_candidates,) int32, the items that occur in training, ascending.
        max_degree: most items of one user; static.
    """

    indptr: Int[Array, " users_plus_1"]
    ranks: Int[Array, " pairs"]
    candidates: Int[Array, " candidates"]
    max_degree: int

    row_starts = Formerly("indptr")


def user_history(data: Interactions) -> UserHistory:
    """The histories of a dataset's training split; repeated pairs count once.

    Raises:
        UserError: a user has every item that occurs in training, so that no negative can be drawn.
    """
    pairs = distinct_pairs(data.train, data.n_items)
    check_negatives(data.source, pairs)
    candidates = np.flatnonzero(np.bincount(pairs[:, 1]))
    degrees = np.bincount(pairs[:, 0], minlength=data.n_users)
    return UserHistory(
        indptr=jnp.asarray(np.concatenate([[0], np.cumsum(degrees)]), jnp.int32),
        ranks=jnp.asarray(np.searchsorted(candidates, pairs[:, 1]), jnp.int32),
        candidates=jnp.asarray(candidates, jnp.int32),
        max_degree=int(degrees.max()),
    )


def sample_negatives(key: Array, users: Int[Array, " n"], history: UserHistory) -> Int[Array, " n"]:
    """One negative a user: uniform over the training items that the user does not have in training.

    The reference code redraws until the item is new to the user. The same distribution without a loop: draw r below
    the number of free items; the r-th free item stands at position r plus the number of the user's own items before
    it, which a binary search over rank - (own items before it) finds. No free item is favoured by more than
    the order of n_candidates / 2**32 (1e-5 at 60,000 items), the modulo bias of `jax.random.randint`. A user who has
    every training item has no negative; `user_history` refuses such data.

    Args:
        key: a PRNG key.
        users: (n,) int32.
        history: from `user_history`.

    Returns:
        (n,) int32 item ids.
    """
    start = history.indptr[users]
    degree = history.indptr[users + 1] - start
    draw = jax.random.randint(key, users.shape, 0, history.candidates.shape[0] - degree)
    own_before, last = jnp.zeros_like(degree), history.ranks.shape[0] - 1
    for bit in reversed(range(history.max_degree.bit_length())):
        more = own_before + (1 << bit)
        is_before = history.ranks[jnp.minimum(start + more - 1, last)] - (more - 1) <= draw
        own_before = jnp.where((more <= degree) & is_before, more, own_before)
    return history.candidates[draw + own_before]


def shuffle(key: Array, n: int) -> Int[Array, " n"]:
    """A random permutation of 0 .. n - 1.

    Every place gets a random tag above its own number in one 32-bit word, so that a sort of single words (three times
    faster than one of pairs) orders by tag; as many rounds as give the tags about twice the bits that n has. Equal tags
    stay in order: they are neighbours then, nearly always of one batch, where order means nothing.

    Args:
        key: a PRNG key.
        n: below 2**31.
    """
    number_bits = max(1, (n - 1).bit_length())
    rounds = -(-number_bits // (32 - number_bits))
    numbers = jnp.arange(n, dtype=jnp.uint32)
    order = numbers
    for round_key in jax.random.split(key, rounds):
        tagged = (jax.random.bits(round_key, (n,), jnp.uint32) << number_bits) | numbers
        order = order[jnp.sort(tagged) & jnp.uint32(2**number_bits - 1)]
    return order.astype(jnp.int32)
