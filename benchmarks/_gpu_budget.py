"""Parts of a measurement in order, within a budget of time, each written at once; clock and runner are given."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgrad_jax.files import write_whole

LEAST_LIMIT = 120.0  # seconds that a part may always take, whatever was expected of it
PATIENCE = 3.0  # times the expectation, after which a part counts as hung


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        step, name: "b" and "baby, interval 3"; a step has a file of its own.
        seconds: what it is expected to take.
        command: what to run, as arguments; "{rows}" stands for the file that it writes its rows to.
        xla_flags: flags of XLA's that it runs under besides those of this process.
        missing: why it cannot be run; None where it can.
    """

    step: str
    name: str
    seconds: float
    command: Sequence[str] = ()
    xla_flags: str = ""
    missing: str | None = None

    def __str__(self) -> str:
        return f"({self.step}) {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What came of a part: "done", "failed", "too long" or "skipped", its rows so far, and why it is not done."""

    status: str
    rows: Any = None
    reason: str = ""


@dataclass
class Results:
    """Outcomes on disk, one file per step, each written as soon as it is known."""

    folder: Path
    machine: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def of(self, part: Part) -> dict[str, Any] | None:
        """The record of a part, None where it was never begun."""
        record: dict[str, Any] | None = self._step(part.step).get("parts", {}).get(part.name)
        return record

    def keep(self, part: Part, outcome: Outcome, seconds: float) -> None:
        """Write a part's record into its step's file, in one move."""
        content = self._step(part.step) or {"step": part.step, "parts": {}}
        record = {"status": outcome.status, "seconds": round(seconds, 1), "expected_seconds": part.seconds}
        record |= {"reason": outcome.reason} if outcome.reason else {}
        content["parts"][part.name] = {**record, "machine": dict(self.machine), "rows": outcome.rows}
        write_whole(self.folder / f"{part.step}.json", json.dumps(content, indent=1) + "\n")

    def _step(self, step: str) -> dict[str, Any]:
        file = self.folder / f"{step}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def run_parts(
    parts: Sequence[Part],
    seconds: float,
    results: Results,
    execute: Callable[[Part, float], Outcome],
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> None:
    """Run the parts that are not done yet, in order; those that did not end well before come last.

    A part is left out for this time where it is not expected to fit into what is left. Expectations are scaled by the
    median of what earlier parts took over what was expected of them.

    Args:
        parts: in the order of their worth.
        seconds: the budget.
        results: where outcomes are kept.
        execute: runs a part for at most so many seconds; whatever it raises counts as a failure of the part.
        clock, say: time in seconds; where progress is told.
    """
    end = clock() + seconds
    before = {str(part): results.of(part) for part in parts}
    ratios = [r["seconds"] / r["expected_seconds"] for r in before.values() if r and r["status"] == "done"]
    todo = [part for part in parts if (before[str(part)] or {}).get("status") != "done"]
    todo.sort(key=lambda part: (before[str(part)] or {}).get("status", "skipped") != "skipped")
    for part in todo:
        left, expected = end - clock(), part.seconds * (statistics.median(ratios) if ratios else 1.0)
        if part.missing is not None:
            outcome, taken = Outcome("skipped", reason=part.missing), 0.0
        elif expected > left:
            reason = f"needs some {expected:.0f} s and {max(left, 0):.0f} s are left"
            outcome, taken = Outcome("skipped", reason=reason), 0.0
        else:
            say(f"{part}: some {expected:.0f} s of {left:.0f} s left ...")
            started = clock()
            outcome = _execute(execute, part, min(left, max(LEAST_LIMIT, PATIENCE * expected)))
            taken = clock() - started
            ratios += [taken / part.seconds] if outcome.status == "done" else []
        if outcome.status != "skipped" or (before[str(part)] or {}).get("status", "skipped") == "skipped":
            results.keep(part, outcome, taken)
        say(f"{part}: {outcome.status}, {taken:.0f} s{f': {outcome.reason}' if outcome.reason else ''}")


def _execute(execute: Callable[[Part, float], Outcome], part: Part, limit: float) -> Outcome:
    try:
        return execute(part, limit)
    except Exception as error:  # a part must not take the others with it
        return Outcome("failed", reason=f"{type(error).__name__}: {error}")
