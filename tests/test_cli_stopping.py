"""Ctrl-C, `kill` and a closed terminal: one line and exit code 130, at any moment."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from command_lines import HANGS

from mgrad_jax.cli import main, stopping
from mgrad_jax.cli.training import how_to_go_on

pytestmark = pytest.mark.usefixtures("usual_signals")

TRAIN = ["train", "--model", "vbpr", "--set", "embedding_dim=8", "--data", "demo"]

# What takes minutes without running Python code, as a compilation does.
BUSY = """
import hashlib
from mgrad_jax.cli import stopping
with stopping.watched():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""

# Sends Ctrl-C to itself as soon as it is about to import a module.
STOPPED_AT_AN_IMPORT = """
import os, signal, sys
class Stop:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
"""


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_ends_what_runs_no_python_code(number: signal.Signals) -> None:
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        try:
            _, error = process.communicate(timeout=HANGS)
        finally:
            process.kill()
    assert process.returncode == 130
    assert error == "stopped; repeat the command to begin again.\n"


@pytest.mark.parametrize("module", ["typer", "jax", "mgrad_jax.training.fit"])
def test_a_training_that_starts_is_stopped_with_one_line(
    module: str, tmp_path: Path, start_command: Callable[..., subprocess.Popen[str]]
) -> None:
    command = [*TRAIN, "--epochs", "9999", "--out", str(tmp_path)]
    process = start_command(command, before=STOPPED_AT_AN_IMPORT.format(module=module))
    _, error = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert error.count("\n") == 1, error
    assert "repeat the command" in error


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_names_the_epoch_and_the_remedy(
    tmp_path: Path, start_command: Callable[..., subprocess.Popen[str]], stop: signal.Signals
) -> None:
    out = tmp_path / "run"
    process = start_command([*TRAIN, "--epochs", "100000", "--patience", "100000", "--out", str(out)])
    history = out / "history.csv"
    while not history.exists() or history.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(stop)
    _, error = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert error.count("\n") == 1, error
    epoch = int(error.split("stopped after epoch ")[1].split(";")[0])
    assert f"--out {out} --resume" in error
    rows = pd.read_csv(history)
    assert epoch >= len(rows) - 1
    assert main([*TRAIN, "--epochs", str(epoch + 2), "--patience", "100000", "--out", str(out), "--resume"]) == 0
    assert len(pd.read_csv(history)) == epoch + 2


def test_once_something_is_written_a_signal_is_an_exception() -> None:
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    for number in stopping.SIGNALS:
        with stopping.watched():
            stopping.complete_what_is_begun()
            stopping.repeat_if_lost()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
            # Whoever lost the exception is told again.
            with pytest.raises(KeyboardInterrupt):
                stopping.repeat_if_lost()
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before


def interrupt_the_garbage_collector(stop: Callable[[], None]) -> None:
    def callback(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(callback)
        stop()

    gc.callbacks.append(callback)
    gc.collect()


def interrupt_a_finalizer(stop: Callable[[], None]) -> None:
    class Finalized:
        def __del__(self) -> None:
            stop()

    Finalized()


def go_on_for_long() -> None:
    for _ in range(int(HANGS / 0.01)):
        time.sleep(0.01)


@pytest.mark.parametrize("interrupt", [interrupt_the_garbage_collector, interrupt_a_finalizer])
@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_an_exception_lost_where_none_can_be_raised_comes_again_without_a_word(
    interrupt: Callable[[Callable[[], None]], None], number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    hook = sys.unraisablehook
    with stopping.watched():
        stopping.complete_what_is_begun()
        interrupt(lambda: signal.raise_signal(number))  # returns, as if nothing had happened
        with pytest.raises(KeyboardInterrupt):
            go_on_for_long()
    assert sys.unraisablehook is hook
    assert capfd.readouterr().err == ""


def test_what_else_a_finalizer_loses_is_still_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_type))

    def fail() -> None:
        raise ZeroDivisionError

    with stopping.watched():
        interrupt_a_finalizer(fail)
    assert reported == [ZeroDivisionError]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.watched():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_whoever_holds_signals_back_is_not_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, seen, getsignal = [], threading.Event(), signal.getsignal

    def observed(number: int) -> object:
        """What the second watch asks, in its thread, before it decides."""
        handler = getsignal(number)
        if threading.current_thread() is not threading.main_thread():
            seen.set()
        return handler

    with stopping.watched():
        ours = signal.signal(signal.SIGTERM, lambda *received: arrived.append(received))
        monkeypatch.setattr(signal, "getsignal", observed)
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen.wait(HANGS)  # the second watch has seen it, and this test is still there
        signal.signal(signal.SIGTERM, ours)
    assert len(arrived) == 1


def test_how_to_go_on(tmp_path: Path) -> None:
    assert how_to_go_on("stopped", tmp_path) == "stopped; repeat the command to begin again."
    directory = tmp_path / "my run"
    directory.mkdir()
    (directory / "config.yaml").write_text("")
    assert f"--out '{directory}' --resume" in how_to_go_on("stopped", directory)
