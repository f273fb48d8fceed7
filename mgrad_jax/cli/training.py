"""What a command that trains tells: how far it is, and how to go on where it is stopped."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from mgrad_jax.cli import stopping
from mgrad_jax.cli.console import progress
from mgrad_jax.errors import Interrupted


@contextlib.contextmanager
def told(
    title: str,
    directory: Path,
    state: Callable[..., tuple[str, int, int]],
    *,
    begun: str = "config.yaml",
    go_on: str | None = None,
) -> Iterator[Callable[..., None]]:
    """Tell how far a training is; a signal to stop leaves what is finished on disk.

    Args:
        title, directory, begun: of the training, and as for `how_to_go_on`.
        state: what to show of a report: the state in words, the steps done and the steps expected.
        go_on: the sentence to show when it is stopped; by default that of `how_to_go_on`.

    Yields:
        What to call with every report.
    """
    from mgrad_jax.processes import is_first

    def sentence(done: str) -> str:
        return go_on or how_to_go_on(done, directory, begun)

    stopping.say(lambda: sentence("stopped before the first epoch was finished"))
    quiet = contextlib.nullcontext(lambda *_: None)
    try:
        with progress(title) if is_first() else quiet as tell:

            def report(*what: object) -> None:
                stopping.complete_what_is_begun()
                tell(*state(*what))
                stopping.repeat_if_lost()

            yield report
    except Interrupted as stop:
        raise stopping.Stopped(sentence(stop.done)) from None


def how_to_go_on(done: str, directory: Path, begun: str = "config.yaml") -> str:
    """The sentence of a training that was stopped: `done`, and how to resume it where the file `begun` is there."""
    if not (directory / begun).exists():
        return f"{done}; repeat the command to begin again."
    return f"{done}; to go on, repeat the command with --out {shlex.quote(str(directory))} --resume."
