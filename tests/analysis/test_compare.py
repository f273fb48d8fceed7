"""`mgrad-jax compare`: its directory, its tables, stopping and resuming, and one sentence for every mistake."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_study import compare

from mgrad_jax.analysis import study as study_module
from mgrad_jax.analysis.compare import compared, comparisons, label, verdicts
from mgrad_jax.analysis.compare_report import comparison_table, means_table
from mgrad_jax.analysis.runs import group_runs
from mgrad_jax.analysis.study import Cell, Run, Study, StudyInterrupted, study_runs, train_study
from mgrad_jax.cli import main
from mgrad_jax.errors import UserError
from mgrad_jax.training.fit import TrainingDiverged

METHODS = ("plain", "replay", "mirror")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def assert_one_sentence(code: int, captured: Any, part: str) -> None:
    assert code == 2
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith(".\n")


# --- the study's directory --------------------------------------------------------------------------------------------


def test_files_of_a_study(study: Path) -> None:
    names = {path.name for path in study.iterdir()} - {".lock"}
    tables = {"table.md", "table.csv", "table.tex", "tests.csv", "runs.csv", "curves.csv", "convergence.csv"}
    tables |= {"equal.csv", "equal_tests.csv"}
    assert names == tables | {"study.yaml", "runs", "result.json", "curves.png", "bars.png"}
    runs = {path.name for path in (study / "runs").iterdir()}
    assert runs == {f"vbpr-{m}-adam{'' if m == 'plain' else '-i3'}-s{s}" for m in METHODS for s in (999, 1000)}
    for picture in ("curves.png", "bars.png"):
        assert (study / picture).read_bytes().startswith(b"\x89PNG")


def test_replay_and_recommenders_without_training_are_there_without_being_asked_for(study: Path) -> None:
    rows = read(study / "table.csv")
    assert [(row["model"], row["method"]) for row in rows] == [
        ("popularity", "no training"), ("itemknn", "no training"), ("itemknn-features", "no training"),
        ("vbpr", "plain"), ("vbpr", "replay"), ("vbpr", "mirror"),
    ]  # fmt: skip


def test_means_are_those_of_the_runs(study: Path) -> None:
    for row in read(study / "table.csv")[3:]:
        results = [json.loads(p.read_text()) for p in sorted(study.glob(f"runs/vbpr-{row['method']}-*/result.json"))]
        for metric in ("recall@5", "recall@20", "ndcg@20"):
            values = [result["test"][metric] for result in results]
            assert float(row[metric]) == pytest.approx(np.mean(values), abs=1e-7)
            assert float(row[f"{metric}_sd"]) == pytest.approx(np.std(values, ddof=1), abs=1e-7)
        assert row["seeds"] == "2"
        assert row["note"].startswith("below popularity, itemknn")  # after two epochs


def test_two_seeds_are_not_tested_and_the_table_says_so(study: Path) -> None:
    rows = read(study / "tests.csv")
    assert len(rows) == 3 * 3
    assert {row["comparison"] for row in rows} == {"mirror - plain", "mirror - replay", "replay - plain"}
    for row in rows:
        assert row["note_on_seeds"] == "not tested: 2 seeds, at least 3 are needed"
        assert (row["p_over_seeds"], row["Holm_over_seeds"]) == ("", "")
        assert 0 <= float(row["p_over_users"]) <= float(row["Holm_over_users"]) <= 1
    text = (study / "table.md").read_text(encoding="utf-8")
    assert "not tested: 2 seeds" in text
    assert "adjusted for the 0 tests over seeds and the 9 over users" in text


def test_each_users_metrics_are_kept_with_the_run(study: Path) -> None:
    for run in (study / "runs").iterdir():
        kept, result = np.load(run / "users.npz"), json.loads((run / "result.json").read_text())
        assert kept["epoch"] == result["best_epoch"]
        assert len(kept["users"]) == 600
        assert kept["recall@20"].mean() == pytest.approx(result["test"]["recall@20"], abs=1e-7)


def test_every_run_keeps_the_parameters_that_are_asked_for(study: Path) -> None:
    for run in (study / "runs").iterdir():
        assert sorted(path.name for path in (run / "kept").iterdir()) == ["000001.npz", "000002.npz"]
    assert {config.keep_every for config in again(study).configs().values()} == {1}


def test_convergence_counts_gradients(study: Path) -> None:
    # 7,200 training pairs are one batch, and that is mirrored.
    evaluations = {(row["method"], row["epoch"]): row["evaluations"] for row in read(study / "curves.csv")}
    assert [evaluations[m, "2"] for m in METHODS] == ["2", "4", "4"]
    assert all(row["reached"].endswith(" of 2") for row in read(study / "convergence.csv"))


def test_a_finished_study_stands_for_its_runs(study: Path) -> None:
    groups = group_runs([study])
    assert {name: list(by_seed) for name, by_seed in groups["vbpr"].items()} == {m: [999, 1000] for m in METHODS}


# --- stopping and resuming --------------------------------------------------------------------------------------------


def copied(study: Path, out: Path, n_runs: int) -> Path:
    """A study as it is on disk after its first runs."""
    names = [row["directory"] for row in read(study / "runs.csv")]
    for name in names[:n_runs]:
        shutil.copytree(study / name, out / name)
    shutil.copy(study / "study.yaml", out)
    return out


def again(out: Path) -> Study:
    settings = yaml.safe_load((out / "study.yaml").read_text())
    return Study(out=str(out), **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


@pytest.mark.slow
def test_a_stopped_and_resumed_study_equals_an_unbroken_one(
    study: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = copied(study, tmp_path / "study", 4)

    def stop(done: int, config: Any, report: Any) -> None:
        if done == 4 and report is not None:
            raise KeyboardInterrupt  # in the middle of the fifth run

    with pytest.raises(StudyInterrupted, match="stopped with 4 of 6 runs finished"):
        train_study(again(out), resume=True, progress=stop)
    with pytest.raises(UserError, match="is a study with 4 of 6 runs finished; go on with it with --resume first"):
        study_runs(out)
    assert_one_sentence(main(compare(out)), capfd.readouterr(), "add --resume")
    # What is finished is not trained again.
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert main(compare(out, "--resume")) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in ("table.csv", "tests.csv", "runs.csv", "study.yaml"):
        assert (out / name).read_bytes() == (study / name).read_bytes(), name
    assert len(study_runs(out)) == 6


@pytest.mark.slow
def test_a_run_that_diverges_is_counted_and_the_others_are_kept(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(study, tmp_path / "study", 5)
    original = study_module.train_run

    def train_run(config: Any, **options: Any) -> Any:
        if config.training == "mirror" and config.seed == 1000:
            raise TrainingDiverged("epoch 1, batch 0: the loss became NaN or infinite.")
        return original(config, **options)

    monkeypatch.setattr(study_module, "train_run", train_run)
    runs = train_study(again(out), resume=True).runs
    assert [run.result is None for run in runs] == [False] * 5 + [True]
    assert "became NaN or infinite" in (runs[-1].directory / "diverged.txt").read_text()
    rows = means_table(runs, {}, ["recall@5"], "demo").rows
    assert [(row[1], row[4], row[-2]) for row in rows] == [("plain", 2, 0), ("replay", 2, 0), ("mirror", 1, 1)]
    assert len(study_runs(out)) == 5
    monkeypatch.undo()
    assert train_study(again(out), resume=True).runs[-1].result is None  # not tried once more


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    assert main(compare(out, "--dry-run")) == 0
    printed = capfd.readouterr().out
    assert not out.exists()
    assert sum(line.startswith(str(out)) for line in printed.splitlines()) == 6
    assert "at least" in printed
    assert "at most" in printed


# --- what is compared with what ---------------------------------------------------------------------------------------


def test_trainings_meet_plain_and_the_replay_of_their_interval() -> None:
    study = Study("demo", ("vbpr",), "x", ("plain", "mirror", "sam"), intervals=(1, 3), seeds=(1,))
    cells = study.cells()
    assert [label(c, cells) for c in cells] == [
        "plain", "replay every 1", "replay every 3", "mirror every 1", "mirror every 3", "sam",
    ]  # fmt: skip
    pairs = [tuple(label(c, cells) for c in pair) for pair in compared(cells)]
    assert pairs == [
        ("replay every 1", "plain"), ("replay every 3", "plain"),
        ("mirror every 1", "plain"), ("mirror every 1", "replay every 1"),
        ("mirror every 3", "plain"), ("mirror every 3", "replay every 3"),
        ("sam", "plain"), ("sam", "replay every 1"), ("sam", "replay every 3"),
    ]  # fmt: skip


def test_a_hyper_parameter_goes_to_every_model_that_has_it_or_to_one() -> None:
    given = {"reg_weight": 0.1, "freedom.reg_weight": 0.2, "dropout": 0.5}
    configs = Study("demo", ("vbpr", "freedom"), "x", seeds=(1,), hyper_parameters=given).configs()
    of_model = {key.cell.model: config.hyper_parameters for key, config in configs.items()}
    assert of_model == {"vbpr": {"reg_weight": 0.1}, "freedom": {"reg_weight": 0.2, "dropout": 0.5}}


def runs_of(method: str, interval: int | None, values: np.ndarray) -> list[Run]:
    """Runs made up: (seeds, users) of recall@5."""
    cell = Cell("vbpr", method, "adam", interval)
    return [
        Run(cell, seed, Path("x"), {"best_epoch": 1}, [], np.zeros(0), np.arange(len(users)), {"recall@5": users})
        for seed, users in enumerate(values)
    ]


def test_a_copied_run_differs_by_exactly_0_with_p_1() -> None:
    users = np.random.default_rng(0).random((5, 40)).astype(np.float32)
    made = comparisons([*runs_of("plain", None, users), *runs_of("replay", 3, users.copy())], ["recall@5"])
    (only,) = made
    assert only.relative == (0.0, 0.0, 0.0)
    for test, adjusted in ((only.over_seeds, only.adjusted_seeds), (only.over_users, only.adjusted_users)):
        assert (test.difference, test.p, adjusted, test.d_z) == (0.0, 1.0, 1.0, 0.0)


def test_verdicts_can_say_better_worse_nothing_and_untested() -> None:
    rng = np.random.default_rng(0)
    plain = 0.5 + 0.01 * rng.random((5, 40))
    runs = [*runs_of("plain", None, plain), *runs_of("replay", 3, plain - 0.1 + 0.001 * rng.random((5, 40)))]
    runs += runs_of("mirror", 3, plain + 0.1 + 0.001 * rng.random((5, 40)))
    made = comparisons(runs, ["recall@5"])
    sentences = verdicts(made, "recall@5")
    assert [s.split(", recall@5")[0] for s in sentences] == [
        "vbpr: replay against plain", "vbpr: mirror against plain", "vbpr: mirror against replay",
    ]  # fmt: skip
    assert ["worse, p =" in sentences[0], "better, p =" in sentences[1], "better, p =" in sentences[2]] == [True] * 3
    noise = comparisons([*runs_of("plain", None, plain), *runs_of("replay", 3, rng.permutation(plain))], ["recall@5"])
    assert "no difference shown, p =" in verdicts(noise, "recall@5")[0]
    few = comparisons([*runs_of("plain", None, plain[:4]), *runs_of("replay", 3, plain[1:])], ["recall@5"])
    assert verdicts(few, "recall@5")[0].endswith("(4 seeds only).")
    assert "adjusted for the 3 tests over seeds and the 3 over users" in comparison_table(made).caption


def test_a_seed_that_diverged_leaves_the_other_training_without_its_partner() -> None:
    users = np.random.default_rng(0).random((4, 10))
    plain, replay = runs_of("plain", None, users), runs_of("replay", 3, users + 0.1)
    replay[1] = replay[1]._replace(result=None, metrics={})
    (made,) = comparisons([*plain, *replay], ["recall@5"])
    assert made.over_seeds.n == 3
    rows = means_table([*plain, *replay], {}, ["recall@5"], "demo").rows
    assert [(row[4], row[-2]) for row in rows] == [(4, 0), (3, 1)]


# --- bad input --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, str], str]] = {
    "unknown model": ({"models": "vpbr"}, "unknown model 'vpbr'"),
    "unknown method": (
        {"methods": "plain,miror"},
        "unknown method 'miror'; choose one of mirror, mirror-ascent,",
    ),
    "empty place": ({"methods": "plain,,mirror"}, "--methods plain,,mirror has an empty place"),
    "twice": ({"models": "vbpr,vbpr"}, "--models names vbpr twice"),
    "no seeds": ({"seeds": "0"}, "--seeds is 0; it must be at least 1"),
    "no number": ({"seeds": "five"}, "--seeds five is no list of whole numbers"),
    "interval": ({"intervals": "0"}, "interval is 0; it must be at least 1"),
    "unknown optimizer": ({"optimizers": "adamm"}, "adamm"),
    "unknown metric": ({"metrics": "recall@7"}, "unknown metric 'recall@7'; choose one of recall@5"),
    "unknown hyper-parameter": ({"set": "droput=0.1"}, "no compared model has the hyper-parameter 'droput'"),
    "another model's": ({"set": "bm3.dropout=0.1"}, "--set bm3.dropout is for bm3, which is not compared"),
    "missing data": ({"data": "nowhere"}, "nowhere does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_option(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, part = BAD[case]
    assert_one_sentence(main(compare(tmp_path / "study", **options)), capfd.readouterr(), part)
    assert not (tmp_path / "study").exists()


def test_nothing_to_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = main(compare(tmp_path / "study", "--resume"))
    assert_one_sentence(code, capfd.readouterr(), "holds no study to resume")
    assert not (tmp_path / "study").exists()
