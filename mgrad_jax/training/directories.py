"""What the directories of runs and of sweeps have in common: who holds them, and whether something is begun in them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from mgrad_jax.errors import UserError
from mgrad_jax.files import locked
from mgrad_jax.processes import by_first, check_shared, is_first, together

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def of_first(method: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Have the first of several processes alone carry a method out; all of them call it, and are told what came of it.

    What it returns JSON must be able to hold.
    """

    @functools.wraps(method)
    def told(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return by_first(lambda: method(*args, **kwargs))

    return told


@contextlib.contextmanager
def held(path: Path, what: str, is_begun: Callable[[Path], bool], resume: bool) -> Iterator[Callable[[], None]]:
    """Hold the directory at a path that is to be begun, or gone on with; of several processes the first one does.

    Args:
        what: "run" or "sweep", for messages.
        is_begun: whether there is anything in it that took an epoch to compute.
        resume: whether to go on.

    Yields:
        What to call before writing: it raises a `UserError` where the directory was removed or replaced since.

    Raises:
        UserError: another process holds it, there is a run or sweep and none is to be resumed, or the other way round,
            or the directory is not the same one for all processes.
    """
    with contextlib.ExitStack() as stack:
        mine = _held(path, what, is_begun, resume)
        check = together(lambda: stack.enter_context(mine) if is_first() else None)
        check_shared(path)
        yield check or (lambda: None)


@contextlib.contextmanager
def _held(path: Path, what: str, is_begun: Callable[[Path], bool], resume: bool) -> Iterator[Callable[[], None]]:
    if not path.is_dir():  # before one is made for the lock
        check_begun(path, what, is_begun, resume)
    with locked(path) as lock:
        check_begun(path, what, is_begun, resume)
        yield lock.check


def check_begun(path: Path, what: str, is_begun: Callable[[Path], bool], resume: bool) -> None:
    """Raise the `UserError` of a directory that cannot be begun, or not be gone on with; arguments as for `held`."""
    begun = is_begun(path)
    if begun and not resume:
        raise UserError(f"{path} already holds a {what}; add --resume to go on with it, or choose another --out.")
    if resume and not begun and not (path / "config.yaml").exists():
        raise UserError(f"{path} holds no {what} (there is no config.yaml); leave --resume out.")
