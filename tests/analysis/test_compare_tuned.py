"""What `compare` adds to early stopping and one setting: tuning on validation, equal updates, candidates, a start."""

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

from mgrad_jax.analysis.compare_equal import LAST, at_equal_updates, equal_comparisons, equal_verdicts
from mgrad_jax.analysis.runs import _flat, group_runs
from mgrad_jax.analysis.study import Cell, Key, Run, Study, _choose, study_runs
from mgrad_jax.cli import main
from mgrad_jax.data import load_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.run import load_run
from mgrad_jax.training.start import start_from

TUNE = {"alpha2": (0.1, 0.2, 0.3)}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# --- tuning -----------------------------------------------------------------------------------------------------------


def test_methods_are_tried_with_what_they_have_and_replay_as_often_with_other_seeds() -> None:
    methods = ("plain", "mirror", "sam")
    study = Study("demo", ("vbpr",), "x", methods, seeds=(7, 8), tune=TUNE, settings={"alpha2": 0.2})
    tries: dict[str, list[tuple[int, float]]] = {}
    for key, config in study.configs().items():
        tries.setdefault(key.cell.method, []).append((config.seed, config.alpha2))
    assert tries["plain"] == tries["sam"] == [(7, 0.2), (8, 0.2)]
    assert tries["mirror"] == [(7, 0.1), (8, 0.1), (7, 0.2), (8, 0.2), (7, 0.3), (8, 0.3)]
    assert [seed for seed, _ in tries["replay"]] == [7, 8, 100_007, 100_008, 200_007, 200_008]
    names = [config.directory.name for config in study.configs().values()]
    assert len(set(names)) == len(names)
    # The try at what is set anyway is the run of a study that is not tuned.
    before = {c.directory for c in Study("demo", ("vbpr",), "x", methods, seeds=(7, 8)).configs().values()}
    assert before <= {config.directory for config in study.configs().values()}


def results(study: Study, valid: dict[tuple[str, int], list[float | None]]) -> dict[Key, Any]:
    """Results made up: validation metrics by method and try, seed by seed; None for a run that diverged."""
    found: dict[Key, Any] = {}
    for key in study.configs():
        value = valid[key.cell.method, key.attempt][study.seeds.index(key.seed)]
        found[key] = None if value is None else {"valid": {"recall@5": value}}
    return found


