"""Ctrl-C, `kill` and a terminal that closes: one sentence and exit code 130, at any moment.

A command begins with nothing to lose: until it says otherwise (`complete_what_is_begun`) a signal ends the process at
once. An exception would not do there: imports and callbacks swallow it or turn it into another one, and while XLA
compiles no Python code runs in the main thread that could raise it. A thread of its own therefore waits for signals.
Once something is written a signal is an exception; where a callback of Python's loses it, it is raised again.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 130
# Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """A command was stopped at a point it knows of; the text is the sentence to show."""


def _nothing_written() -> str:
    return "stopped; repeat the command to begin again."


class _Standing:
    """Where the command is: what to say when it is stopped, and whether anything would be left half done."""

    def __init__(self) -> None:
        self.sentence: Callable[[], str] = _nothing_written
        self.is_kept = False
        self.at_once = True
        self.asked: int | None = None
        self.is_lost = False
        self.leaving = threading.Lock()


_standing = _Standing()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Answer the signals to stop until the block ends; then they mean what they meant before.

    A signal that is ignored, as under `nohup`, stays ignored.
    """
    global _standing
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread only
        return
    _standing = _Standing()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, _on_signal)
    try:
        with _second_watch() if ours else contextlib.nullcontext(), _nothing_lost():
            yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        atexit.unregister(_ignore)
        atexit.register(_ignore)


def say(sentence: Callable[[], str]) -> None:
    """Have `sentence` tell how to go on, from now on."""
    if not _standing.is_kept:
        _standing.sentence = sentence


def keep(sentence: Callable[[], str]) -> None:
    """As `say`, whatever the commands say that are run from here on."""
    _standing.sentence, _standing.is_kept = sentence, True


def complete_what_is_begun() -> None:
    """From now on a signal raises `KeyboardInterrupt`, so that whoever writes can finish or clean up."""
    _standing.at_once = False


def repeat_if_lost() -> None:
    """Send a signal again whose `KeyboardInterrupt` somebody swallowed or turned into another exception."""
    if _standing.asked is not None:
        signal.raise_signal(_standing.asked)


def sentence() -> str:
    """What to say of a command that was stopped."""
    return _standing.sentence()


def _on_signal(number: int, frame: FrameType | None) -> None:
    _standing.asked, _standing.is_lost = number, False
    if not _standing.at_once:
        raise KeyboardInterrupt
    _exit_now()


@contextlib.contextmanager
def _second_watch() -> Iterator[None]:
    """A thread that sees a signal also while the main thread runs no Python code."""
    if os.name != "posix":
        yield  # elsewhere only sockets can be woken
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    standing = _standing  # of this watch; a byte may be read after the next one has begun

    def watch() -> None:
        with os.fdopen(reader, "rb", buffering=0) as stream:
            while number := stream.read(1):
                # Whoever has put a handler in our place holds the signal back for a moment, and has a reason.
                if number[0] in SIGNALS and signal.getsignal(number[0]) is _on_signal and standing.at_once:
                    _exit_now()

    threading.Thread(target=watch, daemon=True, name="signals").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


@contextlib.contextmanager
def _nothing_lost() -> Iterator[None]:
    """Raise `KeyboardInterrupt` again where Python can only report it.

    That is in callbacks of the garbage collector, of which JAX has one, in finalizers and of weak references.
    """
    standing, report = _standing, sys.unraisablehook

    def again() -> None:
        time.sleep(0.02)  # until the callback has ended, where it would be lost once more
        if standing.is_lost and standing.asked is not None:
            _thread.interrupt_main(signal.Signals(standing.asked))

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if standing.asked is None or not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        standing.is_lost = True
        _thread.start_new_thread(again, ())  # takes no lock, which whoever was called back may hold

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report
        standing.is_lost = False


def _exit_now() -> None:
    """End the process; whoever comes second returns, and is ended a moment later."""
    if _standing.leaving.acquire(blocking=False):
        with contextlib.suppress(OSError):  # the terminal is gone
            # A progress bar hides the cursor and fills the line.
            cleared = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
            # To the descriptor: the main thread may be in the middle of using `sys.stderr`.
            os.write(2, f"{cleared}{_standing.sentence()}\n".encode(errors="backslashreplace"))
        os._exit(EXIT_CODE)


def _ignore() -> None:
    """Nothing is left to stop once the interpreter ends."""
    for number in SIGNALS:
        with contextlib.suppress(ValueError, OSError):
            signal.signal(number, signal.SIG_IGN)
