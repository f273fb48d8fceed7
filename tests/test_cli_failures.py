"""The last net of the command line: what the machine refuses is one sentence, a mistake in the program a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

import jax
import pytest
from command_lines import HANGS, assert_one_sentence

from mgrad_jax.cli import main
from mgrad_jax.cli.failures import explain, fail

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3221225472 bytes."
FAILURES: dict[str, tuple[BaseException, str]] = {
    "file": (PermissionError(errno.EACCES, "Permission denied", "/data/x.inter"), "/data/x.inter: permission denied"),
    "file in bytes": (OSError(errno.EIO, "Input/output error", b"/x"), "/x: input/output error"),
    "no file": (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
    "no reason": (TimeoutError(), "timeoutError"),
    "host memory": (MemoryError("Unable to allocate 4.00 GiB for an array"), "Unable to allocate 4.00 GiB"),
    "host memory without a word": (MemoryError(), "memory ran out; choose smaller"),
    "nesting": (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    "reader gone": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "stopped reading"),
    "encoding": (UnicodeEncodeError("ascii", "a±b", 1, 2, "ordinal not in range"), "ascii, has no '±'"),
    "device memory": (jax.errors.JaxRuntimeError(OUT_OF_MEMORY), "when 3 GiB were asked for"),
    "device memory in GiB": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2.50GiB on GPU_0"),
        "when 2.50 GiB were asked for",
    ),
    "device memory without a size": (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more"), "ran out; choose"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_the_machine_refuses_is_one_sentence(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error, part = FAILURES[case]

    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr("mgrad_jax.data.load_interactions", refuse)
    drop = "mgrad_jax.cli.program._drop_output"
    monkeypatch.setattr(drop, lambda: None)  # pytest still needs its stdout
    assert_one_sentence(main(["info", "demo"]), capfd.readouterr(), part)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), jax.errors.JaxRuntimeError("INTERNAL: x")])
def test_a_mistake_in_the_program_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_so(*_: Any) -> None:
        raise error

    assert explain(error) is None
    monkeypatch.setattr("mgrad_jax.data.load_interactions", fail_so)
    with pytest.raises(type(error)):
        main(["info", "demo"])


def test_a_message_is_cut_to_what_one_reads(capfd: pytest.CaptureFixture[str]) -> None:
    assert fail("the value\n" + "7" * 200_000 + " is too long; shorten it.", 2) == 2
    assert capfd.readouterr().err == "the value " + "7" * 77 + "... is too long; shorten it.\n"
    fail("word " * 300 + "and the remedy.", 2)
    line = capfd.readouterr().err
    assert len(line) < 510
    assert line.endswith("and the remedy.\n")


def test_long_words_on_the_command_line_are_cut(capfd: pytest.CaptureFixture[str]) -> None:
    long = "9" * 5000
    for arguments in (["info", long], [long], ["train", f"--{long}"], ["train", "--epochs", long], ["evaluate", long]):
        assert_one_sentence(main(arguments), capfd.readouterr(), ".")


def run_program(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mgrad_jax", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=HANGS, **options)


def test_a_closed_or_abandoned_stdout_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        abandoned = run_program(["--help"], stdout=stream)
    assert abandoned.returncode == 2
    assert abandoned.stderr.count("\n") == 1
    command = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-m", "mgrad_jax", "--version"]
    closed = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=HANGS, check=False)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_version_help_and_modules(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("mgrad-jax 0.")
    assert main(["-h"]) == 0
    assert "--install-completion" in capfd.readouterr().out
    assert main(["train", "-h"]) == 0
    assert "--learning-rate" in capfd.readouterr().out
    assert main([]) == 2
    assert "Usage" in capfd.readouterr().out
    assert run_program(["--version"], stdout=subprocess.PIPE).stdout.startswith("mgrad-jax 0.")


def test_help_does_not_wait_for_jax() -> None:
    program = "import sys; from mgrad_jax.cli import main; main(['train', '--help']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=HANGS)
