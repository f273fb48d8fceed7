"""Checkpoints of a run: the latest and the best, written atomically by Orbax while training goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from mgrad_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one run directory, named by epoch; only the latest and the best are kept.

    A checkpoint appears under its name only once it is complete, so that a process killed at any moment leaves the one
    before. Saving copies the arrays to the host and writes them in the background.

    Args:
        directory: where they lie; made if missing.

    Raises:
        UserError: the directory cannot be written.
    """

    def __init__(self, directory: str | Path) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every step it takes
        self.directory = Path(directory).resolve()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
        except OSError as error:
            raise UserError(f"{self.directory} cannot be written ({error.strerror}); choose another --out.") from None
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._best: int | None = None
        self._keep: set[int | None] | None = None

    def save(self, epoch: int, state: Any, is_best: bool) -> None:
        """Write a state under its epoch and drop what is neither the latest nor the best any more.

        Args:
            epoch: counts from 1.
            state: any pytree of arrays; it may be donated or changed as soon as this returns.
            is_best: whether this epoch is the best so far.
        """
        self._best = epoch if is_best else self.best_epoch()
        self.wait()
        self._checkpointer.save(self.directory / str(epoch), _to_dict(state, self._best))
        self._keep = {epoch, self._best}

    def wait(self) -> None:
        """Return once the last save is complete."""
        self._checkpointer.wait_until_finished()
        if self._keep is not None:
            for epoch in set(self._epochs()) - self._keep:
                _remove(self.directory / str(epoch))
            self._keep = None

    def latest_epoch(self) -> int | None:
        """The epoch of the latest checkpoint; None where there is none."""
        self.wait()
        return max(self._epochs(), default=None)

    def best_epoch(self) -> int | None:
        """The epoch of the best checkpoint, as the latest one records it; None where there is none."""
        if self._best is None and (latest := self.latest_epoch()) is not None:
            self._best = int(self._read(latest)["best_epoch"])
        return self._best

    def restore(self, like: Any, which: Literal["latest", "best"] = "latest") -> tuple[int, Any]:
        """Read a checkpoint.

        Args:
            like: a pytree of the same structure, shapes and types.
            which: the latest or the best.

        Returns:
            The epoch and the state.

        Raises:
            UserError: none is there, it is damaged, or it belongs to another model or configuration.
        """
        epoch = self.latest_epoch() if which == "latest" else self.best_epoch()
        if epoch is None:
            raise UserError(f"{self.directory} holds no checkpoint; train without --resume.")
        return epoch, self._fill(like, self._read(epoch), epoch)

    def close(self) -> None:
        """Finish the last save and free the writer."""
        self.wait()
        self._checkpointer.close()

    def _epochs(self) -> list[int]:
        return [int(path.name) for path in self.directory.iterdir() if path.name.isdigit()]

    def _remove_unfinished(self) -> None:
        for path in self.directory.iterdir():
            if path.is_dir() and not path.name.isdigit():
                _remove(path)

    def _read(self, epoch: int) -> dict[str, np.ndarray]:
        path = self.directory / str(epoch)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                stored = reader.metadata(path).item_metadata.tree
                arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(stored))
                return reader.restore(path, restore_args=arguments)
        except Exception as error:
            # Orbax and TensorStore raise many kinds for a file that is missing, cut short or altered.
            reason = str(error).split("\n")[0][:120] or type(error).__name__
            raise UserError(
                f"{path} is damaged ({reason}); delete that folder to go on from an earlier one, or start anew with "
                "another --out."
            ) from None

    def _fill(self, like: Any, stored: dict[str, np.ndarray], epoch: int) -> Any:
        wanted = _to_dict(like, None)
        for name in sorted(wanted.keys() ^ stored.keys()) or sorted(
            name for name in wanted if np.shape(wanted[name]) != np.shape(stored[name])
        ):
            raise UserError(
                f"{self.directory / str(epoch)} does not fit this model or configuration (at {name}); resume with the "
                "settings the run was started with."
            )
        leaves, structure = jax.tree.flatten(like)
        names = [name for name in wanted if name != "best_epoch"]
        filled = [_as(leaf, stored[name]) for leaf, name in zip(leaves, names, strict=True)]
        return jax.tree.unflatten(structure, filled)


def _to_dict(state: Any, best: int | None) -> dict[str, Any]:
    """Leaves by path, on the host: the caller may donate the state's buffers right away."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    named = {f"{index:03d}{_slug(path)}": np.array(leaf) for index, (path, leaf) in enumerate(leaves)}
    return {**named, "best_epoch": np.asarray(-1 if best is None else best)}


def _slug(path: tuple[Any, ...]) -> str:
    return "".join(c if c.isalnum() or c == "_" else "." for c in jax.tree_util.keystr(path)).replace("..", ".")


def _as(leaf: Any, value: np.ndarray) -> Any:
    return value if isinstance(leaf, np.ndarray) else jax.numpy.asarray(value, leaf.dtype)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a process killed half-way does not leave a damaged one under its name."""
    doomed = path.with_name(f"removed.{path.name.split('.')[-1]}")
    path.rename(doomed)
    for child in sorted(doomed.rglob("*"), key=lambda p: len(p.parts), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    doomed.rmdir()
