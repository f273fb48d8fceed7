"""The options of several processes that train together, and how such a process begins and ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from mgrad_jax.cli.failures import LOST, explain, fail
from mgrad_jax.declaration import check_all, setting
from mgrad_jax.errors import UserError, shown


@dataclass(frozen=True)
class Crew:
    """The processes that train together: where a run is computed, which is no setting of it."""

    distributed: bool = setting(False, "Train with all processes of a launcher that JAX knows: Slurm, Open MPI, ...")
    coordinator: str | None = setting(
        None, "Where process 0 of --processes N answers; without a launcher.", kind=str, metavar="HOST:PORT"
    )
    processes: int | None = setting(None, "How many processes train together.", kind=int, least=1)
    process: int | None = setting(None, "The number of this one, from 0.", kind=int, least=0)

    def __post_init__(self) -> None:
        check_all(self, as_options=True)

    @property
    def by_hand(self) -> tuple[str | None, int | None, int | None]:
        """What is said where no launcher tells."""
        return self.coordinator, self.processes, self.process

    def is_asked_for(self) -> bool:
        """Whether there are to be several.

        Raises:
            UserError: the options do not go together.
        """
        if self.distributed and self.by_hand != (None, None, None):
            raise UserError(
                "--distributed finds the others by itself; leave --coordinator, --processes, --process out."
            )
        if self.distributed or self.by_hand == (None, None, None):
            return self.distributed
        if None in self.by_hand:
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
        processes.connect(*crew.by_hand)
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
