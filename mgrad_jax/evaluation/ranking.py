"""Full-sort evaluation on the device: the rank of every positive among all items, and lists of recommendations.

Evaluation needs the ranks of the positives, not the sorted list: an item's rank is the number of items that score
higher, or equal with a lower id. Counting them is exact, ties included, and several times faster than a top-k of the
whole row. Users pass through in blocks, so that no users x items array ever exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mgrad_jax.data import Interactions
from mgrad_jax.deprecation import renamed
from mgrad_jax.devices import BLOCKS, COLUMNS, WHOLE, everywhere, mesh_in_force, over_devices, put
from mgrad_jax.evaluation.metrics import ranking_metrics

renamed(
    __name__,
    {
        "Pairs": "BlockedPairs",
        "Ranker": "EvalSplit",
        "make_ranker": "make_eval_split",
        "rank_metrics": "full_sort_metrics",
    },
)

_Result = TypeVar("_Result")

BLOCK = 512  # measured: larger blocks of scores leave the CPU's cache
_MOST_SCORES = 100_000 * BLOCK  # of a block; where there are more items, it has fewer users


def users_at_a_time(n_items: int) -> int:
    """How many users are scored at a time over so many items: their scores take 205 MB at most, in float32.

    >>> users_at_a_time(7_050), users_at_a_time(630_010)
    (512, 81)
    """
    return max(1, min(BLOCK, _MOST_SCORES // n_items))


def blocks_of(n_users: int, block: int) -> tuple[int, int]:
    """Into how many blocks of at most this size users are dealt, and how many are in each."""
    n_blocks = max(1, -(-n_users // block))
    return n_blocks, min(block, max(1, -(-n_users // n_blocks)))


class BlockedPairs(NamedTuple):
    """(user, item) pairs of every block of users, padded at the end.

    Attributes:
        rows: (blocks, pairs) int32, the user's position in its block; at or beyond the block's size for padding.
        items: (blocks, pairs) int32; 0 for padding.
    """

    rows: Int[Array, "blocks pairs"]
    items: Int[Array, "blocks pairs"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["users", "positive_counts", "positives", "training"],
    meta_fields=["ks", "n_blocks"],
)
@dataclass(frozen=True)
class EvalSplit:
    """What the evaluation of one split needs, on the device; a pytree.

    Attributes:
        users: (blocks, block) int32 user ids; 0 for padding.
        positive_counts: (blocks, block) int32 number of the user's positives; 0 for padding and nobody else.
        positives: the split's pairs, each once.
        training: the users' training pairs, each once: masked in every list.
        ks: cut-offs of the metrics; static.
        n_blocks: how many blocks hold users; static. Others fill up what several devices share.
    """

    users: Int[Array, "blocks block"]
    positive_counts: Int[Array, "blocks block"]
    positives: BlockedPairs
    training: BlockedPairs
    ks: tuple[int, ...]
    n_blocks: int


class _Block(NamedTuple):
    """The arrays of `EvalSplit`, of one block of users or of all."""

    users: Int[Array, "... block"]
    positive_counts: Int[Array, "... block"]
    positives: BlockedPairs
    training: BlockedPairs


class _Asking(NamedTuple):
    """Users who get a list, one block of them or all, and the pairs to leave out."""

    users: Int[Array, "... block"]
    training: BlockedPairs


_AnyBlock = TypeVar("_AnyBlock", _Block, _Asking)


def make_eval_split(
    data: Interactions,
    split: Literal["train", "valid", "test"],
    ks: Sequence[int] = (5, 10, 20, 50),
    *,
    block: int | None = None,
) -> EvalSplit:
    """Prepare the evaluation of one split.

    Every user with at least one positive in the split is evaluated over all items. Only training items are masked,
    for validation and for test, as in the reference code: a validation item can take a rank in the test list.

    Args:
        data: the interactions.
        split: "valid" or "test" ("train" ranks the training items against everything, unmasked).
        ks: cut-offs; they may exceed the number of items.
        block: users scored at a time; `users_at_a_time` by default.
    """
    pairs = np.unique(getattr(data, split), axis=0)
    users, counts = np.unique(pairs[:, 0], return_counts=True)
    n_blocks, size = blocks_of(len(users), block or users_at_a_time(data.n_items))
    # Users are dealt out by their number of positives, so that all blocks hold about equally many pairs.
    order = np.argsort(-counts, kind="stable")
    deal = np.full(n_blocks * size, -1)
    deal[: len(users)] = order
    dealt = deal.reshape(-1, n_blocks).T
    real = dealt >= 0
    ids = np.where(real, users[dealt], -1) if len(users) else np.full_like(dealt, -1)
    masked = np.unique(data.train, axis=0) if split != "train" else pairs[:0]
    return EvalSplit(
        users=jnp.asarray(np.maximum(ids, 0), jnp.int32),
        positive_counts=jnp.asarray(np.where(real, counts[dealt], 0) if len(users) else real, jnp.int32),
        positives=_block_pairs(pairs, ids, data.n_users),
        training=_block_pairs(masked, ids, data.n_users),
        ks=tuple(int(k) for k in ks),
        n_blocks=n_blocks,
    )


def split_over_devices(eval_split: EvalSplit, mesh: Mesh) -> EvalSplit:
    """The same evaluation with each of its blocks on one of the mesh's devices; empty blocks fill up the last."""
    missing = -eval_split.n_blocks % mesh.size
    size = eval_split.users.shape[1]

    def filled(x: Array) -> Any:
        return np.pad(np.asarray(x), ((0, missing), (0, 0)))

    def pairs(blocked: BlockedPairs) -> BlockedPairs:
        rows = filled(blocked.rows)
        rows[eval_split.n_blocks :] = size + np.arange(rows.shape[1])
        return BlockedPairs(rows, filled(blocked.items))

    padded = dataclasses.replace(
        eval_split,
        users=filled(eval_split.users),
        positive_counts=filled(eval_split.positive_counts),
        positives=pairs(eval_split.positives),
        training=pairs(eval_split.training),
    )
    return put(padded, jax.tree.map(lambda _: NamedSharding(mesh, BLOCKS), padded))


