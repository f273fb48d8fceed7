"""Two processes of a test that compute together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from command_lines import HANGS


class Ended(NamedTuple):
    """How a process ended, and what it printed."""

    code: int
    out: str
    error: str


def start_two(
    program: str, arguments: Sequence[Sequence[str]], cache: Path, before: str = "", devices: int = 2
) -> list[Ended]:
    """Two processes with so many devices each, in float64, each with its arguments; the second runs `before` first."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", text, *own],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for text, own in zip((program, before + program), arguments, strict=True)
    ]
    try:
        texts = [process.communicate(timeout=HANGS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [Ended(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


def address() -> str:
    """Of a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
