"""Signals that wait until what is being written is complete."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _Hold:
    """Handlers that note what arrives, in place of those that were there."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, Any]] = []
        self.before: dict[int, Any] = {}

    def begin(self) -> None:
        for number in _NUMBERS:
            handler = signal.getsignal(number)
            if callable(handler):  # one without a handler in Python cannot be held back
                self.before[number] = handler
                signal.signal(number, lambda *received: self.arrived.append(received))

    def end(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def deliver(self) -> None:
        arrived, self.arrived = self.arrived, []
        for number, frame in arrived[:1]:
            self.before[number](number, frame)


_current: _Hold | None = None


@contextlib.contextmanager
def held_back(*, deliver: bool = True) -> Iterator[None]:
    """Hold Ctrl-C, `kill` and a closed terminal back until the block is over.

    Inside another such block this one changes nothing. Signals go to the main thread only, so other threads need none.

    Args:
        deliver: whether a signal that arrived takes effect when the block ends without an error; otherwise it came too
            late. Where an error ends the block, there is nothing left to stop.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _current = hold = _Hold()
    hold.begin()
    try:
        yield
    finally:
        _current = None
        hold.end()
    if deliver:
        hold.deliver()


def is_waiting() -> bool:
    """Whether a signal to stop has arrived that is held back."""
    return _current is not None and bool(_current.arrived)


@contextlib.contextmanager
def let_through() -> Iterator[None]:
    """Inside `held_back`, let signals take effect in this block, those that arrived before at its beginning."""
    hold = _current
    if hold is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    hold.end()
    try:
        hold.deliver()
        yield
    finally:
        hold.begin()
