"""What every benchmark shares: interleaved timing, and results that name their device and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("mgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")


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
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit or 'unknown'}{'+dirty' if git('status', '--porcelain') else ''}"


def device_name() -> str:
    """The device JAX computes on: a GPU by its name, a CPU by its model and number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"CPU: {_processor()}, {len(os.sched_getaffinity(0))} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def interleaved(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Time every case once a round, so that drift of the machine meets all alike; results are waited for.

    Args:
        cases: functions without arguments by name; each is called once beforehand, which compiles it.
        repeats: rounds.

    Returns:
        By name: "median", "min" and "max" seconds a call, and "compile" for the first one.
    """
    first, seconds = {}, {name: [] for name in cases}
    for name, case in cases.items():
        started = time.perf_counter()
        jax.block_until_ready(case())
        first[name] = time.perf_counter() - started
    for _ in range(repeats):
        for name, case in cases.items():
            started = time.perf_counter()
            jax.block_until_ready(case())
            seconds[name].append(time.perf_counter() - started)
    return {name: {**spread(values), "compile": first[name]} for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a JSON list; rows of two devices, here or in a file already there, are refused."""
    path = Path(path)
    devices = {row["device"] for row in rows}
    if path.exists():
        devices |= {row["device"] for row in json.loads(path.read_text())}
    if len(devices) > 1:
        raise SystemExit(f"{path} would mix devices ({', '.join(sorted(devices))}); choose another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
