"""What every benchmark shares: rows that merge by key, refusals, tables of the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Rows = list[dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a benchmark that measures the rows it is given, on a machine of the name it is given, at a clean commit."""
    import _frame

    def of(batches: list[Rows], *arguments: str, device: str = "a card", commit: str = "abc", **more: Any) -> int:
        def measure(_: Any) -> Iterator[Rows]:
            yield from batches

        monkeypatch.setattr(_frame, "device_name", lambda: device)
        monkeypatch.setattr(_frame, "commit", lambda: commit)
        monkeypatch.setattr(_frame, "versions", lambda: {"commit": commit})
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        return _frame.Benchmark("gpu_profile", "About.", measure, **more).main()

    return of


def row(training: str, milliseconds: float) -> dict[str, Any]:
    return {"training": training, "seconds_per_step": milliseconds / 1e3}


def test_rows_merge_by_key_and_are_written_as_they_come(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "new" / "rows.json"
    assert run([[row("plain", 1)], [row("mirror", 2)]], "--output", str(file)) == 0
    assert run([[row("mirror", 3)]], "--output", str(file), commit="def") == 0
    rows = json.loads(file.read_text())
    found = [(r["training"], r["seconds_per_step"], r["device"], r["versions"]["commit"]) for r in rows]
    assert found == [("plain", 1e-3, "a card", "abc"), ("mirror", 3e-3, "a card", "def")]
    assert "| mirror   | 0.003 " in capsys.readouterr().out

    def broken(_: Any) -> Iterator[Rows]:
        yield [row("replay", 4)]
        raise RuntimeError

    import _frame

    with pytest.raises(RuntimeError):
        _frame.Benchmark("gpu_profile", "About.", broken).main()
    assert [r["training"] for r in json.loads(file.read_text())] == ["plain", "mirror", "replay"]


def test_show_measures_nothing_and_prints_all_rows(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rows.json"
    assert run([[row("plain", 1), row("mirror", 2)]], "--output", str(file)) == 0
    before = file.read_text()
    capsys.readouterr()
    assert run([[row("mirror", 9)]], "--show", "--output", str(file), commit="abc+dirty", device="another") == 0
    assert file.read_text() == before
    out = capsys.readouterr().out
    assert [f" {text} " in out for text in (0.001, 0.002, 0.009)] == [True, True, False]


@pytest.mark.parametrize(
    ("content", "machine", "sentence"),
    [
        (
            None,
            {"commit": "abc+dirty"},
            "the working tree differs from its commit; commit first, or give --allow-dirty.",
        ),
        ("{not JSON", {}, "holds no rows of this benchmark"),
        ('[{"model": "vbpr"}]', {}, "holds no rows of this benchmark"),
        ('[{"training": "plain", "device": "other"}]', {}, "holds rows of other and this is a card"),
    ],
)
def test_nothing_is_measured_for_a_file_that_cannot_hold_it(
    run: Callable[..., int], content: str | None, machine: dict[str, str], sentence: str, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "rows.json"
    if content is not None:
        file.write_text(content)
    assert run([[row("plain", 1)]], "--output", str(file), **machine) == 2
    assert sentence in capsys.readouterr().err
    assert (file.read_text() if content is not None else file.exists()) == (content or False)


def test_a_dirty_tree_may_be_measured_if_that_is_said_and_what_is_tiny_needs_no_file(
    run: Callable[..., int], tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    assert run([[row("plain", 1)]], "--allow-dirty", "--output", str(file), commit="abc+dirty") == 0
    assert json.loads(file.read_text())[0]["versions"] == {"commit": "abc+dirty"}
    file.unlink()
    assert run([[row("plain", 1)]], "--quick", commit="abc+dirty") == 0
    assert not list(tmp_path.iterdir())


def test_an_option_has_a_tiny_default_and_a_wrong_one_is_one_sentence(capsys: Any) -> None:
    import _frame

    parser = _frame.Parser("About.")
    parser.number("--repeats", 9, "rounds", 2)
    parser.option("--models", ["a", "b"], "models", ["a"], choices=["a", "b"])
    parser.add_argument("--quick", action="store_true")
    assert parser.parse([]).repeats == 9
    assert parser.parse(["--quick", "--repeats", "5"]).repeats == 5
    options = parser.parse(["--quick"])
    assert (options.repeats, options.models) == (2, ["a"])
    for arguments, sentence in ((["--repeats", "0"], "must be at least 1"), (["--models", "c"], "invalid choice: 'c'")):
        with pytest.raises(SystemExit) as stopped:
            parser.parse(arguments)
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


def test_the_tables_of_the_documentation_are_what_the_results_say_and_need_no_jax(benchmarks_path: Path) -> None:
    without_packages = [sys.executable, "-S", str(benchmarks_path / "tables.py"), "--check"]
    done = subprocess.run(without_packages, env={}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_table_that_differs_is_named_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import tables

    file = tmp_path / "page.md"
    file.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    monkeypatch.setattr(tables, "SECTIONS", {"page.md": {"a": lambda: "new\n"}})
    assert tables.main(["--check"]) == 1
    assert "docs/page.md, a: not what benchmarks/results say" in capsys.readouterr().out
    assert tables.main(["--write"]) == 0
    assert file.read_text() == "before\n<!-- a: begin -->\nnew\n<!-- a: end -->\nafter\n"
    assert tables.main(["--check"]) == 0
    file.write_text("no marks")
    with pytest.raises(SystemExit, match="needs one"):
        tables.main(["--check"])


def test_a_comparison_pairs_the_sides_that_one_commit_measured() -> None:
    import _tables

    def side(name: str, commit: str, seconds: float) -> dict[str, Any]:
        return {"model": "m", "training": "plain", "data": "d", "side": name, "commit": commit, "seconds": seconds}

    rows = [side("published", "a", 9), side("ours", "a", 3), side("published", "b", 8), side("ours", "b", 2)]
    assert [(row["published"]["seconds"], row["seconds"]) for row in _tables.sides(rows)] == [(9, 3), (8, 2)]
    newest = _tables.latest(rows, "model", "training", "data", "side")
    assert [row["seconds"] for row in newest] == [8, 2]


def test_columns_of_one_field_stand_side_by_side_with_gaps_where_there_is_no_row() -> None:
    import _tables

    rows = [{"model": m, "form": f, "x": x} for m, f, x in [("a", "p", 1.0), ("a", "q", 2.0), ("b", "q", 3.0)]]
    header, lines = _tables.pivot(rows, ["model"], "form", _tables.number("x"))
    assert (header, lines) == (["model", "p", "q"], [["a", "1.0", "2.0"], ["b", "", "3.0"]])
