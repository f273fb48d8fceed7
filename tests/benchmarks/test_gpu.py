"""What `benchmarks/gpu.py` runs and in which order: with parts that are made up, and once with everything tiny."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def budget() -> ModuleType:
    import _gpu_budget

    return _gpu_budget


class Machine:
    """A clock that parts move on, and what was executed with which limit."""

    def __init__(self, budget: ModuleType, folder: Path) -> None:
        self.budget, self.now, self.log = budget, 1000.0, []
        self.results = budget.Results(folder, {"card": "made up"})
        self.takes: dict[str, float] = {}
        self.broken: dict[str, BaseException] = {}

    def execute(self, part: Any, limit: float) -> Any:
        self.log.append((part.name, limit))
        if part.name in self.broken:
            raise self.broken[part.name]
        taken = self.takes.get(part.name, part.seconds)
        self.now += min(taken, limit)
        if taken > limit:
            return self.budget.Outcome("too long", ["so far"], "ended")
        return self.budget.Outcome("done", [part.name])

    def run(self, parts: list[Any], seconds: float) -> list[str]:
        """The names of what ran."""
        self.log.clear()
        self.budget.run_parts(
            parts, seconds, self.results, self.execute, clock=lambda: self.now, say=lambda sentence: None
        )
        return [name for name, _ in self.log]

    def statuses(self, parts: list[Any]) -> dict[str, str]:
        return {part.name: self.results.of(part)["status"] for part in parts}


@pytest.fixture
def machine(budget: ModuleType, tmp_path: Path) -> Machine:
    return Machine(budget, tmp_path)


def parts_of(budget: ModuleType, **seconds: float) -> list[Any]:
    return [budget.Part(name[0], name, expected) for name, expected in seconds.items()]


def test_parts_run_in_order_and_a_restart_runs_none_again(budget: ModuleType, machine: Machine, tmp_path: Path) -> None:
    parts = parts_of(budget, a1=10, a2=10, b1=10)
    assert machine.run(parts, 100) == ["a1", "a2", "b1"]
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", "b.json"}
    record = json.loads((tmp_path / "a.json").read_text())["parts"]["a2"]
    assert (record["rows"], record["seconds"], record["machine"]) == (["a2"], 10.0, {"card": "made up"})
    assert machine.run(parts, 100) == []


def test_what_does_not_fit_is_skipped_with_the_reason_and_a_smaller_part_after_it_runs(
    budget: ModuleType, machine: Machine
) -> None:
    parts = parts_of(budget, a=30, b=50, c=20)
    assert machine.run(parts, 60) == ["a", "c"]
    assert machine.results.of(parts[1])["reason"] == "needs some 50 s and 30 s are left"
    assert machine.run(parts, 60) == ["b"]
    assert set(machine.statuses(parts).values()) == {"done"}


def test_expectations_follow_how_slow_the_machine_is(budget: ModuleType, machine: Machine) -> None:
    parts = parts_of(budget, a=10, b=10, c=10)
    machine.takes = {"a": 40}
    assert machine.run(parts, 75) == ["a"]  # the others are now expected to take 40 and 35 are left
    assert machine.results.of(parts[2])["reason"] == "needs some 40 s and 35 s are left"
    machine.takes = {}
    assert machine.run(parts, 75) == ["b", "c"]


def test_a_part_that_hangs_or_breaks_ends_alone_and_is_tried_last(budget: ModuleType, machine: Machine) -> None:
    parts = parts_of(budget, a=60, b=10, c=10, d=100)
    machine.takes, machine.broken = {"a": 1e9}, {"b": RuntimeError("out of memory")}
    assert machine.run(parts, 250) == ["a", "b", "c"]
    assert machine.log[0] == ("a", 180.0)  # three times the expectation
    assert machine.statuses(parts) == {"a": "too long", "b": "failed", "c": "done", "d": "skipped"}
    assert machine.results.of(parts[0])["rows"] == ["so far"]
    assert machine.results.of(parts[1])["reason"] == "RuntimeError: out of memory"
    machine.takes, machine.broken = {}, {}
    assert machine.run(parts, 500) == ["d", "a", "b"]
    assert set(machine.statuses(parts).values()) == {"done"}


def test_no_part_may_outlast_the_budget_and_a_short_one_has_two_minutes(budget: ModuleType, machine: Machine) -> None:
    machine.run(parts_of(budget, a=1, b=40), 130)
    assert machine.log == [("a", 120.0), ("b", 120.0)]
    machine.run(parts_of(budget, c=40), 70)
    assert machine.log == [("c", 70.0)]


def test_an_interrupt_ends_the_run_and_keeps_what_is_done(budget: ModuleType, machine: Machine) -> None:
    parts = parts_of(budget, a=1, b=1, c=1)
    machine.broken = {"b": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        machine.run(parts, 10)
    assert machine.results.of(parts[0])["status"] == "done"
    machine.broken = {}
    assert machine.run(parts, 10) == ["b", "c"]


def test_what_cannot_be_run_says_so(budget: ModuleType, machine: Machine) -> None:
    parts = [budget.Part("c", "c", 1.0, missing="no --reference was given"), *parts_of(budget, d=1)]
    assert machine.run(parts, 10) == ["d"]
    assert machine.results.of(parts[0])["reason"] == "no --reference was given"


def options(**changes: Any) -> argparse.Namespace:
    given = {"quick": False, "reference": None, "reference_python": "python", "data": {}, "device": "gpu"}
    return argparse.Namespace(**{**given, **changes})


def test_the_plan_has_every_step_in_the_order_of_their_letters_and_then_the_rest() -> None:
    import gpu

    parts = gpu.plan(options(reference=Path("/trainer"), data={"tiktok": Path("/data/tiktok")}))
    letters = [part.step for part in parts]
    first = letters[: letters.index("g") + 2]
    assert first == sorted(first)
    assert set(first) == set("abcdefg")
    assert len({str(part) for part in parts}) == len(parts)
    assert all((BENCHMARKS / part.command[0]).exists() for part in parts)
    tiktok = next(part for part in parts if str(part) == "(b) tiktok, interval 3")
    assert tiktok.command[-4:] == ("--data", "/data/tiktok", "--output", "{rows}")
    deterministic = next(part for part in parts if part.name == "resuming, deterministic")
    assert deterministic.xla_flags == "--xla_gpu_deterministic_ops=true"


def ends(process: int, seconds: float = 300.0) -> bool:
    """Whether a process that was killed is gone, or waits only for its parent: the kernel takes a moment for it."""
    state, end = Path(f"/proc/{process}/stat"), time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if state.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_stops_what_hangs_and_all_that_it_started(
    tmp_path: Path, budget: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    class Started(subprocess.Popen):  # type: ignore[type-arg]
        """Its time begins once the script has come as far as it comes."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout and self.poll() is None and not has_written_all(tmp_path / "rows.json"):
                time.sleep(0.01)
            return super().wait(timeout)

    def has_written_all(file: Path) -> bool:
        return file.exists() and file.read_text().endswith("]")

    monkeypatch.setattr(gpu.subprocess, "Popen", Started)
    script = tmp_path / "hang.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(f'[{child.pid}]')\n"
        "time.sleep(600)\n"
    )
    worker = gpu.Worker(tmp_path, options(device="cpu"))
    outcome = worker.execute(budget.Part("x", "x", 1.0, (str(script), "{rows}")), 1.0)
    assert (outcome.status, outcome.reason) == ("too long", "ended after 1 s")
    (child,) = outcome.rows
    assert ends(child), f"process {child} lives on"
    script.write_text("raise SystemExit('no such card')")
    failed = worker.execute(budget.Part("x", "x", 1.0, (str(script), "{rows}")), 60.0)
    assert failed == budget.Outcome("failed", None, "exit code 1: no such card")


def test_the_summary_says_where_there_is_nothing(tmp_path: Path) -> None:
    import _gpu_summary

    assert _gpu_summary.summary(tmp_path) == "Not measured on a GPU.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "0"], "--minutes is 0; it must be positive."),
        (["--reference", "."], "holds no src/common/trainer.py"),
        (["--data", "demo-data"], "only tiktok, baby, electronics have a place to take"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--output", str(tmp_path)])
    assert gpu.main() == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_every_step_runs_small_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--minutes", "60", "--device", "cpu", "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run([*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for step in "abdefg":
        parts = json.loads((tmp_path / f"{step}.json").read_text())["parts"]
        assert {name: part.get("reason") for name, part in parts.items() if part["status"] != "done"} == {}
        assert not any("error" in row for part in parts.values() for row in part["rows"])
    assert "no --reference was given" in (tmp_path / "summary.md").read_text()
    assert len(list(tmp_path.iterdir())) == 8
