"""The latest and the best state of a run on disk, written by orbax.

A checkpoint is a directory `<epoch>-best-<best epoch>`, so its name tells which checkpoint is the latest and which the
best. It is moved into place once it is complete, so a process killed at any moment leaves the previous ones as they
were. Beside orbax's files it holds `run.json`: a digest of the state, and the notes of whoever trains (which run it is,
the rows of its history), so that everything else in a run's directory can be made from it again. All of the writing
goes on in a thread while the next epoch trains. Where epochs are short, not every checkpoint waits for the disk, which
would take longer than the epoch; the last one that did is kept as well until training ends.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mgrad_jax.data.digests import digest
from mgrad_jax.devices import put
from mgrad_jax.errors import UserError, shown
from mgrad_jax.files import Damaged, sync_directory, sync_tree, unwritable, write_whole
from mgrad_jax.processes import any_of, by_first, together
from mgrad_jax.signals import held_back
from mgrad_jax.training.checkpoint_directory import (
    CheckpointLost,
    Entry,
    Which,
    damaged,
    entries_of,
    entry_at,
    find,
    finish,
    name_of,
    remove,
    remove_unfinished,
    unfinished,
)
from mgrad_jax.training.entries import entries_digest, is_entries_digest, spans_processes
from mgrad_jax.training.stored_state import SIDECAR, read_leaves, read_parts, read_sidecar, seal, write_leaves

# What a power loss may cost besides the epoch under way.
_SECONDS_WITHOUT_DISK = 1.0
_Read = TypeVar("_Read")


class Checkpoints:
    """The checkpoints of one run.

    Nothing on disk changes until the first `save`, so that a run under way can be read from another process.

    Args:
        directory: where they live; made by the first `save`.
        on_complete: called with a checkpoint's notes once it has its place, in the thread that writes.

    Attributes:
        notes: what the next checkpoint says about its run, as JSON has it.
    """

    def __init__(
        self, directory: str | os.PathLike[str], on_complete: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.directory = Path(directory).absolute()
        self.notes: dict[str, Any] = {}
        self._on_complete = on_complete
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._best: int | None = self.best_epoch()
        # The directory as it was when this process began to write to it.
        self._place: os.stat_result | None = None
        # The last checkpoint that reached the disk in this process, and when.
        self._safe, self._safe_since = 0, -math.inf

    def save(self, epoch: int, state: Any, is_best: bool) -> None:
        """Start writing the state after an epoch; the previous one is complete when this returns.

        Args:
            epoch: counts from 1; larger than that of any checkpoint there, or that of a best one that was lost.
            state: a pytree of arrays (raw key data instead of typed PRNG keys). It is copied to the host before this
                returns, so its buffers may be donated. Where it is split over several processes, all make this call,
                and it is on disk when this returns.
            is_best: whether it is the best so far; the first one always is.

        Raises:
            UserError: the directory cannot be written.
        """
        # Empty arrays are left out: orbax refuses them, and there is nothing to remember.
        named = {name: leaf for name, leaf in _named_leaves(state).items() if leaf.size}
        if spans_processes(named.values()):
            self._save_together(epoch, named, is_best)
            return
        leaves = {name: np.array(leaf) for name, leaf in named.items()}
        notes = dict(self.notes)
        with held_back():
            self.wait()
            name = self._next(epoch, is_best)
            if self._thread is None:
                self._open()
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._pending = self._thread.submit(self._write, epoch, self.directory / name, leaves, notes)

    def restore(self, like: Any, which: Which = "latest") -> tuple[int, Any]:
        """Read a checkpoint back.

        Args:
            like: a pytree of the saved one's structure, shapes and dtypes. Where it holds numpy arrays, numpy arrays
                come back, otherwise JAX arrays; where it is split over several processes, as it is split.
            which: the latest or the best.

        Returns:
            The epoch and the state.

        Raises:
            CheckpointLost: there is none, or it is damaged; the message says what remains.
            UserError: it cannot be read now, or it belongs to another model, optimizer or dataset.
        """
        expected = _named_leaves(like)
        is_split = spans_processes(expected.values())
        entry, saved = self._read_together(which, expected) if is_split else self._stable(which, read_leaves)
        saved.update({name: np.array(leaf) for name, leaf in expected.items() if not leaf.size})
        found, wanted = ({name: (x.shape, x.dtype) for name, x in leaves.items()} for leaves in (saved, expected))
        differing = [name for name in wanted if found.get(name) != wanted[name]] + sorted(found.keys() - wanted.keys())
        if differing:
            raise UserError(
                f"{entry.path} holds another state than this run's (they differ at {shown(differing[0])}); resume with "
                "the model, data and optimizer it was trained with, or start anew in another directory."
            )
        # In the order of the names, which is that of the leaves.
        leaves = [
            saved[name] if isinstance(leaf, np.ndarray) or is_split else jnp.asarray(saved[name])
            for name, leaf in expected.items()
        ]
        return entry.epoch, jax.tree.unflatten(jax.tree.structure(like), leaves)

    def read_notes(self, which: Which = "latest") -> tuple[Path, dict[str, Any]]:
        """A checkpoint's path and what was noted in it; nothing in those of earlier versions.

        Raises:
            CheckpointLost, UserError: as `restore`.
        """
        entry, sidecar = self._stable(which, read_sidecar)
        return entry.path, {} if sidecar is None else sidecar["notes"]

    def are_intact(self) -> bool:
        """Whether the latest and the best can both be read and hold what was written."""
        try:
            self._stable("latest", read_leaves)
            self._stable("best", read_leaves)
        except CheckpointLost:
            return False
        return True

    def latest_epoch(self) -> int | None:
        """The epoch of the latest complete checkpoint, None where there is none."""
        entries = entries_of(self.directory)
        return entries[-1].epoch if entries else None

    def best_epoch(self) -> int | None:
        """The epoch of the best checkpoint as of the latest, None where there is none; that one may be lost."""
        entries = entries_of(self.directory)
        return entries[-1].best_epoch if entries else None

    def check_space(self, n_bytes: int, besides: int = 0) -> None:
        """Raise a `UserError` where the disk has no room for the checkpoints of a state of so many bytes.

        Two are kept, and a third is there for a moment; those that are there already need no more room.
        `besides` is what the run will write besides.
        """
        place = next(place for place in (self.directory, *self.directory.parents) if place.exists())
        with contextlib.suppress(OSError, AttributeError):  # not every system tells
            status = os.statvfs(place)
            free = status.f_bavail * status.f_frsize
            needed = n_bytes * max(1, 2 - len(entries_of(self.directory))) + besides
            if free < needed:
                raise UserError(
                    f"{place} has {free / 2**20:.1f} MiB of free space, and the run's checkpoints need "
                    f"{needed / 2**20:.1f}; free space and start again, or choose another place."
                )

    def wait(self) -> None:
        """Block until everything saved is complete on disk.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with held_back():
                pending.result()

    def close(self) -> None:
        """Finish writing, and see that what remains is on the disk."""
        if self._thread is None:
            return
        with held_back():
            try:
                self.wait()
                for entry in entries_of(self.directory):
                    sync_tree(entry.path)
                sync_directory(self.directory)
                self._safe = 0
                self.tidy()
            except OSError as error:
                raise self._unwritable(error) from None
            finally:
                self._thread.shutdown()
                self._thread = None

    def tidy(self) -> None:
        """Remove what a killed process left unfinished, and what is neither the latest nor the best."""
        if self.directory.is_dir():
            remove_unfinished(self.directory)
            entries = entries_of(self.directory)
            for entry in entries[:-1]:
                if entry.epoch not in (entries[-1].best_epoch, self._safe):
                    remove(entry.path)

    def _next(self, epoch: int, is_best: bool) -> str:
        """The name of the next checkpoint, which may be the best from now on; the first one is."""
        if is_best or self._best is None:
            self._best = epoch
        return name_of(epoch, self._best)

    def _open(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._place = self.directory.stat()
            self.tidy()
        except OSError as error:
            raise unwritable(self.directory, error) from None

    def _write(self, epoch: int, path: Path, leaves: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        """Write a checkpoint and remove those that it makes superfluous; runs in the thread."""
        failure = None
        with _without_complaints():
            try:
                self._put(epoch, path, leaves, notes)
            except Exception as error:  # orbax and its storage raise whatever they trip over
                failure = self._unwritable(error)
            if failure is not None:
                gc.collect()
        if failure is not None:
            raise failure
        if self._on_complete is not None:
            self._on_complete(notes)

    def _put(self, epoch: int, path: Path, leaves: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        self._check_place()  # orbax would make it again
        write_leaves(unfinished(path), leaves)
        is_due = time.monotonic() - self._safe_since >= _SECONDS_WITHOUT_DISK
        self._finish(epoch, path, digest(leaves), notes, durable=is_due)

    def _finish(self, epoch: int, path: Path, state: str, notes: Mapping[str, Any], *, durable: bool) -> None:
        """Give a checkpoint that is written its notes and its name, and remove those that it makes superfluous."""
        content = {"notes": notes, "state": state}
        content["digest"] = seal(content)
        write_whole(unfinished(path) / SIDECAR, json.dumps(content), durable=False)
        if durable:
            sync_tree(unfinished(path))
        self._check_place()
        finish(path)
        if durable:
            sync_directory(self.directory)
            self._safe, self._safe_since = epoch, time.monotonic()
        self.tidy()

    def _save_together(self, epoch: int, leaves: Mapping[str, Any], is_best: bool) -> None:
        """Write a checkpoint with all processes and remove those that it makes superfluous."""
        with held_back(), _without_complaints():
            path = self.directory / by_first(lambda: self._begin_together(epoch, is_best))
            try:
                write_leaves(unfinished(path), leaves)
            except jax.errors.JaxRuntimeError:
                raise  # another process is gone
            except Exception as error:  # orbax and its storage raise whatever they trip over
                raise self._unwritable(error) from None
            state, notes = entries_digest(leaves), dict(self.notes)
            together(lambda: self._on_disk(unfinished(path)))
            by_first(lambda: self._end_together(epoch, path, state, notes))

    def _begin_together(self, epoch: int, is_best: bool) -> str:
        """The name of a checkpoint, for which the directory is ready."""
        name = self._next(epoch, is_best)
        if self._place is None:
            self._open()
        self._check_place()
        remove_unfinished(self.directory)
        return name

    def _on_disk(self, written: Path) -> None:
        """Have what this process wrote reach the disk."""
        try:
            sync_tree(written)
        except OSError as error:
            raise unwritable(self.directory, error) from None

    def _end_together(self, epoch: int, path: Path, state: str, notes: dict[str, Any]) -> None:
        """Move a checkpoint that all processes have written into place."""
        try:
            self._finish(epoch, path, state, notes, durable=True)
        except OSError as error:
            raise self._unwritable(error) from None
        if self._on_complete is not None:
            self._on_complete(notes)

    def _check_place(self) -> None:
        """Raise a `UserError` where the directory is not the one that the first checkpoint was written to."""
        try:
            is_same = self._place is None or os.path.samestat(self._place, self.directory.stat())
        except OSError:
            is_same = False
        if not is_same:
            raise UserError(
                f"{self.directory} was removed or replaced while it was written to; start again, and leave it in place."
            )

    def _unwritable(self, error: Exception) -> UserError:
        """The sentence for what failed, and what is half written removed."""
        try:
            self._check_place()
        except UserError as removed:
            return removed
        if self._place is not None:
            remove_unfinished(self.directory)
        if isinstance(error, UserError):
            return error
        if isinstance(error, OSError) and error.errno is not None:
            return unwritable(self.directory, error)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
            if os.strerror(number) in str(error):
                return unwritable(self.directory, OSError(number, os.strerror(number)))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return unwritable(self.directory, OSError(shown(reason)))

    def _stable(self, which: Which, read: Callable[[Path], _Read]) -> tuple[Entry, _Read]:
        """A checkpoint and what is read from it, the next one where a run under way removes it meanwhile."""
        self.wait()
        while True:
            entry = find(self.directory, which)
            try:
                return entry, read(entry.path)
            except Damaged:
                if entry in entries_of(self.directory):
                    raise damaged(entry) from None

    def _read_together(self, which: Which, like: Mapping[str, Any]) -> tuple[Entry, dict[str, Any]]:
        """A checkpoint and its leaves, split over all processes as in `like`; what there is, the first one tells."""
        told = by_first(lambda: self._told(which))
        if "lost" in told:
            raise CheckpointLost(told["lost"])
        entry, state = entry_at(self.directory / told["name"]), told["state"]
        assert entry is not None
        saved = together(lambda: _read_parts(entry.path, like, state))
        is_damaged = any_of(saved is None)
        if saved is not None and not is_damaged and is_entries_digest(state):
            is_all_there = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in saved.values())
            is_damaged = is_all_there and entries_digest(saved) != state
        if saved is None or is_damaged:
            raise CheckpointLost(by_first(lambda: str(damaged(entry))))
        return entry, saved

    def _told(self, which: Which) -> dict[str, Any]:
        """The name of a checkpoint and the digest of its state, or why there is none."""
        try:
            entry, sidecar = self._stable(which, read_sidecar)
        except CheckpointLost as lost:
            return {"lost": str(lost)}
        return {"name": entry.path.name, "state": None if sidecar is None else sidecar["state"]}


def _read_parts(path: Path, like: Mapping[str, Any], state: str | None) -> dict[str, Any] | None:
    """This process's parts of a checkpoint, None where it is damaged, as far as that shows here.

    What one process wrote has a digest of bytes, for which every process reads all of them.
    """
    try:
        if is_entries_digest(state):
            return read_parts(path, like)
        leaves = read_leaves(path)
    except Damaged:
        return None
    return {name: _put_as(leaf, like.get(name)) for name, leaf in leaves.items()}


def _put_as(leaf: np.ndarray, like: Any) -> Any:
    if isinstance(like, jax.Array) and (leaf.shape, leaf.dtype) == (like.shape, like.dtype):
        return put(leaf, like.sharding)
    return leaf


@contextlib.contextmanager
def _without_complaints() -> Iterator[None]:
    """Silence what orbax's coroutines print as they go, after a failure that was raised already."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their place in the tree, in order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
