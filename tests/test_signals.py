"""Signals wait for what is being written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from mgrad_jax.signals import held_back, let_through

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """All three raise `KeyboardInterrupt`."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_takes_effect_after_the_block(number: signal.Signals) -> None:
    done = []

    def work() -> None:
        with held_back():
            send(number)
            with held_back():
                send(number)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [True]
    assert signal.getsignal(number) is signal.default_int_handler


def test_a_signal_may_come_too_late() -> None:
    with held_back(deliver=False):
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_window_lets_through_what_arrived_before_and_what_arrives_in_it() -> None:
    done = []

    def send_in_a_window() -> None:
        with let_through():
            send(signal.SIGTERM)
            done.append("too far")

    with held_back(deliver=False):
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), let_through():
            done.append("too far")
        with pytest.raises(KeyboardInterrupt):
            send_in_a_window()
        send(signal.SIGINT)  # held again
        done.append("end")
    assert done == ["end"]


def test_an_error_is_not_replaced_by_a_signal() -> None:
    def fail() -> None:
        with held_back():
            send(signal.SIGINT)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()


def test_other_threads_hold_nothing() -> None:
    seen = []

    def work() -> None:
        with held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
