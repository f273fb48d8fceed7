"""Cases that take turns, and medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


def interleaved(
    cases: Mapping[Name, Callable[..., Any]], repeats: int, starts: Mapping[Name, Callable[[], Any]] | None = None
) -> dict[Name, list[float]]:
    """Time every case once per round, so that drift of the machine meets all alike; results are waited for.

    Args:
        cases: functions by name, compiled and warm; each round begins with another one.
        repeats: rounds.
        starts: by name, what makes the argument that a case consumes, outside its time; the other cases have none.

    Returns:
        Seconds by name, one per round.
    """
    names, starts = list(cases), starts or {}
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            arguments = [starts[name]()] if name in starts else []
            started = time.perf_counter()
            jax.block_until_ready(cases[name](*arguments))
            seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(seconds: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median and spread of the ratios of times of the same round."""
    return spread([a / b for a, b in zip(seconds, others, strict=True)])