def _by_block(
    function: Callable[[_AnyBlock, Array, Array], _Result],
    blocks: _AnyBlock,
    user_vectors: Float[Array, "users dim"],
    item_vectors: Float[Array, "items dim"],
) -> _Result:
    """Results (blocks, ...) of `function(block, vectors of its users, item vectors)`, block after block.

    Each of several devices does its own blocks; for that the items' vectors come to all of them.
    """
    mesh = mesh_in_force()
    if mesh is None or blocks.users.shape[0] % mesh.size:
        results: _Result = jax.lax.map(lambda block: function(block, user_vectors[block.users], item_vectors), blocks)
        return results

    def own(blocks: _AnyBlock, vectors: Array, item_vectors: Array) -> _Result:
        results: _Result = jax.lax.map(lambda part: function(part[0], part[1], item_vectors), (blocks, vectors))
        return results

    # By columns, of which rows are taken without any exchange; then these rows go where their blocks are.
    vectors = jax.lax.with_sharding_constraint(user_vectors, COLUMNS)[blocks.users]
    operands = (blocks, vectors, item_vectors)
    return everywhere(over_devices(mesh, own, (BLOCKS, BLOCKS, WHOLE), BLOCKS, *operands))


def _block_pairs(pairs: np.ndarray, ids: np.ndarray, n_users: int) -> BlockedPairs:
    """Sort pairs into the blocks of their users; `ids` (blocks, block) holds each user at most once, -1 for padding."""
    n_blocks, size = ids.shape
    position = np.full(n_users, -1)
    flat = ids.ravel()
    position[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    pairs = pairs[position[pairs[:, 0]] >= 0]
    slots = position[pairs[:, 0]]
    order = np.argsort(slots, kind="stable")
    slots, items = slots[order], pairs[order, 1]
    blocks = slots // size
    lengths = np.bincount(blocks, minlength=n_blocks)
    width = max(1, int(lengths.max(initial=0)))
    column = np.arange(len(slots)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # Padding points at rows beyond the block, each another one, so that the indices of a block are unique.
    rows = np.tile(size + np.arange(width), (n_blocks, 1))
    columns = np.zeros((n_blocks, width), np.int64)
    rows[blocks, column] = slots % size
    columns[blocks, column] = items
    return BlockedPairs(jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32))


def full_sort_metrics(
    eval_split: EvalSplit, user_vectors: Float[Array, "users dim"], item_vectors: Float[Array, "items dim"]
) -> dict[str, Float[Array, ""]]:
    """Metrics of a split, averaged over its users. Pure and jit-able.

    Args:
        eval_split: from `make_eval_split`.
        user_vectors, item_vectors: the score of a pair is their dot product. A score that is NaN ranks last.

    Returns:
        A value of shape () by names such as "recall@5", not rounded.
    """

    def of_block(block: _Block, vectors: Array, item_vectors: Array) -> dict[str, Array]:
        counts = block.positive_counts
        hits = _hits(block, _scores(block, vectors, item_vectors), eval_split.ks)
        values = ranking_metrics(hits, counts, eval_split.ks)
        return {name: jnp.sum(jnp.where(counts > 0, value, 0.0)) for name, value in values.items()}

    sums = _by_block(of_block, _all_blocks(eval_split), user_vectors, item_vectors)
    n_users = jnp.maximum(jnp.sum(eval_split.positive_counts > 0), 1)
    return {name: jnp.sum(value[: eval_split.n_blocks]) / n_users.astype(value.dtype) for name, value in sums.items()}


def per_user_metrics(
    eval_split: EvalSplit, user_vectors: Float[Array, "users dim"], item_vectors: Float[Array, "items dim"]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Metrics of a split user by user, for paired tests.

    Args:
        eval_split: from `make_eval_split`.
        user_vectors, item_vectors: the score of a pair is their dot product.

    Returns:
        The evaluated users' ids (n,), ascending, and their values (n,) in the same order by names such as "recall@5",
        on the host.
    """
    return by_user(eval_split, jax.device_get(_user_metrics(eval_split, user_vectors, item_vectors)))


def metrics_of_scores(
    eval_split: EvalSplit, scores: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `per_user_metrics`, for scores that are no dot product of two vectors.

    Args:
        eval_split: from `make_eval_split`.
        scores: gives the scores (n, n_items) of all items for users (n,); called once a block, on the host.
    """
    blocks = []
    for number in range(eval_split.users.shape[0]):
        block = jax.tree.map(lambda x, number=number: x[number], _all_blocks(eval_split))
        blocks.append(_block_metrics(block, jnp.asarray(scores(np.asarray(block.users))), eval_split.ks))
    return by_user(eval_split, jax.device_get(jax.tree.map(lambda *values: jnp.stack(values), *blocks)))


@partial(jax.jit, static_argnames="ks")
def _block_metrics(
    block: _Block, scores: Float[Array, "block items"], ks: tuple[int, ...]
) -> dict[str, Float[Array, " block"]]:
    return ranking_metrics(_hits(block, _masked(scores, block.training), ks), block.positive_counts, ks)


def user_metrics(
    eval_split: EvalSplit, user_vectors: Float[Array, "users dim"], item_vectors: Float[Array, "items dim"]
) -> dict[str, Float[Array, "blocks block"]]:
    """Every metric at every place of `eval_split.users`, padding included; `by_user` puts them in order. Pure."""

    def of_block(block: _Block, vectors: Array, item_vectors: Array) -> dict[str, Array]:
        hits = _hits(block, _scores(block, vectors, item_vectors), eval_split.ks)
        return ranking_metrics(hits, block.positive_counts, eval_split.ks)

    return _by_block(of_block, _all_blocks(eval_split), user_vectors, item_vectors)


_user_metrics = jax.jit(user_metrics)


def user_metrics_and_lists(
    eval_split: EvalSplit, user_vectors: Float[Array, "users dim"], item_vectors: Float[Array, "items dim"], length: int
) -> tuple[dict[str, Float[Array, "blocks block"]], Int[Array, "blocks block length"]]:
    """`user_metrics`, and each user's best new items, of which there are `length`; scores are made once. Pure."""

    def of_block(block: _Block, vectors: Array, item_vectors: Array) -> tuple[dict[str, Array], Array]:
        scores = _scores(block, vectors, item_vectors)
        metrics = ranking_metrics(_hits(block, scores, eval_split.ks), block.positive_counts, eval_split.ks)
        return metrics, jax.lax.top_k(scores, length)[1]

    return _by_block(of_block, _all_blocks(eval_split), user_vectors, item_vectors)


def by_user(eval_split: EvalSplit, values: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The evaluated users' ids (n,), ascending, and values (..., blocks, block) in their order, (..., n)."""
    real = np.asarray(eval_split.positive_counts).ravel() > 0
    users = np.asarray(eval_split.users).ravel()[real]
    order = np.argsort(users)

    def arranged(value: np.ndarray) -> np.ndarray:
        return value.reshape(*value.shape[:-2], -1)[..., real][..., order]

    return users[order], {name: arranged(value) for name, value in values.items()}


def _all_blocks(eval_split: EvalSplit) -> _Block:
    return _Block(eval_split.users, eval_split.positive_counts, eval_split.positives, eval_split.training)


def _hits(block: _Block, scores: Float[Array, "block items"], ks: Sequence[int]) -> Bool[Array, "block ranks"]:
    """Whether the item at each of the ranks up to the last cut-off is a positive, for one block of users."""
    users, positives = block.users, block.positives
    n_items = scores.shape[1]
    own = scores.at[positives.rows, positives.items].get(mode="fill", fill_value=0.0)
    rows = scores[jnp.minimum(positives.rows, len(users) - 1)]
    # What does not rank before the positive is counted, not what does: a NaN is in neither, and so ranks last.
    not_before = jnp.arange(n_items)[None, :] >= positives.items[:, None]
    behind = (rows < own[:, None]) | ((rows == own[:, None]) & not_before)
    ranks = n_items - jnp.sum(behind, axis=1, dtype=jnp.int32)
    return jnp.zeros((len(users), max(ks)), bool).at[positives.rows, ranks].set(True, mode="drop")


def _scores(
    block: _Block, vectors: Float[Array, "block dim"], item_vectors: Float[Array, "items dim"]
) -> Float[Array, "block items"]:
    """Scores of one block with the training items at minus infinity."""
    return _masked(_products(vectors, item_vectors), block.training)


def _products(
    vectors: Float[Array, "block dim"], item_vectors: Float[Array, "items dim"]
) -> Float[Array, "block items"]:
    # Full precision: the reduced one that GPUs take by default makes ties and reorders the list.
    return jnp.matmul(vectors, item_vectors.T, precision="highest")


def _masked(scores: Float[Array, "block items"], training: BlockedPairs) -> Float[Array, "block items"]:
    return scores.at[training.rows, training.items].set(-jnp.inf, mode="drop", unique_indices=True)


def top_items(
    user_vectors: Float[Array, "users dim"],
    item_vectors: Float[Array, "items dim"],
    training: np.ndarray,
    users: np.ndarray,
    k: int,
    *,
    block: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best new items of some users, best first, equal scores in the order of their ids.

    Args:
        user_vectors, item_vectors: the score of a pair is their dot product.
        training: (n, 2) pairs (user, item) to leave out.
        users: (n,) user ids, in any order, repeated or not.
        k: length of the lists; at most the number of items is returned.
        block: users scored at a time; `users_at_a_time` by default.

    Returns:
        Item ids (n, k) int32 and scores (n, k). Where a user has fewer than k new items, the rest of the row scores
        minus infinity.

    >>> items, scores = top_items(jnp.eye(2), jnp.eye(2), np.array([[0, 0]]), np.array([1]), 1)
    >>> items.tolist(), scores.tolist()
    ([[1]], [[1.0]])
    """
    unique, inverse = np.unique(np.asarray(users), return_inverse=True)
    block = block or users_at_a_time(item_vectors.shape[0])
    n_blocks = max(1, -(-len(unique) // block))
    if (mesh := mesh_in_force()) is not None:
        n_blocks += -n_blocks % mesh.size
    padded = np.full(n_blocks * min(block, max(1, len(unique))), -1)
    padded[: len(unique)] = unique
    ids = padded.reshape(n_blocks, -1)
    pairs = _block_pairs(np.unique(training, axis=0), ids, user_vectors.shape[0])
    blocks = _Asking(jnp.asarray(np.maximum(ids, 0), jnp.int32), pairs)
    k = min(k, item_vectors.shape[0])
    scores, items = jax.device_get(_top(blocks, user_vectors, item_vectors, k))
    return items.reshape(-1, k)[inverse].astype(np.int32), scores.reshape(-1, k)[inverse]


@partial(jax.jit, static_argnames="k")
def _top(blocks: _Asking, user_vectors: Array, item_vectors: Array, k: int) -> Any:
    def of_block(block: _Asking, vectors: Array, item_vectors: Array) -> Any:
        return tuple(jax.lax.top_k(_masked(_products(vectors, item_vectors), block.training), k))

    return _by_block(of_block, blocks, user_vectors, item_vectors)
