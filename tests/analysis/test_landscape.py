"""`mgrad-jax landscape`: its files and tables, the centre, equal loss, reruns, bad input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import yaml
from command_lines import assert_one_sentence

from mgrad_jax.analysis.flatness import CORRECTED, RAW, Flatness, Number
from mgrad_jax.analysis.landscape import Surface, objective, parameters
from mgrad_jax.analysis.landscape_report import (
    BEST,
    EQUAL,
    all_readings,
    at_loss,
    common_loss,
    differences_table,
    flatness_table,
    notes,
    summary_table,
    verdicts,
)
from mgrad_jax.analysis.landscape_run import Landscape, Place, _spread
from mgrad_jax.analysis.runs import compared_pairs
from mgrad_jax.cli import main
from mgrad_jax.training.run import load_run

METHODS = {"plain": "plain-adam", "replay": "replay-adam-i3"}
QUICK = ["--points", "3", "--probes", "2", "--sample", "500"]
NAMES = [f"smoothed rise {s}" for s in (0.1, 0.25, 0.5)] + ["trace", "largest eigenvalue", "smallest eigenvalue"]
NAMES += ["worst rise", "slope"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def runs(study: Path) -> list[str]:
    """Those of one seed."""
    return [str(study / "runs" / f"vbpr-{method}-s999") for method in METHODS.values()]


@pytest.fixture(scope="module")
def made(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("landscape") / "out"
    assert main(["landscape", *runs(study), *QUICK, "--out", str(out)]) == 0
    return out


# --- what it leaves behind --------------------------------------------------------------------------------------------


def test_files_of_a_landscape(study: Path, made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == [
        "contours.png", "flatness.csv", "progress.png", "result.json", "surface.csv", "surface.png", "table.csv",
        "table.md", "table.tex", "tests.csv",
    ]  # fmt: skip
    for picture in made.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    surface = pd.read_csv(made / "surface.csv")
    assert list(surface) == ["run", "a", "b", "loss"]
    assert sorted(set(surface["run"])) == sorted(runs(study))
    assert len(surface) == 2 * 9
    assert np.isfinite(surface["loss"]).all()
    flatness = pd.read_csv(made / "flatness.csv")
    assert set(flatness["epoch"]) == {1, 2}
    assert len(flatness) == 2 * 2 * 16
    result = json.loads((made / "result.json").read_text())
    assert result["settings"]["points"] == 3
    assert {"device", "versions", "summary", "differences", "notes"} <= result.keys()
    assert (made / "table.tex").read_text().count(r"\begin{table}") == 2


def test_the_centre_is_the_loss_of_the_best_epoch(study: Path, made: Path) -> None:
    surface, flatness = pd.read_csv(made / "surface.csv"), pd.read_csv(made / "flatness.csv")
    sample_key = jax.random.split(jax.random.key(0), 3)[0]
    for run, method in zip(runs(study), METHODS, strict=True):
        loaded = load_run(run)
        loss, fixed = objective(loaded.model, loaded.data, 500, sample_key)
        expected = float(loss(parameters(loaded.model), fixed))
        centre = surface[(surface["run"] == run) & (surface["a"] == 0) & (surface["b"] == 0)]["loss"].item()
        said = flatness[(flatness["method"] == method) & (flatness["best"] == 1)]["loss"].iloc[0]
        assert centre == pytest.approx(expected, rel=1e-6)
        assert said == pytest.approx(expected, rel=1e-6)


def test_a_rerun_gives_the_same_bits_whatever_runs_stand_beside(study: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["landscape", runs(study)[0], *QUICK, "--kept-epochs", "0", "--out", str(again)]) == 0
    before = [row for row in read(made / "surface.csv") if row["run"] == runs(study)[0]]
    assert read(again / "surface.csv") == before
    numbers = [row for row in read(made / "flatness.csv") if (row["method"], row["best"]) == ("plain", "1")]
    assert read(again / "flatness.csv") == numbers
    assert not (again / "progress.png").exists()
    assert read(again / "tests.csv") == []


def test_all_runs_share_pairs_negatives_keys_and_graphs(study: Path) -> None:
    fixed = []
    for run in runs(study):
        loaded = load_run(run)
        fixed.append(objective(loaded.model, loaded.data, 500, jax.random.key(0))[1])
    for name in ("batch", "key"):
        for ours, theirs in zip(*(jax.tree.leaves(getattr(one, name)) for one in fixed), strict=True):
            np.testing.assert_array_equal(jax.random.key_data(ours) if name == "key" else ours,
                                          jax.random.key_data(theirs) if name == "key" else theirs)  # fmt: skip
    users, items, negatives = fixed[0].batch
    assert len(users) == 500
    assert len(set(zip(users.tolist(), items.tolist(), strict=True))) == 500
    have = {(int(u), int(i)) for u, i in loaded.data.train}
    assert {(int(u), int(i)) for u, i in zip(users, items, strict=True)} <= have
    assert not {(int(u), int(i)) for u, i in zip(users, negatives, strict=True)} & have


# --- equal loss -------------------------------------------------------------------------------------------------------


def landscape(course: list[tuple[int, float, float]], best: int, stops_gradient: bool = False) -> Landscape:
    """A made-up run: (epoch, loss, every number); two probes of each."""
    places = []
    for epoch, loss, value in course:
        numbers = {
            (name, scale): Number(np.asarray([value, value + 2]), 0.0) for name in NAMES for scale in (RAW, CORRECTED)
        }
        places.append(Place(epoch, epoch == best, Flatness(loss, numbers)))
    axis = np.asarray([-1.0, 1.0])
    return Landscape(Surface(axis, axis, np.zeros((2, 2)), 0.0), 1.0, tuple(places), stops_gradient)


def test_numbers_at_equal_loss_are_interpolated_where_a_run_first_gets_there() -> None:
    fast = landscape([(2, 0.8, 1.0), (4, 0.4, 3.0), (6, 0.5, 9.0), (8, 0.2, 7.0)], best=8)
    slow = landscape([(2, 0.9, 1.0), (4, 0.6, 2.0)], best=4)
    assert common_loss([fast, slow]) == 0.6
    reading = at_loss(fast, 0.6)
    assert reading is not None
    assert (reading.epoch, reading.loss) == (3.0, 0.6)
    np.testing.assert_allclose(reading.numbers["trace", RAW], [2.0, 4.0])
    last = at_loss(slow, 0.6)
    assert last is not None
    assert (last.epoch, last.numbers["slope", RAW].tolist()) == (4.0, [2.0, 4.0])
    first = at_loss(slow, 0.9)
    assert first is not None
    assert first.epoch == 2
    assert at_loss(slow, 1.0) is None  # before its first kept epoch
    assert at_loss(slow, 0.1) is None  # never
    assert common_loss([fast, landscape([(4, 0.6, 2.0)], best=4)]) is None


def test_without_kept_epochs_the_notes_say_that_losses_differ_and_name_both() -> None:
    made: Any = {"vbpr": {n: {1: landscape([(4, x, 2.0)], 4)} for n, x in (("plain", 0.25), ("replay", 0.5))}}
    readings = all_readings(made)
    assert EQUAL not in {at for at, models in readings.items() if models}
    (note,) = notes(made, readings)
    assert "stopped at different training losses (plain 0.25, replay 0.5)" in note
    assert "--keep-every N" in note


def test_a_run_below_the_common_loss_from_the_start_is_left_out_and_counted() -> None:
    plain = {1: landscape([(2, 0.9, 1.0), (4, 0.6, 2.0)], 4), 2: landscape([(2, 0.5, 1.0), (4, 0.4, 2.0)], 4)}
    made: Any = {"vbpr": {"plain": plain, "replay": {1: plain[1], 2: plain[1]}}}
    readings = all_readings(made)
    assert list(readings[EQUAL]["vbpr"]["plain"]) == [1]
    assert any("1 of 4 runs are below that loss at the first epoch they kept" in note for note in notes(made, readings))
    assert {row[5] for row in differences_table(made, readings).rows if row[1] == EQUAL} == {1}


def test_equal_runs_differ_by_exactly_0_and_others_are_tested_over_seeds() -> None:
    seeds = range(5)
    plain = {s: landscape([(2, 0.9, 1.0), (4, 0.6, 2.0 + 0.1 * s)], 4) for s in seeds}
    mirror = {s: landscape([(2, 0.9, 1.0), (4, 0.6, 1.0 + 0.11 * s)], 4) for s in seeds}
    made: Any = {"bm3": {"plain": plain, "replay": plain, "mirror": mirror}}
    table = differences_table(made, all_readings(made))
    columns = [column.name for column in table.columns]
    rows = [dict(zip(columns, row, strict=True)) for row in table.rows]
    assert len(rows) == 2 * 3 * 16
    for row in rows:
        if row["comparison"] == "replay - plain":
            assert (*row["difference"], row["p"], row["d_z"]) == (0, 0, 0, 1, 0)
        else:
            assert row["difference"].low < row["difference"].value < row["difference"].high < 0
            assert row["p"] < 0.01
            assert row["Holm"] >= row["p"]
    said = verdicts(table)
    assert len(said) == 3
    assert "bm3 at equal loss, mirror - replay: scale-corrected trace -0.98" in said[1]
    assert "; flatter, p = " in said[1]
    assert "; no difference shown, p = 1 over seeds, adjusted." in said[2]


def test_one_seed_is_not_tested_and_its_band_is_over_the_directions() -> None:
    plain, mirror = landscape([(4, 0.6, 2.0)], 4), landscape([(4, 0.6, 1.0)], 4)
    only = {key: Number(number.values[:1]) for key, number in mirror.best.flatness.numbers.items()}
    single = Landscape(mirror.surface, 1.0, (Place(4, True, Flatness(0.6, only)),), False)
    made: Any = {"bm3": {"plain": {1: plain}, "replay": {1: plain}, "mirror": {1: mirror}}}
    for row in differences_table(made, all_readings(made)).rows:
        assert row[-1] == "not tested: 1 seed, at least 3 are needed"
        assert np.isfinite(row[6].low)
    made = {"bm3": {"plain": {1: landscape([(2, 0.9, 1.0), (4, 0.6, 2.0)], 4)}}}
    made["bm3"]["replay"] = made["bm3"]["plain"]
    (said,) = verdicts(differences_table(made, all_readings(made)))
    assert said.endswith("scale-corrected trace +0 [+0, +0]; not tested: 1 seed, at least 3 are needed.")
    made = {"bm3": {"plain": {1: single}, "replay": {1: single}}}
    assert all(np.isnan(row[6].low) for row in differences_table(made, all_readings(made)).rows)


def test_eigenvalues_of_a_model_that_stops_gradients_are_headed_as_the_surrogates() -> None:
    one = landscape([(4, 0.6, 2.0)], 4, stops_gradient=True)
    made: Any = {"bm3": {"plain": {1: one}}}
    readings = all_readings(made)
    names = {row[2] for row in summary_table(made, readings, "demo").rows}
    assert "largest eigenvalue of the gradient's surrogate" in names
    assert "largest eigenvalue" not in names
    assert "trace" in names
    assert "smallest eigenvalue of the gradient's surrogate" in {row[7] for row in flatness_table(made).rows}
    assert any("bm3 stops gradients" in note for note in notes(made, readings))
    assert [row[1] for row in summary_table(made, readings, "demo").rows] == [BEST] * 18


def test_kept_epochs_are_spread_evenly_with_the_first_and_the_last() -> None:
    assert _spread(range(5, 105, 5), 4) == [5, 35, 70, 100]
    assert _spread([5, 10], 4) == [5, 10]
    assert _spread([5, 10], 0) == []


def test_an_interval_meets_its_own_replay_only() -> None:
    names = ["plain", "replay every 3", "replay every 5", "mirror every 5"]
    assert compared_pairs(names) == [
        ("mirror every 5", "plain"), ("mirror every 5", "replay every 5"),
        ("replay every 3", "plain"), ("replay every 5", "plain"),
    ]  # fmt: skip


# --- bad input --------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[list[str], str]] = {
    "directions": (["--directions", "fliter"], "--directions is 'fliter'; choose one of filter, table, raw"),
    "scale": (["--scale-per", "column"], "--scale-per is 'column'; choose one of table, row"),
    "points": (["--points", "1"], "--points is 1; it must be between 2 and 1000"),
    "range": (["--range", "0"], "--range is 0.0; it must be a positive number"),
    "infinite range": (["--range", "inf"], "--range is inf; it must be a number from 1.2e-38 to 3.4e+38"),
    "sample": (["--sample", "0"], "--sample is 0; it must be between 1"),
    "probes": (["--probes", "0"], "--probes is 0; it must be between 1"),
    "kept": (["--kept-epochs", "-1"], "--kept-epochs is -1; it must be between 0"),
    "seed": (["--seed", "-1"], "--seed is -1; it must be between 0"),
    "nowhere": ([], "holds no run"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, part = OPTIONS[case]
    command = ["landscape", str(tmp_path / "run"), *options, "--out", str(tmp_path / "out")]
    assert_one_sentence(main(command), capfd.readouterr(), part)
    assert not (tmp_path / "out").exists()


def test_bad_runs(study: Path, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain, replay = map(Path, runs(study))
    mirror = study / "runs" / "vbpr-mirror-adam-i3-s999"
    out = tmp_path / "out"

    def refused(part: str, *paths: Path, into: Path = out) -> None:
        command = ["landscape", *map(str, paths), "--out", str(into)]
        assert_one_sentence(main(command), capfd.readouterr(), part)
        assert not out.exists()

    refused("exists already; choose another --out", plain, into=made)
    refused("none of replay, the control with as many updates", plain, mirror)
    refused("are the same training and seed", plain, plain)
    lost = shutil.copytree(plain, tmp_path / "lost")
    shutil.rmtree(lost / "checkpoint")
    refused("has no checkpoint, so that its model is lost", lost)
    other = shutil.copytree(replay, tmp_path / "other")
    settings = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**settings, "data_digest": "0" * 32}))
    refused("were trained on different data; give runs of one dataset", plain, other)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(study / "study.yaml", begun)
    refused("is a study with 0 of 6 runs finished; go on with it with --resume first", begun)