def test_the_best_mean_on_validation_is_chosen_and_divergence_counts_first() -> None:
    study = Study("demo", ("vbpr",), "x", ("plain", "mirror"), seeds=(7, 8), tune=TUNE)
    valid: dict[tuple[str, int], list[float | None]] = {
        ("plain", 0): [0.1, 0.1],
        ("replay", 0): [0.1, 0.3], ("replay", 1): [0.25, 0.25], ("replay", 2): [0.0, 0.4],
        ("mirror", 0): [0.9, None], ("mirror", 1): [0.1, 0.2], ("mirror", 2): [0.2, 0.3],
    }  # fmt: skip
    chosen, tried = _choose(study, results(study, valid))
    assert [(key.cell.method, key.seed, key.attempt) for key in chosen] == [
        ("plain", 7, 0), ("plain", 8, 0), ("replay", 7, 1), ("replay", 8, 1), ("mirror", 7, 2), ("mirror", 8, 2),
    ]  # fmt: skip
    notes = dict.fromkeys(chosen.values())
    assert list(notes) == [
        "", "best of 3 tries on validation: seeds + 100000", "best of 3 tries on validation: alpha2 0.3"
    ]  # fmt: skip
    assert [(t.cell.method, t.setting, t.diverged, t.is_chosen) for t in tried] == [
        ("replay", "seeds as given", 0, False), ("replay", "seeds + 100000", 0, True),
        ("replay", "seeds + 200000", 0, False), ("mirror", "alpha2 0.1", 1, False),
        ("mirror", "alpha2 0.2", 0, False), ("mirror", "alpha2 0.3", 0, True),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared study, extended by another alpha2; one seed."""
    out = tmp_path_factory.mktemp("studies") / "tuned"
    shutil.copytree(study, out)
    assert main(compare(out, "--resume", seeds="1", tune="alpha2=0.2,0.4")) == 0
    return out


@pytest.mark.slow
def test_an_untuned_study_can_be_tuned_and_says_how_often_it_tried(tuned: Path) -> None:
    assert {path.name for path in (tuned / "runs").iterdir()} >= {
        "vbpr-mirror-adam-i3-alpha2-0.4-s999", "vbpr-replay-adam-i3-s100999", "vbpr-mirror-adam-i3-s999",
    }  # fmt: skip
    rows = read(tuned / "tried.csv")
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("replay", "seeds as given"), ("replay", "seeds + 100000"), ("mirror", "alpha2 0.2"), ("mirror", "alpha2 0.4"),
    ]  # fmt: skip
    for method in ("replay", "mirror"):
        of_method = [row for row in rows if row["method"] == method]
        best = max(of_method, key=lambda row: float(row["valid_recall@5"]))
        assert [row["chosen"] for row in of_method] == ["yes" if row is best else "" for row in of_method]
        (mean,) = (row for row in read(tuned / "table.csv") if row["method"] == method)
        assert f"best of 2 tries on validation: {best['setting']}" in mean["note"]
        (run,) = (row for row in read(tuned / "runs.csv") if row["method"] == method)
        assert float(run["valid_recall@5"]) == float(best["valid_recall@5"])
        assert float(mean["recall@5"]) == pytest.approx(float(run["test_recall@5"]), abs=1e-7)
    assert "replay is tried as often with other seeds" in (tuned / "table.md").read_text()


@pytest.mark.slow
def test_other_commands_take_the_chosen_setting_and_replay_with_the_seeds_as_given(tuned: Path) -> None:
    (chosen,) = (row["directory"] for row in read(tuned / "runs.csv") if row["method"] == "mirror")
    expected = {"vbpr-plain-adam-s999", "vbpr-replay-adam-i3-s999", Path(chosen).name}
    assert {run.name for run in study_runs(tuned)} == expected
    assert {name: list(runs) for name, runs in group_runs([tuned])["vbpr"].items()} == {
        "plain": [999], "replay": [999], "mirror": [999],
    }  # fmt: skip


# --- equal updates ----------------------------------------------------------------------------------------------------


def run_of(method: str, interval: int | None, seed: int, valid: list[float], test: list[float], cost: int) -> Run:
    history = [{"valid_recall@5": v, "test_recall@5": t} for v, t in zip(valid, test, strict=True)]
    evaluations = cost * np.arange(1, len(valid) + 1)
    return Run(
        Cell("vbpr", method, "adam", interval),
        seed,
        Path("x"),
        {"best_epoch": 1},
        history,
        evaluations,
        np.zeros(0),
        {},
    )


def test_runs_count_up_to_the_updates_that_all_of_them_make() -> None:
    course = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    runs = [
        run_of("plain", None, 1, [0.1, 0.9, *[0.2] * 6], course, 3),  # 24 evaluations
        run_of("replay", 3, 1, [0.3, 0.2, 0.1, 0.4, 0.9, 0.9], course[:6], 4),  # 24 evaluations
        run_of("mirror", 3, 1, [0.1, 0.2, 0.3, 0.4, 0.5], course[:5], 4),  # 20 evaluations: the budget
    ]
    found = {cell.method: at for cell, at in at_equal_updates(runs, ["recall@5"], "recall@5").items()}
    assert {at.evaluations for at in found.values()} == {20}
    assert {method: at.epochs[1] for method, at in found.items()} == {"plain": 6, "replay": 5, "mirror": 5}
    best = {method: at.values["best"]["recall@5"][1] for method, at in found.items()}
    assert best == {"plain": 0.2, "replay": 0.5, "mirror": 0.5}
    last = {method: at.values["last"]["recall@5"][1] for method, at in found.items()}
    assert LAST == 5
    assert last == pytest.approx({"plain": 0.4, "replay": 0.3, "mirror": 0.3})


def test_equal_updates_are_tested_over_seeds() -> None:
    rng = np.random.default_rng(0)
    runs = []
    for seed in range(5):
        noise = rng.normal(scale=0.001, size=(2, 6))
        runs.append(run_of("plain", None, seed, [0.1] * 6, list(0.2 + noise[0]), 4))
        runs.append(run_of("replay", 3, seed, [0.1] * 6, list(0.3 + noise[1]), 4))
    made = equal_comparisons(at_equal_updates(runs, ["recall@5"], "recall@5"), ["recall@5"])
    assert [(c.rule, c.test.n) for c in made] == [("best", 5), ("last", 5)]
    assert all(c.test.difference == pytest.approx(0.1, abs=0.005) and c.adjusted < 0.001 for c in made)
    (sentence,) = equal_verdicts(made, "recall@5")
    assert sentence.startswith("vbpr: replay against plain, recall@5 at equal updates +0.1")
    assert "better, p =" in sentence


def test_the_study_tells_its_runs_at_equal_updates(study: Path) -> None:
    rows = {row["method"]: row for row in read(study / "equal.csv")}
    # Two epochs of plain training are two updates; one epoch of the others is.
    assert {method: (row["evaluations"], row["epochs"]) for method, row in rows.items()} == {
        "plain": ("2", "2.0"), "replay": ("2", "1.0"), "mirror": ("2", "1.0"),
    }  # fmt: skip
    histories = [read(study / "runs" / f"vbpr-mirror-adam-i3-s{seed}" / "history.csv") for seed in (999, 1000)]
    first = [float(history[0]["test_recall@20"]) for history in histories]
    assert float(rows["mirror"]["recall@20_last"]) == pytest.approx(np.mean(first), abs=1e-12)
    assert {row["note"] for row in read(study / "equal_tests.csv")} == {"not tested: 2 seeds, at least 3 are needed"}
    assert "at equal updates" in (study / "table.md").read_text()


# --- candidates and a start -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_amr_starts_from_the_runs_of_a_study_and_is_ranked_among_candidates(study: Path, tmp_path: Path) -> None:
    data = load_interactions("demo")
    held_out = dict(data.test.tolist())
    rng = np.random.default_rng(0)
    table = [
        [held_out[u], *(i for i in rng.permutation(data.n_items)[:30] if i != held_out[u])][:20] for u in range(600)
    ]
    np.save(tmp_path / "candidates.npy", np.array(table))
    own = {"seeds": "1", "epochs": "1", "adversarial": "epsilon=0.1,weight=1", "start_from": str(study)}
    out = tmp_path / "amr"
    assert main(compare(out, **own, candidates=str(tmp_path / "candidates.npy"))) == 0
    rows = read(out / "table.csv")
    assert all(0 < float(row["candidates_hr@20"]) <= 1 for row in rows)
    assert rows[0]["model"] == "popularity"
    assert "no full-ranking metrics" in (out / "table.md").read_text()
    for method in ("plain", "replay-adam-i3", "mirror-adam-i3"):
        config = yaml.safe_load(
            (out / "runs" / f"vbpr-{method.replace('plain', 'plain-adam')}-s999" / "config.yaml").read_text()
        )
        assert config["start_from"] == str(study / "runs" / "vbpr-plain-adam-s999")
    run = out / "runs" / "vbpr-plain-adam-s999"
    file = tmp_path / "users.csv"
    candidates = ["--candidates", str(tmp_path / "candidates.npy")]
    assert main(["evaluate", str(run), *candidates, "--per-user", str(file)]) == 0
    users = read(file)
    kept = np.load(run / "candidates.npz")
    assert [float(row["candidates_ndcg@5"]) for row in users] == pytest.approx(kept["candidates_ndcg@5"].tolist())
    (mean,) = (row for row in rows if row["method"] == "plain")
    assert float(mean["candidates_ndcg@5"]) == pytest.approx(kept["candidates_ndcg@5"].mean(), abs=1e-6)


def test_a_start_gives_every_parameter_of_the_run(study: Path) -> None:
    run = study / "runs" / "vbpr-mirror-adam-i3-s1000"
    data = load_interactions("demo")
    settings = json.loads((run / "result.json").read_text())["hyper_parameters"]
    for adversarial in (None, {"epsilon": 0.1, "weight": 1.0}):
        config = RunConfig("vbpr", "demo", seed=1, hyper_parameters=settings, adversarial=adversarial)
        model = config.create_model(data)
        trained = load_run(run)
        start_from(model, trained.model, run)
        for ours, theirs in zip(model.embed(), trained.vectors(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_start_from_another_model_or_size_is_refused(study: Path) -> None:
    run, data = study / "runs" / "vbpr-plain-adam-s999", load_interactions("demo")
    trained = load_run(run).model
    wider = RunConfig("vbpr", "demo").create_model(data)
    with pytest.raises(UserError, match=r"has item_embedding of shape \(400, 8\) and this run of \(400, 64\)"):
        start_from(wider, trained, run)
    other = RunConfig("lightgcn", "demo").create_model(data)
    with pytest.raises(UserError, match="is a run of vbpr and cannot start lightgcn: vbpr has the parameter"):
        start_from(other, trained, run)


def test_runs_that_begin_with_one_of_a_study_each_compare_with_each_other_and_not_with_others() -> None:
    first, second, own = ({"start_from": start, "alpha1": 1.0} for start in ("a-s1", "a-s2", None))
    assert _flat(first, ()) == _flat(second, ()) != _flat(own, ()) == _flat({"alpha1": 1.0}, ())


# --- bad input --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, str], str]] = {
    "no number": ({"tune": "alpha2=0.1,x"}, "--tune alpha2=0.1,x is not of the form name=number,number"),
    "unknown setting": ({"tune": "dropout=0.1"}, "--tune has no setting 'dropout'; choose among alpha1, alpha2"),
    "without effect": (
        {"tune": "alpha2=0.1,0.2", "methods": "plain"},
        "--tune alpha2 has no effect in plain or replay",
    ),
    "twice": ({"tune": "alpha2=0.1,0.1"}, "--tune alpha2 names a value twice"),
    "out of range": ({"tune": "alpha2=0.1,-1"}, "alpha2 is -1; it must be a positive number"),
    "no candidates": ({"candidates": "nowhere.npy"}, "nowhere.npy does not exist; `mgrad-jax prepare --amr` writes"),
    "no start": ({"start_from": "nowhere"}, "nowhere/runs/vbpr-plain-adam-s999 holds no run to start from"),
    "half an adversary": ({"adversarial": "epsilon=0.1"}, "adversarial training lacks its weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_option(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, part = BAD[case]
    assert main(compare(tmp_path / "study", **options)) == 2
    error = capfd.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "study").exists()
