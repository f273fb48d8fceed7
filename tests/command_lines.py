"""Command lines of tests, and what every refusal must look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Seconds after which a process that should end is said to hang. Nothing takes long; a busy machine may need much of it.
HANGS = 300.0


def overriding(command: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command with more options, without those of its own that are given anew: none may be given twice."""
    new = {key(options, i) for i, word in enumerate(options) if word.startswith("--")}
    kept: list[str] = []
    position = 0
    while position < len(command):
        has_value = position + 1 < len(command) and not command[position + 1].startswith("--")
        length = 2 if command[position].startswith("--") and has_value else 1
        if key(command, position) not in new:
            kept += command[position : position + length]
        position += length
    return [*kept, *options]


def key(words: Sequence[str], position: int) -> tuple[str, ...]:
    """What may be given once: an option, or the key in its `key=value`."""
    word = words[position]
    if word == "--set" and position + 1 < len(words):
        return word, words[position + 1].partition("=")[0]
    return (word,)


def assert_one_sentence(code: int, captured: Any, part: str) -> None:
    """Exit code 2 and one line on stderr, of reasonable length, that holds `part`."""
    assert code == 2
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith(".\n")
    assert len(captured.err) <= 510
    assert "Traceback" not in captured.err + captured.out
