"""A dataset directory changes as a whole: it holds the old dataset, the new one, or is refused; never a mix.

The new files are written aside, in `.incoming`. Then the mark `.replacing` is set, the old files go, the new ones move
in, the `.inter` file last, and the mark goes. A process that is killed before the mark leaves the old dataset; one that
is killed later leaves the mark, at which readers refuse the directory and the next `prepare` completes the change.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from mgrad_jax.errors import UserError
from mgrad_jax.files import locked, sync_directory, unwritable

_INCOMING = ".incoming"
_MARK = ".replacing"


def check_whole(directory: Path) -> None:
    """Refuse a directory in which a dataset was being replaced when the process was stopped, or is this moment."""
    if (directory / _MARK).exists():
        raise UserError(
            f"{directory} is half replaced, for `mgrad-jax prepare` was stopped or is still writing; "
            "run the same command again, with --overwrite, to complete it."
        )


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Hold a dataset directory for this process, and complete what an earlier one has begun.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        with locked(directory):
            _complete(directory)
            yield
    except OSError as error:
        raise unwritable(directory, error) from None


def replace_files(directory: Path, contents: Mapping[str, Callable[[Path], object]], old: Sequence[str]) -> None:
    """Put new files in the place of old ones; within `writing`.

    Args:
        directory: of the dataset.
        contents: name -> what writes the file to a path.
        old: names of the files that go; those that stand in `contents`, too, need not be named.
    """
    incoming = directory / _INCOMING
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    try:
        plan = json.dumps({"new": list(contents), "old": list(old)})
        mark: Callable[[Path], object] = partial(Path.write_text, data=plan, encoding="utf-8")
        for name, write in {**contents, _MARK: mark}.items():
            write(incoming / name)
            with (incoming / name).open("rb") as stream:
                os.fsync(stream.fileno())
        sync_directory(incoming)
        os.replace(incoming / _MARK, directory / _MARK)
        sync_directory(directory)
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    _complete(directory)


def _complete(directory: Path) -> None:
    """Go on from wherever a replacement has got to, if there is one."""
    mark, incoming = directory / _MARK, directory / _INCOMING
    if not mark.exists():
        return
    try:
        plan = json.loads(mark.read_text(encoding="utf-8"))
        new, old = ([str(Path(name).name) for name in plan[key]] for key in ("new", "old"))
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{mark} is damaged; look what {directory} holds, then remove it.") from None
    waiting = [name for name in new if (incoming / name).exists()]
    leaving = [*waiting, *(name for name in old if name not in new)]
    for name in sorted(leaving, key=_inter_first):
        (directory / name).unlink(missing_ok=True)
    for name in sorted(waiting, key=_inter_first, reverse=True):
        os.replace(incoming / name, directory / name)
    sync_directory(directory)
    mark.unlink()
    shutil.rmtree(incoming, ignore_errors=True)


def _inter_first(name: str) -> tuple[bool, str]:
    """Order: without its `.inter` file no reader, of whatever program, takes a directory for a dataset."""
    return not name.endswith(".inter"), name
