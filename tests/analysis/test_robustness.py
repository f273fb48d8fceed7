"""`mgrad-jax robustness`: curves that begin at what `evaluate` says, known answers, tables, bad input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mgrad_jax.analysis.perturb import FeatureChange
from mgrad_jax.analysis.robustness import Measured, Response, changed_features, table_noise
from mgrad_jax.analysis.robustness_report import Lines, differences, differences_table, line, summary_table
from mgrad_jax.analysis.robustness_run import NOISE, Experiment
from mgrad_jax.cli import main
from mgrad_jax.training.run import LoadedRun, load_run

WHAT = Measured(("recall@5", "recall@20", "ndcg@20"), draws=2)
SWAP = FeatureChange("swap", ("image", "text"))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def run(study: Path) -> Path:
    return study / "runs" / "vbpr-plain-adam-s999"


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedRun:
    return load_run(run)


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    file = tmp_path_factory.mktemp("evaluated") / "users.parquet"
    assert main(["evaluate", str(run), "--per-user", str(file)]) == 0
    return pd.read_parquet(file)


@pytest.fixture(scope="module")
def noise(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the runs of one seed."""
    out = tmp_path_factory.mktemp("robustness") / "noise"
    runs = [str(study / "runs" / f"vbpr-{name}-s999") for name in ("plain-adam", "replay-adam-i3", "mirror-adam-i3")]
    assert main(["robustness", *runs, "--scales", "1,3", "--draws", "2", "--out", str(out)]) == 0
    return out


# --- known answers ----------------------------------------------------------------------------------------------------


def test_no_noise_is_what_evaluate_says_to_the_bit(noise: Path, evaluated: pd.DataFrame) -> None:
    rows = pd.read_csv(noise / "noise.csv")
    assert list(rows) == ["model", "method", "seed", "scale", "draw", "metric", "value"]
    none = rows[(rows["scale"] == 0) & (rows["method"] == "plain") & (rows["seed"] == 999)]
    for metric in WHAT.metrics:
        values = none.loc[none["metric"] == metric, "value"]
        assert values.tolist() == [float(evaluated[metric].to_numpy().mean())] * 2
    assert (none.loc[none["metric"].str.startswith("overlap"), "value"] == 1).all()


def test_every_user_of_the_unchanged_model_is_evaluates(loaded: LoadedRun, evaluated: pd.DataFrame) -> None:
    response = table_noise(loaded, (0.0, 2.0), WHAT, per="table", at="table")
    for metric in WHAT.metrics:
        np.testing.assert_array_equal(response.clean[metric], evaluated[metric])
        assert response.values[metric].shape == (2, 2, 600)
        np.testing.assert_array_equal(response.values[metric][0, 1], evaluated[metric])
    changed = response.values["overlap@20"][1]
    assert 0 < changed.mean() < 1
    assert (changed[0] != changed[1]).any()  # another draw
    assert response.references["zero table"]["recall@20"].shape == (1, 600)
    assert response.references["noise only"]["recall@20"].shape == (2, 600)


def test_tiny_noise_keeps_every_list(loaded: LoadedRun) -> None:
    response = table_noise(loaded, (0.0, 1e-12), WHAT, per="none", at="vectors")
    for metric, clean in response.clean.items():
        np.testing.assert_array_equal(response.values[metric][1], np.broadcast_to(clean, (2, 600)))


def test_a_users_own_features_equal_to_the_datas_change_nothing(loaded: LoadedRun) -> None:
    response = changed_features(
        loaded, (0.0, 0.5, 1.0), WHAT, FeatureChange("given", ("image", "text")), dict(loaded.data.features)
    )
    for metric, clean in response.clean.items():
        np.testing.assert_array_equal(response.values[metric], np.broadcast_to(clean, (3, 2, 600)))


def test_changed_users_and_slots_are_told_apart(loaded: LoadedRun) -> None:
    response = changed_features(loaded, (0.0, 0.5, 1.0), WHAT, SWAP)
    parts = response.parts
    assert np.isnan(parts["recall@20 changed users"][0]).all()
    assert np.isnan(parts["recall@20 other users"][2]).all()
    np.testing.assert_allclose(
        parts["recall@20 changed users"][2], response.values["recall@20"][2].mean(axis=1), rtol=1e-6
    )
    assert (parts["changed items@5"][0] == 0).all()
    assert (parts["changed items@5"][2] == 1).all()
    assert 0.2 < parts["changed items@20"][1].mean() < 0.8


