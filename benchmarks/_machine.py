"""What a benchmark runs on and with: device, processor cores, versions and memory."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("mgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")


def versions() -> dict[str, str]:
    """Python, the packages, and the commit; "+dirty" where the working tree differs from it."""
    found = {name: package_version(name) or "unknown" for name in _PACKAGES}
    return {"python": platform.python_version(), **found, "commit": commit()}


def package_version(name: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def commit() -> str:
    """The commit that is measured, "unknown" without git; "+dirty" where files other than results differ from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
        except OSError:  # a machine without git
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{'+dirty' if changed else ''}"


def device_name() -> str:
    """The device JAX computes on: a GPU by its name, a CPU by its model and number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    return f"CPU: {_processor()}, {cores()} cores"


def device_elsewhere() -> str:
    """The same, asked in a process of its own: whoever asks JAX in this one takes the GPU's memory."""
    command = [sys.executable, "-c", "import _machine; print(_machine.device_name())"]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def reset_peak_memory() -> None:
    """Let the system forget this process's peak so far, where it can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes in use: of the device since the start, or on the CPU of this process since the last reset."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return host_memory("VmHWM")


def host_memory(name: str) -> int:
    """Bytes this process holds in the machine's memory now, "VmRSS", or held at most since the last reset, "VmHWM"."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def program_memory(compiled: Any) -> int:
    """XLA's own account of a compiled program: arguments, results and temporaries."""
    analysis = compiled.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return int(sum(getattr(analysis, part) for part in parts) - analysis.alias_size_in_bytes)
