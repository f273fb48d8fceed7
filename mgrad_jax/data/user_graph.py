"""A dataset's user graph (`mgrad_jax.graph.users`): built, stored beside the data, or read from a published file."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mgrad_jax.data.features import read_header
from mgrad_jax.data.filetypes import beginning, foreign
from mgrad_jax.data.interactions import Interactions, distinct_pairs
from mgrad_jax.deprecation import renamed
from mgrad_jax.errors import UserError, shown
from mgrad_jax.files import written_whole
from mgrad_jax.graph.sparse import shapes_only
from mgrad_jax.graph.users import UserGraph, nearest_users

# The largest table of neighbours, in bytes: beyond it k is a slip.
_MOST = 1 << 32

renamed(
    __name__,
    {
        "UserSample": "mgrad_jax.graph.users.UserSample",
        "mix_neighbours": "mgrad_jax.graph.users.mix_neighbours",
        "sample_user_graph": "mgrad_jax.graph.users.sample_user_graph",
    },
)


def build_user_graph(
    data: Interactions, k: int = 40, *, cache: str | os.PathLike[str] | None = None, write: bool = True
) -> UserGraph:
    """The k users that share the most training items with each user, itself left out; repeated pairs count once.

    Of the users who share equally many items, the reference code keeps whichever comes first in an unspecified order;
    here it is the lowest id.

    Args:
        data: its training split counts.
        k: neighbours a user, 40 in the reference code.
        cache: directory of stored graphs; one of the same interactions and k is read instead of built. Its file name is
            a digest of both, so that it cannot be taken for another's. A damaged file is built anew.
        write: whether to store a graph that was built, in one step (a reader never meets half a file).

    Raises:
        UserError: k below 1, or a cache that cannot be written.
    """
    _check_k(k, data.n_users)
    if shapes_only.value:
        return UserGraph(*jnp.zeros((2, data.n_users, k), jnp.int32))
    pairs = distinct_pairs(data.train, data.n_items)
    file = None if cache is None else _file(Path(cache), pairs, data.n_users, k)
    graph = None if file is None else _read(file, data.n_users, k)
    if graph is not None:
        return graph
    graph = nearest_users(pairs, data.n_users, data.n_items, k)
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
    _check_k(k, data.n_users)
    lists = _unpickled(Path(file))
    exact = build_user_graph(data, k)
    neighbours, shared = np.zeros((2, data.n_users, k), np.int32)
    for user, entry in lists.items():
        ids, counts = _entry(Path(file), user, entry, data.n_users, k)
        neighbours[user, : len(ids)], shared[user, : len(ids)] = ids, counts
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


def _members(neighbours: np.ndarray, shared: np.ndarray, n_users: int) -> np.ndarray:
    """Whether each row names distinct users other than its own."""
    own = np.arange(len(neighbours))[:, None]
    # Padding gets numbers of its own.
    names = np.sort(np.where(shared > 0, neighbours, n_users + np.arange(neighbours.shape[1])), axis=1)
    valid = (neighbours >= 0) & (neighbours < n_users) & ((shared == 0) | (neighbours != own))
    members: np.ndarray = valid.all(axis=1) & (np.diff(names, axis=1) > 0).all(axis=1)
    return members


class _NumbersOnly(pickle.Unpickler):
    """Reads pickled lists, dicts, numbers and arrays, and nothing that could run code.

    NumPy's own functions are never called: a pickle could make them ask for any amount of memory. What stands in for
    them holds no more than the file does.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in _STAND_INS:
            return _STAND_INS[name]
        raise pickle.UnpicklingError(f"it asks for {shown(f'{module}.{name}', 40)}")


class _Array:
    """An array as a pickle describes it: `values` is a flat list of numbers, or of whatever else it held."""

    def __init__(self, *_: Any) -> None:
        self.shape: Any = ()
        self.values: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, _, content = state
        if isinstance(content, list):
            self.values = content
        else:
            self.values = np.frombuffer(content, dtype.checked()).tolist()


