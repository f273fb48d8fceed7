"""What every benchmark shares: options, interleaved timing, and results that name their device and versions."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import jax

from mgrad_jax.errors import UserError

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("mgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one sentence and exits with 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print the sentence, without the usage."""
        print(f"{self.prog}: {message}; see --help.", file=sys.stderr)
        raise SystemExit(2)


def exit_status(main: Callable[[], None]) -> Callable[[], int]:
    """Make a script's main function return its exit status: 0, or 2 after the sentence of a `UserError`."""

    @functools.wraps(main)
    def run() -> int:
        try:
            main()
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        return 0

    return run


def check_choices(option: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a value of an option that is not among the known ones."""
    for value in values:
        if value not in known:
            raise UserError(f"{option} holds '{value}'; choose among {', '.join(known)}.")


def check_at_least(option: str, values: int | Sequence[int], least: int = 1) -> None:
    """Refuse numbers that are too small."""
    for value in [values] if isinstance(values, int) else values:
        if value < least:
            raise UserError(f"{option} is {value}; it must be at least {least}.")


def earlier_rows(output: Path) -> list[dict[str, Any]]:
    """Rows already in an output file; called before anything is measured, so that hours are not lost for a name.

    Raises:
        UserError: the file cannot be written, is no list of rows, or holds rows of another device.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
        text = output.read_text()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose another file.") from None
    if not text:
        output.unlink()
        return []
    try:
        rows = json.loads(text)
        others = {row["device"] for row in rows} - {device_name()}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{output} is no list of rows of a benchmark; choose another --output.") from None
    if others:
        raise UserError(
            f"{output} holds rows of {', '.join(sorted(others))} and this is {device_name()}; choose another --output."
        )
    return rows


def versions() -> dict[str, str]:
    """Python, the packages, and the commit; "+dirty" where the working tree differs from it."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    found["commit"] = _commit()
    return found


def _commit() -> str:
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        except OSError:  # a machine without git
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit or 'unknown'}{'+dirty' if git('status', '--porcelain') else ''}"


def device_name() -> str:
    """The device JAX computes on: a GPU by its name, a CPU by its model and number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"CPU: {_processor()}, {cores()} cores"


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def interleaved(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time every case once a round, so that drift of the machine meets all alike; results are waited for.

    Args:
        cases: functions without arguments by name, compiled and warm; each round begins with another one.
        repeats: rounds.

    Returns:
        Seconds by name, one of every round.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            started = time.perf_counter()
            jax.block_until_ready(cases[name]())
            seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread_cell(values: Mapping[str, float], digits: int, factor: float = 1.0) -> str:
    """A `spread` times `factor`, for a cell of a table: median (least to largest)."""
    median, least, largest = (f"{factor * values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least} to {largest})"


def ratios(seconds: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median and spread of the ratios of times of the same round."""
    return spread([a / b for a, b in zip(seconds, others, strict=True)])


def reset_peak_memory() -> None:
    """Let the system forget this process's peak so far, where it can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes in use: of the device since the start, or on the CPU of this process since the last reset."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return host_peak_memory()


def host_peak_memory() -> int:
    """The most bytes this process held in the machine's memory since it began or the last reset."""
    return _status("VmHWM")


def resident_memory() -> int:
    """Bytes this process holds in the machine's memory now; 0 where the system does not say."""
    return _status("VmRSS")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def program_memory(compiled: Any) -> int:
    """XLA's own account of a compiled program: arguments, results and temporaries."""
    analysis = compiled.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(analysis, part) for part in parts) - analysis.alias_size_in_bytes


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a JSON list; rows of two devices, here or in a file already there, end the program with 2."""
    path = Path(path)
    devices = {row["device"] for row in rows}
    if path.exists():
        devices |= {row["device"] for row in json.loads(path.read_text())}
    if len(devices) > 1:
        print(f"{path} would mix devices ({', '.join(sorted(devices))}); choose another --output.", file=sys.stderr)
        raise SystemExit(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
