"""The last net of the command line: what is no mistake in the program becomes one sentence and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import Any

import typer

from mgrad_jax.cli import stopping
from mgrad_jax.errors import ProcessLost, UserError, did_you_mean, shown

LOST = 3
_LONGEST = 500  # characters of a sentence
_LONGEST_WORD = 200


def fail(sentence: str, code: int) -> int:
    """Print a sentence on stderr, on one line and cut to what one reads; returns the exit code."""
    line = " ".join(sentence.split())
    line = re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda word: f"{word[0][:77]}...", line)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 160]} ... {line[-150:]}"  # the remedy is at the end
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # the terminal is gone
            print(line, file=sys.stderr, flush=True)
    return code


def explain(error: BaseException) -> tuple[str, int] | None:
    """The sentence and exit code for what a command raised, None where it is a mistake in the program."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, ProcessLost):
        return str(error), LOST
    if isinstance(error, stopping.Stopped):
        return str(error), stopping.EXIT_CODE
    if isinstance(error, KeyboardInterrupt):
        return stopping.sentence(), stopping.EXIT_CODE
    if isinstance(error, (typer.Abort, EOFError)):
        return "the input ended before it was complete; give it whole and start again.", 2
    if isinstance(error, typer.TyperException):
        return _usage(error), 2
    sentence = _of_the_machine(error)
    return None if sentence is None else (sentence, 2)


def _of_the_machine(error: BaseException) -> str | None:
    """What the machine lacks or refuses."""
    if isinstance(error, BrokenPipeError):
        return "whoever read the output stopped reading; what was written to files is complete."
    if isinstance(error, UnicodeEncodeError):
        text = shown(error.object[error.start : error.end])
        return f"the output's encoding, {error.encoding}, has no {text}; set PYTHONIOENCODING=utf-8 and start again."
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read; make it flat and start again."
    if isinstance(error, MemoryError):
        size = f" ({str(error).rstrip('.')})" if str(error) else ""
        return f"memory ran out{size}; choose smaller settings or data, or a machine with more."
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        file = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{file}{reason[:1].lower()}{reason[1:]}; put that right and start again."
    return _of_the_device(error)


def _of_the_device(error: BaseException) -> str | None:
    """XLA's sentence for memory that a device does not have, with the size that was asked for."""
    jax = sys.modules.get("jax")  # who has not imported it raises none of its errors
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    asked = re.search(r"allocat\w*\s+(?:of\s+)?(\d+(?:\.\d+)?)\s*(bytes|[KMGT]i?B)?", str(error))
    size = ""
    if asked is not None:
        in_bytes = asked[2] in (None, "bytes")
        amount = f"{float(asked[1]) / 2**30:.3g} GiB" if in_bytes else f"{asked[1]} {asked[2]}"
        size = f" when {amount} were asked for"
    return f"the device's memory ran out{size}; choose a smaller model, a smaller batch size or fewer slots."


def _usage(error: Any) -> str:
    """A usage error as one sentence that lists what would have been valid."""
    context = getattr(error, "ctx", None)
    sentence = " ".join(error.format_message().split()).rstrip(".")
    if context is None:
        return f"{sentence}."
    # typer's own classes of usage errors are not public; an unknown option is told by what it brings.
    if hasattr(error, "possibilities"):
        offered = [p for p in context.command.params if not getattr(p, "hidden", False)]
        options = [o for p in offered for o in (*p.opts, *p.secondary_opts) if o.startswith("--")]
        path, meant = context.command_path, did_you_mean(error.option_name, options, most=3)
        return f"{path} has no option {shown(error.option_name)}{meant}; see {path} --help."
    if sentence.startswith("No such command"):
        commands = context.command.list_commands(context)
        given = sentence.partition("'")[2].partition("'")[0]
        return (
            f"there is no command {shown(given)}; choose one of {', '.join(commands)}{did_you_mean(given, commands)}."
        )
    return f"{context.command_path}: {sentence[0].lower()}{sentence[1:]}; see {context.command_path} --help."