@pytest.mark.slow
def test_graphs_made_anew_of_the_same_features_change_nothing_and_of_others_do(tmp_path: Path) -> None:
    out = tmp_path / "freedom"
    command = ["train", "--model", "freedom", "--data", "demo", "--set", "embedding_dim=8", "--epochs", "1"]
    assert main([*command, "--out", str(out)]) == 0
    freedom = load_run(out)
    given = FeatureChange("given", ("image", "text"))
    same = changed_features(freedom, (0.0, 1.0), WHAT, given, dict(freedom.data.features), rebuild=True)
    np.testing.assert_allclose(same.values["overlap@20"], 1, atol=1e-3)
    swapped = changed_features(freedom, (0.0, 1.0), WHAT, SWAP, rebuild=True)
    assert swapped.values["overlap@20"][1].mean() < 0.95


# --- tables -----------------------------------------------------------------------------------------------------------


def response(values: np.ndarray, clean: float = 1.0) -> Response:
    """A made-up answer: (places, draws, users) of recall@5, the first place unchanged."""
    whole = np.concatenate([np.full_like(values[:1], clean), values])
    return Response({"recall@5": whole[0, 0]}, {"recall@5": whole}, {}, {})


ONLY = type("What", (), {"metrics": ("recall@5",), "names": ("recall@5",), "split": "test"})()


def test_losses_areas_and_where_so_much_is_lost() -> None:
    kept = np.array([0.96, 0.9, 0.5])[:, None, None] * np.ones((3, 2, 10))
    experiment = Experiment(NOISE, (0.0, 1.0, 3.0, 7.0), 2, {"bm3": {"plain": {1: response(kept)}}})
    x = np.log1p(experiment.places)
    made = line(experiment.responses["bm3"]["plain"], (1,), "recall@5", x)
    np.testing.assert_allclose(made.ratio, [1, 0.96, 0.9, 0.5], rtol=1e-6)
    # log 2, log 4, log 8: three intervals of one width.
    area = ((1 + 0.96) / 2 + (0.96 + 0.9) / 2 + (0.9 + 0.5) / 2) / 3
    assert made.area == pytest.approx((area, area, area), rel=1e-6)
    assert made.first_lost(0.05, experiment.places) == 3
    assert made.first_lost(0.2, experiment.places) == 7
    assert made.first_lost(0.6, experiment.places) is None
    table = summary_table([experiment], Lines(), ONLY, {"recall@5": np.array([1.5])}, "demo")
    assert [row[-1] for row in table.rows] == ["", "below popularity"]


def test_equal_runs_differ_by_exactly_0_with_p_1() -> None:
    values = np.random.default_rng(0).random((3, 4, 30)).astype(np.float32)
    seeds = {seed: response(values * (1 + 0.1 * seed)) for seed in range(3)}
    experiment = Experiment(NOISE, (0.0, 1.0, 2.0, 3.0), 4, {"bm3": {"plain": seeds, "replay": dict(seeds)}})
    made = differences([experiment], Lines(), ONLY)
    (row,) = differences_table(made).rows
    assert row[:5] == (NOISE, "bm3", "replay - plain", "recall@5", 3)
    assert row[5] == (0.0, 0.0, 0.0)
    assert row[6:] == (0.0, 1.0, 1.0, "3 seeds only")


def test_a_model_without_a_hit_has_no_curve_and_no_warning() -> None:
    nothing = response(np.zeros((1, 2, 5), np.float32), clean=0.0)
    experiment = Experiment("swap", (0.0, 1.0), 2, {"bm3": {"plain": {1: nothing}}})
    row = summary_table([experiment], Lines(), ONLY, {"recall@5": np.array([0.5])}, "demo").rows[-1]
    assert np.isnan(row[6]).all()
    assert row[7:9] == (None, None)


def test_files_of_noise(noise: Path, study: Path) -> None:
    assert {path.name for path in noise.iterdir()} == {
        "table.md", "table.csv", "table.tex", "tests.csv", "curves.csv", "noise.csv", "noise.png", "result.json",
    }  # fmt: skip
    summary = read(noise / "table.csv")
    assert [row["model"] for row in summary[:3]] == ["popularity"] * 3
    assert {row["method"] for row in summary[3:]} == {"plain", "replay", "mirror"}
    content = json.loads((noise / "result.json").read_text())
    assert content["settings"]["scales"] == [1.0, 3.0]
    assert content["runs"]["vbpr"]["mirror"]["999"] == str(study / "runs" / "vbpr-mirror-adam-i3-s999")
    rows = read(noise / "tests.csv")
    assert {row["note"] for row in rows} == {"not tested: 1 seed, at least 3 are needed"}
    assert len(read(noise / "noise.csv")) == 3 * 3 * 2 * 5  # runs, scales, draws, metrics


