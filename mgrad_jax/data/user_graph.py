"""Users by the training items they share: the user-user graph of DualGNN and DRAGON, exact and never dense."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mgrad_jax.data.interactions import Interactions, distinct_pairs
from mgrad_jax.errors import UserError

# Pairs of users with an item in common that are counted at a time: 2 MB an array, which stays in a processor's cache
# (four times faster than 64 MB).
_BLOCK = 1 << 18


@partial(jax.tree_util.register_dataclass, data_fields=["neighbours", "shared"], meta_fields=[])
@dataclass(frozen=True)
class UserGraph:
    """Each user's nearest users.

    Attributes:
        neighbours: (n_users, k) int32, most shared items first, among equals the lower id first; 0 past the user's last.
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


def build_user_graph(
    data: Interactions, k: int = 40, *, cache: str | os.PathLike[str] | None = None, write: bool = True
) -> UserGraph:
    """The k users that share the most training items with each user, itself left out; repeated pairs count once.

    Exact: all pairs of users with an item in common are counted, in blocks of users by sorting, so that memory does not
    grow with the square of the users. Of the users who share equally many items, the published code keeps whichever
    comes first in an unspecified order; here it is the lowest id.

    Args:
        data: its training split counts.
        k: neighbours a user, 40 as published.
        cache: directory of stored graphs; one of the same interactions and k is read instead of built. Its file name is
            a digest of both, so that it cannot be taken for another's. A damaged file is built anew.
        write: whether to store a graph that was built, in one step (a reader never meets half a file).

    Raises:
        UserError: k below 1, or a cache that cannot be written.
    """
    if k < 1:
        raise UserError(f"k is {k}; a user graph needs at least 1 neighbour a user.")
    pairs = distinct_pairs(data.train, data.n_items)
    file = None if cache is None else _file(Path(cache), pairs, data.n_users, k)
    graph = None if file is None else _read(file, data.n_users, k)
    if graph is not None:
        return graph
    graph = _nearest_users(pairs, data.n_users, data.n_items, k)
    if file is not None and write:
        _write(file, graph)
    return graph


def cache_directory(data: Interactions) -> Path | None:
    """Where a dataset's user graph is kept: the dataset's own directory; None for data that are not on disk."""
    source = Path(data.source)
    return source if source.is_dir() else source.parent if source.is_file() else None


def read_published_user_graph(
    file: str | os.PathLike[str], data: Interactions, k: int = 40, *, cache: str | os.PathLike[str] | None = None
) -> UserGraph:
    """The graph in a published `user_graph_dict.npy`, whose order among equals decides who is in the first k.

    The file is a pickle; only what a dict of lists of numbers needs is allowed in it, so that reading runs no code.

    Args:
        file: a dict in an .npy file, user -> [neighbours, numbers of shared items], most shared first.
        data: the interactions that it was made from; every number must be right for them.
        k: neighbours a user to keep.
        cache: directory to store the graph in, where `build_user_graph` of the same interactions and k finds it.

    Raises:
        UserError: a file that cannot be read or is not of these interactions, or a cache that cannot be written.
    """
    lists = _unpickled(Path(file))
    exact = build_user_graph(data, k)
    neighbours, shared = np.zeros((2, data.n_users, k), np.int32)
    try:
        for user, (ids, counts) in lists.items():
            neighbours[user, : len(ids[:k])], shared[user, : len(ids[:k])] = ids[:k], counts[:k]
    except (TypeError, ValueError, IndexError, OverflowError):
        raise UserError(
            f"{file} holds no user -> [neighbours, counts]; give a published user_graph_dict.npy."
        ) from None
    wrong = np.flatnonzero((shared != exact.shared).any(axis=1) | ~_members(neighbours, shared, data.n_users))
    if len(wrong):
        raise UserError(
            f"{file}: the neighbours of user {wrong[0]} are not those of {data.source} (such users: {len(wrong)}); "
            "give the file made from this dataset, or leave it out to have the graph built."
        )
    graph = UserGraph(neighbours, shared)
    if cache is not None:
        _write(_file(Path(cache), distinct_pairs(data.train, data.n_items), data.n_users, k), graph)
    return graph


def sample_user_graph(key: Array, graph: UserGraph, dtype: Any = jnp.float32) -> UserSample:
    """Fill every user's list up to k, as published: repeat members of the growing list, drawn uniformly (a Polya urn).

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


def _nearest_users(pairs: np.ndarray, n_users: int, n_items: int, k: int) -> UserGraph:
    """The graph of distinct pairs (user, item), sorted by user."""
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
    return np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)


def _most_shared(codes: np.ndarray, id_bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, neighbour and number of the distinct codes `row << id_bits | neighbour`, by row, falling number, neighbour."""
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


def _members(neighbours: np.ndarray, shared: np.ndarray, n_users: int) -> np.ndarray:
    """Whether each row names distinct users other than its own."""
    own = np.arange(len(neighbours))[:, None]
    # Padding gets numbers of its own.
    names = np.sort(np.where(shared > 0, neighbours, n_users + np.arange(neighbours.shape[1])), axis=1)
    valid = (neighbours >= 0) & (neighbours < n_users) & ((shared == 0) | (neighbours != own))
    return valid.all(axis=1) & (np.diff(names, axis=1) > 0).all(axis=1)


class _NumbersOnly(pickle.Unpickler):
    """Reads pickled lists, dicts, numbers and arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in (
            "ndarray",
            "dtype",
            "_reconstruct",
            "scalar",
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(file: Path) -> dict[Any, Any]:
    """The dict in an .npy file."""
    try:
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version != (1, 0):
                raise ValueError(f"format version {version}")
            np.lib.format.read_array_header_1_0(stream)
            content = _NumbersOnly(stream).load()
        lists = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read as a user graph ({error}); give a published user_graph_dict.npy."
        ) from None
    if not isinstance(lists, dict):
        raise UserError(f"{file} holds no user -> [neighbours, counts]; give a published user_graph_dict.npy.")
    return lists


def _file(cache: Path, pairs: np.ndarray, n_users: int, k: int) -> Path:
    """Where a graph is stored: its name is a digest of everything that the graph depends on."""
    digest = hashlib.sha256(f"user graph 1, {n_users} users, k {k}\n".encode())
    digest.update(np.ascontiguousarray(pairs, "<i8").tobytes())
    return cache / f"user_graph-{digest.hexdigest()[:16]}.npz"


def _read(file: Path, n_users: int, k: int) -> UserGraph | None:
    """A stored graph, or None where there is no sound one."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            graph = UserGraph(stored["neighbours"], stored["shared"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    tables = graph.neighbours, graph.shared
    sound = all(table.shape == (n_users, k) and table.dtype == np.int32 and (table >= 0).all() for table in tables)
    return graph if sound and (graph.neighbours < n_users).all() else None


def _write(file: Path, graph: UserGraph) -> None:
    """Written aside, then put in place."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as stream:
            np.savez(stream, neighbours=graph.neighbours, shared=graph.shared)
        os.replace(aside, file)
    except OSError as error:
        raise UserError(
            f"{file.parent} cannot hold the user graph ({error.strerror}); choose another cache directory."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