class _Dtype:
    """The type of an array or number: whole or floating, of at most 8 bytes."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def checked(self) -> np.dtype[Any]:
        if not re.fullmatch(r"[iuf][1248]", self.code):
            raise pickle.UnpicklingError(f"it holds numbers of type {shown(self.code)}")
        return np.dtype((">" if self.order == ">" else "<") + self.code)


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.checked(), 1)[0].item()


def _not_called(*_: Any) -> Any:
    raise pickle.UnpicklingError("it makes an array of its own")


_STAND_INS = {"_reconstruct": _Array, "ndarray": _not_called, "dtype": _Dtype, "scalar": _scalar}


def _unpickled(file: Path) -> dict[Any, Any]:
    """The dict in an .npy file."""
    try:
        start = beginning(file)
        with file.open("rb") as stream:
            if not start.startswith(b"\x93NUMPY"):
                found = foreign(start)
                raise pickle.UnpicklingError(f"it is {found[0]}" if found else "it is no .npy file")
            read_header(file, stream)
            content = _NumbersOnly(stream).load()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read as a user graph ({error.strerror or error}); give a published user_graph_dict.npy."
        ) from None
    except Exception as error:  # whatever becomes of a damaged pickle
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else "it is damaged"
        raise UserError(
            f"{file} cannot be read as a user graph ({shown(reason)[1:-1]}); give a published user_graph_dict.npy."
        ) from None
    if isinstance(content, _Array) and content.shape == () and len(content.values) == 1:
        content = content.values[0]
    if not isinstance(content, dict):
        raise _no_graph(file)
    return content


def _entry(file: Path, user: Any, entry: Any, n_users: int, k: int) -> tuple[list[int], list[int]]:
    """A user's first k neighbours and numbers of shared items."""
    if type(user) is not int or not 0 <= user < n_users:
        raise _no_graph(file, f"it names user {shown(user, 30)} of {n_users}")
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise _no_graph(file)
    ids, counts = (part.values if isinstance(part, _Array) else part for part in entry)
    if not isinstance(ids, list) or not isinstance(counts, list) or len(ids) != len(counts):
        raise _no_graph(file)
    numbers = [*ids[:k], *counts[:k]]
    if not all(type(number) in (int, float) and abs(number) < 2**31 and number == int(number) for number in numbers):
        raise _no_graph(file, f"a neighbour of user {user} is no whole number")
    return [int(number) for number in ids[:k]], [int(number) for number in counts[:k]]


def _no_graph(file: Path, reason: str = "") -> UserError:
    why = f" ({reason})" if reason else ""
    return UserError(f"{file} holds no user -> [neighbours, counts]{why}; give a published user_graph_dict.npy.")


def _check_k(k: int, n_users: int) -> None:
    if k < 1:
        raise UserError(f"k is {k}; a user graph needs at least 1 neighbour a user.")
    if 8 * k * n_users > _MOST:
        raise UserError(
            f"k is {shown(k)}; for {n_users} users give at most {_MOST // (8 * n_users)} neighbours per user."
        )


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
    except Exception:  # whatever NumPy makes of a damaged archive
        return None
    tables = graph.neighbours, graph.shared
    sound = all(table.shape == (n_users, k) and table.dtype == np.int32 and (table >= 0).all() for table in tables)
    return graph if sound and (graph.neighbours < n_users).all() else None


def _write(file: Path, graph: UserGraph) -> None:
    """In one step: a reader never meets half a file."""
    try:
        with written_whole(file, "wb") as stream:
            np.savez(stream, neighbours=graph.neighbours, shared=graph.shared)
    except UserError as error:
        reason = getattr(error.__context__, "strerror", None) or error
        raise UserError(
            f"{file.parent} cannot hold the user graph ({reason}); choose another cache directory."
        ) from None