def test_the_same_command_gives_the_same_bytes_and_adjustments_have_their_files(study: Path, tmp_path: Path) -> None:
    run = str(study / "runs" / "vbpr-plain-adam-s999")
    options = ["--adjust", "swap,mean", "--shares", "0.5", "--draws", "2", "--metrics", "recall@20"]
    for name in "ab":
        assert main(["robustness", run, *options, "--out", str(tmp_path / name)]) == 0
    for file in ("adjustment.csv", "table.csv", "curves.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    pictures = {path.name for path in (tmp_path / "a").glob("*.png")}
    assert pictures == {"adjustment-swap.png", "adjustment-mean.png"}
    rows = read(tmp_path / "a" / "adjustment.csv")
    assert list(rows[0]) == ["model", "method", "seed", "adjustment", "share", "draw", "metric", "value"]
    assert {row["metric"] for row in rows} == {
        "recall@20", "overlap@20", "recall@20 changed users", "recall@20 other users", "changed items@20",
    }  # fmt: skip


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "no such kind": (["--adjust", "swop"], "--adjust is 'swop'; choose one of swap, mix, noise, mean"),
    "kind twice": (["--adjust", "swap,swap"], "--adjust names swap, swap; name each once"),
    "no number": (["--scales", "0,much"], "--scales 0,much is no list of numbers"),
    "negative": (["--scales", "-1"], "--scales is -1.0; it must not be negative"),
    "share": (["--shares", "2"], "--shares is 2.0; it must be between 0 and 1"),
    "nothing": (["--scales", "0"], "--scales changes nothing"),
    "unit": (["--scale-per", "item"], "--scale-per is 'item'; choose one of table, row, none"),
    "place": (["--at", "user"], "--at is 'user'; choose one of table, vectors"),
    "split": (["--split", "train"], "--split is 'train'; choose one of test, valid"),
    "modality": (["--modality", "audio"], "--modality is 'audio'; choose one of both, image, text"),
    "mix": (["--mix", "2"], "--mix is 2.0; it must be between 0 and 1"),
    "draws": (["--draws", "0"], "--draws is 0; it must be at least 1"),
    "seed": (["--seed", "-1"], "--seed is -1; it must be between 0"),
    "metric": (["--metrics", "hits@5"], "'hits@5' is no metric; write for example recall@20"),
    "table": (
        ["--tables", "items"],
        "vbpr has no learned table 'items' with a row per item; choose among item_embedding",
    ),
    "tables and vectors": (["--tables", "item_embedding", "--at", "vectors"], "leave one of them out"),
    "graphs without a change": (["--rebuild-graphs"], "none are asked for; add --adjust swap"),
    "no graphs": (["--adjust", "swap", "--rebuild-graphs"], "vbpr has no item graph made of features"),
    "no own features": (["--adjusted-features", "nowhere"], "nowhere holds no image_feat.npy or text_feat.npy"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_option(case: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, part = BAD[case]
    code = main(["robustness", str(run), "--out", str(tmp_path / "out"), *options])
    assert_one_sentence(code, capfd.readouterr(), part)
    assert not (tmp_path / "out").exists()


def test_bad_runs(study: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert_one_sentence(main(["robustness", str(tmp_path), *out]), capfd.readouterr(), "holds no run")
    mirror = run.with_name("vbpr-mirror-adam-i3-s999")
    code = main(["robustness", str(run), str(mirror), *out])
    assert_one_sentence(code, capfd.readouterr(), "none of replay, the control with as many updates")
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    shutil.rmtree(lost / "checkpoint")
    assert_one_sentence(main(["robustness", str(lost), *out]), capfd.readouterr(), "has no checkpoint")
    code = main(["robustness", str(run), "--out", str(study)])
    assert_one_sentence(code, capfd.readouterr(), "exists already; choose another --out")


def test_own_features_of_another_shape(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "text_feat.npy", np.ones((400, 3), np.float32))
    code = main(["robustness", str(run), "--adjusted-features", str(tmp_path), "--out", str(tmp_path / "out")])
    assert_one_sentence(code, capfd.readouterr(), "has shape (400, 3) and the data's (400, 16)")


def assert_one_sentence(code: int, captured: Any, part: str) -> None:
    assert code == 2
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith(".\n")
