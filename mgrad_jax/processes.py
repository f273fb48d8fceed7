"""Several processes that train one model together: how they find each other, and what they tell each other.

JAX's own runtime connects them (`jax.distributed`). Every process runs the same program on its own devices; the first
one alone writes files and prints. What only one of them knows, such as a file that it cannot read or a signal to stop,
it tells the others here, so that all go on or all end. Every process makes these calls in the same order; in one
process they do nothing besides.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mgrad_jax.errors import ProcessLost, UserError, shown

_Result = TypeVar("_Result")

# A process that is alive says so every few seconds; after so many without a word JAX ends the others.
_HEARTBEAT_SECONDS = 30
# How long all processes have to come together; a minute later JAX would abort.
CONNECTING_SECONDS = 300
# How long a process that fails waits for the others to end together with it.
_PARTING_SECONDS = 5.0
# How long a file system that hosts share may take to show a new file.
_SHARING_SECONDS = 10.0
_PIECE = 256


def connect(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Become one of several processes; before any device is used.

    Args:
        coordinator: HOST:PORT at which process 0 answers; None: as the launcher that JAX finds says.
        processes: how many there are.
        process: the number of this one, from 0.

    Raises:
        UserError: there is no launcher that JAX knows, the port is in use, a device was used before, or the processes
            have unequally many.
    """
    if coordinator is not None and process == 0:
        _check_free(int(coordinator.rpartition(":")[2]))
    # JAX's own notice of a preemption takes SIGTERM away from whoever handles it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=CONNECTING_SECONDS + 60,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if coordinator is None and "coordinator_address" in str(error):
            raise UserError(
                "no launcher that JAX knows (Slurm, Open MPI 4, ...) has started this process; use one, or give "
                "--coordinator, --processes and --process."
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"the processes could not be connected ({shown(reason, 160)}); see that every process was started and "
            "reaches that address."
        ) from None
    counts = [sum(device.process_index == number for device in jax.devices()) for number in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise UserError(f"the processes have {', '.join(map(str, counts))} devices; let all have equally many.")


def _check_free(port: int) -> None:
    """Refuse a port that is in use: some versions of JAX crash on it."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used on this host ({error.strerror}); choose another one."
            ) from None


def several() -> bool:
    """Whether there is more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def together(step: Callable[[], _Result]) -> _Result:
    """Do in every process what may fail in one; where it does, all end with its sentence.

    Args:
        step: works without the others.

    Raises:
        Exception: what this process's `step` raised.
        UserError: another one's did; the message is the other's.
    """
    if not several():
        return step()
    failure: Exception | None = None
    try:
        result = step()
    except Exception as error:
        failure = error
    told = _exchange("" if failure is None else f"{_whereabouts()}: {str(failure) or type(failure).__name__}")
    if failure is not None:
        raise failure
    for sentence in filter(None, told):
        raise UserError(sentence)
    return result


def by_first(step: Callable[[], _Result]) -> _Result:
    """Do something in the first process only; all return its result, which JSON must be able to hold.

    Raises:
        Exception: as `together`.
    """
    if not several():
        return step()
    result = together(lambda: step() if is_first() else None)
    told: _Result = json.loads(_exchange(json.dumps(result) if is_first() else "")[0])
    return told


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    return any(_exchange("yes" if flag else "")) if several() else flag


def on_host(array: Any) -> np.ndarray:
    """An array as a whole, also one that is split over processes, all of which make this call."""
    is_split = isinstance(array, jax.Array) and not array.is_fully_addressable
    return np.asarray(multihost_utils.process_allgather(array, tiled=True) if is_split else array)


def check_same(values: Callable[[], Mapping[str, Any]]) -> None:
    """Raise a `UserError` in all processes where one has another of these values, by name, than the first."""
    if not several():
        return
    first, *others = (json.loads(text) for text in _exchange(json.dumps([_whereabouts(), dict(values())], default=str)))
    for whereabouts, theirs in others:
        for name in {**first[1], **theirs}:
            value, other = first[1].get(name), theirs.get(name)
            if value != other:
                raise UserError(
                    f"{whereabouts} has {name} {shown(other)}, and {first[0]} {shown(value)}; start all processes with "
                    "the same command, data and versions."
                )


def check_shared(directory: Path) -> None:
    """Raise a `UserError` in all processes where one does not see what the first one writes to a directory."""
    if not several():
        return
    # A name of its kind is removed from a directory that somebody holds, should this process be killed here.
    token = directory / f".shared.{by_first(lambda: int.from_bytes(os.urandom(7), 'big'))}.tmp"
    try:
        together(lambda: token.touch() if is_first() else None)
        together(lambda: _await(token))
    finally:
        if is_first():
            token.unlink(missing_ok=True)


def _await(file: Path) -> None:
    deadline = time.monotonic() + _SHARING_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{file.parent} is not the directory of that name that the first process writes to; give one on a file "
                "system that all hosts share."
            )
        time.sleep(0.05)


def leave(code: int, *, lost: bool = False) -> NoReturn:
    """End this process, which has said why.

    JAX's own end waits for all processes, for minutes where one of them does not come.

    Args:
        code: the exit code.
        lost: whether another process is gone, so that nothing is to be waited for.
    """
    if lost:
        if is_first():
            time.sleep(1.0)  # with it goes what connects the others, which have something to say too
    else:
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PARTING_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _whereabouts() -> str:
    return f"process {jax.process_index()} on {socket.gethostname()}"


def _exchange(text: str) -> list[str]:
    """The texts of all processes in their order.

    Raises:
        ProcessLost: one of them is gone.
    """
    try:
        return _gathered(text)
    except jax.errors.JaxRuntimeError as error:
        raise ProcessLost(lost(error)) from error


def lost(error: Exception) -> str:
    """What is known of a process that is gone, of the error that came of it."""
    if isinstance(error, ProcessLost):
        return str(error)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rpartition("] ")[2]
    return f"another process is gone, or a device has failed ({shown(reason)}){_unreachable(reason)}"


def _unreachable(reason: str) -> str:
    """What is wrong where a process was looked for on this host: its own host gave it that address."""
    if "connecting" not in reason or "[127." not in reason:
        return ""
    return "; if it is on another host, have the name of every host lead to an address that others reach"


def _gathered(text: str) -> list[str]:
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(own), np.int32))
    # In whole pieces, so that few programs are compiled.
    padded = np.zeros(-(-int(sizes.max()) // _PIECE) * _PIECE, np.uint8)
    if not padded.size:
        return [""] * len(sizes)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
