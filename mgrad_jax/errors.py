"""The exceptions that are no mistakes in the program: what a user can mend, a process that is gone, a user's stop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input: one sentence that names the file or option, the place in it and the remedy.

    The command line prints the sentence and exits with code 2; Python callers may catch it as a `ValueError`.

    >>> raise UserError("data/x.inter line 3: item id -1 is negative; ids count from 0.")
    Traceback (most recent call last):
    mgrad_jax.errors.UserError: data/x.inter line 3: item id -1 is negative; ids count from 0.
    """


class ProcessLost(RuntimeError):
    """Another of the processes that train together is gone; the text says what there is to go on from."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a training; what it had finished is on disk.

    Attributes:
        directory: where it can be gone on with.
        done: how far it came, in words.
    """

    def __init__(self, directory: Path, done: str) -> None:
        super().__init__(f"{directory}: {done}")
        self.directory, self.done = directory, done


def shown(value: object, limit: int = 80) -> str:
    """A value as a message shows it: in quotes where it is text, its beginning only where it is long.

    >>> shown("a" * 200)[-12:]
    "aaaaaaaa...'"
    """
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[: limit - 3] + "...")
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def did_you_mean(value: object, choices: Iterable[str], most: int = 1) -> str:
    """What to append to a list of choices: the one that is probably meant, or so many of them, or nothing.

    >>> did_you_mean("freedum", ["bm3", "freedom"])
    ' (did you mean freedom?)'
    >>> did_you_mean("x", ["bm3", "freedom"])
    ''
    """
    import difflib  # on a mistake only

    near = difflib.get_close_matches(str(value)[:80].lower(), list(choices), most, cutoff=0.7)
    return f" (did you mean {' or '.join(sorted(near))}?)" if near else ""
