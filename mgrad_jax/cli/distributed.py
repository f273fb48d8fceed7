"""The options of several processes that train together, and how such a process begins and ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer

from mgrad_jax.cli.failures import LOST, explain, fail
from mgrad_jax.errors import UserError, shown

Distributed = Annotated[
    bool,
    typer.Option("--distributed", help="Train with all processes of a launcher that JAX knows: Slurm, Open MPI, ..."),
]
Coordinator = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where process 0 of --processes N answers; without a launcher."),
]
Processes = Annotated[int | None, typer.Option(min=1, help="How many processes train together.")]
Process = Annotated[int | None, typer.Option(min=0, help="The number of this one, from 0.")]


class Crew(NamedTuple):
    """What the options say about the processes that train together."""

    distributed: bool
    coordinator: str | None
    processes: int | None
    process: int | None

    def is_asked_for(self) -> bool:
        """Whether there are to be several.

        Raises:
            UserError: the options do not go together.
        """
        if self.distributed and self[1:] != (None, None, None):
            raise UserError(
                "--distributed finds the others by itself; leave --coordinator, --processes, --process out."
            )
        if self.distributed or self[1:] == (None, None, None):
            return self.distributed
        if None in self[1:]:
            raise UserError(
                "--coordinator, --processes and --process belong together; give all three, or --distributed."
            )
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise UserError(f"--coordinator is {shown(self.coordinator)}; give HOST:PORT, such as 10.0.0.1:12345.")
        if (self.process or 0) >= (self.processes or 0):
            raise UserError(f"--process is {self.process} of {self.processes}; the numbers count from 0.")
        return True


@contextlib.contextmanager
def joined(crew: Crew) -> Iterator[bool]:
    """Be one of several processes in this block, where they are asked for; yields whether this one prints.

    A failure ends the process, which tells why before: Python's own end would wait for the others.
    """
    if not crew.is_asked_for():
        yield True
        return
    from mgrad_jax import processes

    with _limited(processes.CONNECTING_SECONDS):
        processes.connect(*crew[1:])
    with _quiet():
        try:
            yield processes.is_first()
        except BaseException as error:
            told = explain(error)
            if told is None:
                traceback.print_exc()
            code = 1 if told is None else fail(*told)
            processes.leave(code, lost=code == LOST)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """End the process where the others have not come in time: JAX would abort it."""

    def give_up() -> None:
        remedy = "start all of them within that time, and see that each reaches process 0"
        fail(f"not all processes have come within {seconds:g} seconds; {remedy}.", 2)
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout for what is printed here: the library that connects processors writes notes to its descriptor."""
    sys.stdout.flush()
    before, ours = sys.stdout, os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = open(ours, "w", encoding=before.encoding, errors=before.errors)  # noqa: SIM115 - until the end
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        sys.stdout.close()
        sys.stdout = before
