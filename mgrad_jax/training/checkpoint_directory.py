"""Which checkpoints a directory holds, told by their names, and how they come and go there.

A checkpoint is a directory `<epoch>-best-<best epoch>`. While it is written its name ends in `.unfinished`, while it is
removed in `.discarded`; what bears one of these names is no checkpoint.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from mgrad_jax.errors import UserError
from mgrad_jax.files import unreadable
from mgrad_jax.training.stored_state import is_intact

_NAME = re.compile(r"(\d+)-best-(\d+)")
Which = Literal["latest", "best"]


class CheckpointLost(UserError):
    """A checkpoint is not there, or does not hold what was written."""


class Entry(NamedTuple):
    """A complete checkpoint: its epoch, the best epoch as of then, and its directory."""

    epoch: int
    best_epoch: int
    path: Path


def name_of(epoch: int, best_epoch: int) -> str:
    """The name of a checkpoint."""
    return f"{epoch:06d}-best-{best_epoch:06d}"


def entry_at(path: Path) -> Entry | None:
    """The checkpoint that a path's name tells of; None where it tells of none."""
    match = _NAME.fullmatch(path.name)
    return Entry(int(match[1]), int(match[2]), path) if match else None


def entries_of(directory: Path) -> list[Entry]:
    """Complete checkpoints, by epoch.

    Raises:
        UserError: the directory cannot be read.
    """
    try:
        entries = [entry_at(path) for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(directory, error) from None
    return sorted(filter(None, entries))


def find(directory: Path, which: Which) -> Entry:
    """The latest checkpoint, or the best.

    Raises:
        CheckpointLost: there is none.
        UserError: the directory cannot be read.
    """
    entries = entries_of(directory)
    if not entries:
        raise CheckpointLost(f"{directory} holds no {which} checkpoint; train the run without --resume first.")
    if which == "latest":
        return entries[-1]
    for entry in entries:
        if entry.epoch == entries[-1].best_epoch:
            return entry
    raise CheckpointLost(
        f"{directory} lacks the checkpoint of epoch {entries[-1].best_epoch}, its best; resume the run, which "
        "trains that epoch again."
    )


def damaged(entry: Entry) -> CheckpointLost:
    """The sentence for a damaged checkpoint; what it advises depends on the others there, which are read for it."""
    others = entries_of(entry.path.parent)
    intact = [other for other in others if other != entry and is_intact(other.path)]
    if not intact:
        remedy = (
            "delete it and start anew, for the run has no other checkpoint that is intact, or restore it from a "
            "copy of yours"
        )
    elif intact[-1].epoch > entry.epoch:
        remedy = f"resume the run, which goes on from epoch {intact[-1].epoch} and trains this one again"
    else:
        remedy = f"delete it to go on from epoch {intact[-1].epoch}, whose checkpoint is intact"
    return CheckpointLost(f"{entry.path} is damaged; {remedy}.")


def unfinished(path: Path) -> Path:
    """What a checkpoint is called while it is written."""
    return path.with_name(f"{path.name}.unfinished")


def finish(path: Path) -> None:
    """Give a checkpoint that is complete its name."""
    if path.exists():  # a damaged one that was trained again
        remove(path)
    unfinished(path).rename(path)


def remove(path: Path) -> None:
    """Remove a checkpoint."""
    # Renamed first: half removed under its own name it would look like a damaged checkpoint.
    discarded = path.rename(path.with_name(f"{path.name}.discarded"))
    shutil.rmtree(discarded) if discarded.is_dir() else discarded.unlink()


def remove_unfinished(directory: Path) -> None:
    """Remove what is half written or half removed."""
    for path in directory.iterdir():
        if _NAME.match(path.name) and not _NAME.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
