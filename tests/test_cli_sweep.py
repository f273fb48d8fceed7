"""`mgrad-jax sweep`: its directory, resuming, and one sentence for every mistake."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
import yaml
from command_lines import HANGS, assert_one_sentence, overriding

from mgrad_jax import models
from mgrad_jax.cli import main
from mgrad_jax.cli.program import app
from mgrad_jax.cli.sweep import read_grid
from mgrad_jax.errors import UserError
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import published_grid

BASE = ["--model", "vbpr", "--data", "demo", "--set", "embedding_dim=8", "--epochs", "2"]
GRID = ["--grid", "alpha1=0.5,1.0", "--grid", "alpha2=0.1,0.2", "--seeds", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two seeds at four settings."""
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    assert main(["sweep", *BASE, *GRID, "--out", str(out)]) == 0
    return out


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# --- the directory ----------------------------------------------------------------------------------------------------


def test_directory_of_a_sweep(finished: Path) -> None:
    names = {"config.yaml", "members", "results.csv", "summary.csv", "best.json", "heatmap.png"}
    assert {path.name for path in finished.iterdir()} == names
    assert sorted(path.name for path in (finished / "members").iterdir()) == [f"{i:04d}" for i in range(8)]
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["grid"] == {"alpha1": [0.5, 1.0], "alpha2": [0.1, 0.2]}
    assert settings["seeds"] == [999, 1000]
    assert (finished / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_summary_and_best_follow_from_the_members(finished: Path) -> None:
    members = pd.DataFrame(
        [
            {**record["mirror"], "valid": record["valid"]["recall@5"], "test": record["test"]["recall@5"]}
            for path in sorted((finished / "members").glob("*/result.json"))
            for record in [json.loads(path.read_text())]
        ]
    )
    results = pd.read_csv(finished / "results.csv")
    np.testing.assert_allclose(results["valid_recall@5"], members["valid"])
    assert results["seed"].tolist() == [999, 1000] * 4
    by_setting = members.groupby(["alpha1", "alpha2"])
    summary = pd.read_csv(finished / "summary.csv").set_index(["alpha1", "alpha2"])
    for split in ("valid", "test"):
        for name, expected in (("mean", by_setting[split].mean()), ("std", by_setting[split].std())):
            np.testing.assert_allclose(summary[f"{split}_recall@5_{name}"].loc[expected.index], expected, atol=1e-9)
    best = json.loads((finished / "best.json").read_text())
    means = by_setting["valid"].mean()
    assert means[tuple(best["setting"].values())] == means.max()
    assert best["valid"]["recall@5"]["mean"] == pytest.approx(means.max())
    assert best["test"]["recall@5"]["mean"] == pytest.approx(by_setting["test"].mean()[tuple(best["setting"].values())])
    assert best["seeds"] == [999, 1000]
    assert len(best["members"]) == 2


def test_member_equals_the_run_of_train(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", *BASE, "--alpha1", "0.5", "--alpha2", "0.2", "--seed", "1000", "--out", str(out)]) == 0
    run = json.loads((out / "result.json").read_text())
    member = json.loads((finished / "members" / "0003" / "result.json").read_text())
    assert member.keys() == {*run, "diverged"}
    assert member["seconds"].keys() == run["seconds"].keys()
    for key in run.keys() - {"valid", "test", "seconds"}:
        assert member[key] == run[key], key
    for split in ("valid", "test"):
        assert member[split] == pytest.approx(run[split], abs=1e-6)


@pytest.mark.slow
def test_table_and_settings_without_effect(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    grid = ["--grid", "training=plain,mirror", "--grid", "alpha2=0.1,0.2", "--epochs", "1", "--grid", "seed=3"]
    assert main(overriding(["sweep", *BASE], [*grid, "--out", str(out)])) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "vbpr on demo" in captured.out
    assert "plain" in captured.out
    rows = read(out / "results.csv")
    assert [(row["training"], row["alpha2"]) for row in rows] == [("plain", ""), ("mirror", "0.1"), ("mirror", "0.2")]
    assert {row["seed"] for row in rows} == {"3"}
    assert not (out / "heatmap.png").exists()
    assert json.loads((out / "best.json").read_text())["test"]["recall@5"]["std"] is None


@pytest.mark.slow
def test_a_setting_that_diverges_is_not_the_best(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    command = [*overriding(["sweep", *BASE], ["--epochs", "1"]), "--out"]
    assert main([*command, str(out), "--grid", "learning_rate=1e30,1e-3"]) == 0
    assert json.loads((out / "best.json").read_text())["setting"] == {"learning_rate": 1e-3}
    assert [row["diverged"] for row in read(out / "summary.csv")] == ["0", "1"]
    capfd.readouterr()
    code = main([*command, str(tmp_path / "other"), "--grid", "learning_rate=1e30"])
    assert_one_sentence(code, capfd.readouterr(), "every member diverged")


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resume_trains_only_what_is_missing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgrad_jax.training import sweep_run

    out = shutil.copytree(finished, tmp_path / "sweep")
    expected = json.loads((out / "members" / "0005" / "result.json").read_text())
    for name in ("0005", "0006"):
        shutil.rmtree(out / "members" / name)
    for name in ("results.csv", "best.json"):
        (out / name).unlink()
    trained: list[int] = []
    original = sweep_run.sweep
    monkeypatch.setattr(
        sweep_run, "sweep", lambda data, members, **o: (trained.append(len(members)), original(data, members, **o))
    )
    assert main(["sweep", *BASE, *GRID, "--out", str(out), "--resume", "--slots", "1"]) == 0
    assert trained == [2]
    again = json.loads((out / "members" / "0005" / "result.json").read_text())
    for key in expected.keys() - {"seconds"}:
        assert again[key] == expected[key]
    assert json.loads((out / "best.json").read_text()) == json.loads((finished / "best.json").read_text())
    assert main(["sweep", *BASE, *GRID, "--out", str(out), "--resume"]) == 0
    assert trained == [2]  # nothing was missing any more


RESUMES: dict[str, tuple[list[str], str]] = {
    "no --resume": ([], "already holds a sweep; add --resume"),
    "another axis": (["--resume", "--grid", "reg_weight=0.1,0.01"], "reg_weight was 0.001 and is [0.1, 0.01]"),
    "another base": (["--resume", "--epochs", "3"], "epochs was 2 and is 3"),
    "other seeds": (["--resume", "--seeds", "1"], "seeds was [999, 1000] and is [999]"),
}


@pytest.mark.parametrize("case", RESUMES)
def test_bad_resume(case: str, finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, part = RESUMES[case]
    code = main(overriding(["sweep", *BASE, *GRID, "--out", str(finished)], options))
    assert_one_sentence(code, capfd.readouterr(), part)


def test_damaged_sweep(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", *BASE, *GRID, "--resume", "--out"]
    assert_one_sentence(main([*command, str(tmp_path / "none")]), capfd.readouterr(), "holds no sweep")
    out = shutil.copytree(finished, tmp_path / "sweep")
    result = out / "members" / "0002" / "result.json"
    result.write_text(result.read_text()[:50])
    assert_one_sentence(main([*command, str(out)]), capfd.readouterr(), f"{result} is damaged; delete it")
    for content, part in (("grid: [", "cannot be read"), ("model: vbpr\n", "is not a sweep's configuration")):
        (out / "config.yaml").write_text(content)
        assert_one_sentence(main([*command, str(out)]), capfd.readouterr(), part)


@pytest.mark.slow
def test_stopping_keeps_the_finished_members(
    tmp_path: Path, start_command: Callable[..., subprocess.Popen[str]]
) -> None:
    grid = ["--grid", "alpha1=0.5,1.0", "--grid", "alpha2=0.1,0.2", "--patience", "100000"]
    for epochs in ("40", "400"):  # where this process is kept waiting, the sweep may be over before it is stopped
        out = tmp_path / epochs
        command = overriding(["sweep", *BASE], [*grid, "--epochs", epochs, "--out", str(out)])
        process = start_command(command)
        first = out / "members" / "0000" / "result.json"
        while not first.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=HANGS)
        if process.returncode != 0:
            break
    assert process.returncode == 130
    assert error.count("\n") == 1, error
    assert "of 4 members finished" in error
    assert f"--out {out} --resume" in error
    before = first.stat().st_mtime_ns
    assert main([*command, "--resume"]) == 0
    assert first.stat().st_mtime_ns == before
    assert len(read(out / "results.csv")) == 4


# --- bad input --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], str]] = {
    "no form": (["--grid", "alpha1"], "--grid alpha1 is not of the form name=value,value"),
    "no name": (["--grid", "=1,2"], "--grid =1,2 is not of the form"),
    "no value": (["--grid", "alpha1="], "--grid alpha1= is not of the form"),
    "gap": (["--grid", "alpha1=0.1,,0.2"], "--grid alpha1=0.1,,0.2 is not of the form"),
    "twice": (["--grid", "alpha1=0.1", "--grid", "alpha1=0.2"], "--grid alpha1 is given twice"),
    "repeated value": (["--grid", "alpha1=0.1,0.10"], "axis 'alpha1' names 0.1 twice"),
    "unknown axis": (["--grid", "alpha=0.1"], "has no axis 'alpha'; choose among alpha1, alpha2,"),
    "no number": (["--grid", "alpha1=big"], "alpha1 is 'big'; it must be a positive number"),
    "out of range": (["--grid", "alpha1=0.5,-1"], "alpha1 is -1; it must be a positive number"),
    "NaN": (["--grid", "learning_rate=nan"], "learning_rate is nan; it must be a positive number"),
    "hyper-parameter": (["--grid", "embedding_dim=8,0"], "embedding_dim is 0; it must be at least 1"),
    "no effect": (["--no-mirror", "--grid", "alpha1=0.5"], "axis 'alpha1' has no effect in plain training"),
    "no seeds": (["--seeds", "0"], "seeds is 0; it must be at least 1"),
    "seeds twice": (["--seeds", "2", "--grid", "seed=1,2"], "leave one of them out"),
    "no slots": (["--slots", "0"], "slots is 0; it must be at least 1"),
    "no devices": (["--devices", "0"], "--devices is '0'; give how many to train on"),
    "too many devices": (["--devices", "9", "--dry-run"], "9 devices were asked for"),
    "unknown model": (["--model", "vpbr"], "unknown model 'vpbr'; choose one of"),
    "unknown model's grid": (["--model", "vpbr", "--grid", "published"], "unknown model 'vpbr'"),
    "missing data": (["--data", "nowhere"], "nowhere does not exist"),
    "mirror and replay": (["--mirror", "--replay"], "exclude each other"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_option(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, part = BAD[case]
    code = main(overriding(["sweep", *BASE, "--out", str(tmp_path / "sweep")], options))
    assert_one_sentence(code, capfd.readouterr(), part)
    assert not (tmp_path / "sweep").exists()


def test_unwritable_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code = main(["sweep", *BASE, "--out", str(tmp_path / "file" / "sweep")])
    assert_one_sentence(code, capfd.readouterr(), "cannot be written")


# --- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", models.names())
def test_published_grid(model: str) -> None:
    grid = read_grid(model, ["published", "alpha1=0.5,1"])
    assert grid == {**{name: list(values) for name, values in published_grid(model).items()}, "alpha1": [0.5, 1]}


def test_an_axis_by_name_replaces_the_published_one() -> None:
    assert read_grid("freedom", ["reg_weight=1e-3", "published"]) == {"dropout": [0.8, 0.9], "reg_weight": [1e-3]}
    with pytest.raises(UserError, match="not of the form"):
        read_grid("freedom", ["publish"])


def test_sweep_takes_the_options_of_train() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    train, sweep = ({p.opts[0] for p in commands[name].params} for name in ("train", "sweep"))
    of_machines = {"--coordinator", "--distributed", "--plan", "--process", "--processes"}
    assert train - sweep == {"--config", "--keep-every", "--start-from", *of_machines}
    assert sweep - train == {"--grid", "--seeds", "--slots"}


# --- its best member --------------------------------------------------------------------------------------------------


def test_the_best_member_is_evaluated_and_recommends(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "sweep")
    best = json.loads((out / "best.json").read_text())["members"][0]
    recorded = json.loads((out / "members" / best / "result.json").read_text())
    assert main(["evaluate", str(out)]) == 0
    first = capfd.readouterr().out
    assert f"member {best} (alpha1 " in first
    assert "first seed of the best setting" in first
    assert "trained once more" in first
    assert "differ" not in first
    again = json.loads((out / "members" / best / "run" / "result.json").read_text())
    for split in ("valid", "test"):
        assert again[split] == pytest.approx(recorded[split], abs=1e-6)
    assert main(["recommend", str(out), "--top-k", "1", "--output", str(tmp_path / "lists.csv")]) == 0
    second = capfd.readouterr().out
    assert f"member {best} " in second
    assert "trained once more" not in second
    assert "600 users, 1 item each" in second
    assert main(["evaluate", str(out / "members" / best)]) == 0


def test_which_members_there_are(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(finished, tmp_path / "sweep")
    for name in ("0008", "x", "٣"):
        code = main(["evaluate", str(out / "members" / name)])
        assert_one_sentence(code, capfd.readouterr(), "its members are 0000 to 0007")
    (out / "best.json").write_text("{")
    assert_one_sentence(main(["evaluate", str(out)]), capfd.readouterr(), "best.json is damaged")
    (out / "best.json").unlink()
    assert_one_sentence(main(["evaluate", str(out)]), capfd.readouterr(), "without a best setting yet; finish it with")
    (out / "config.yaml").write_text("grid: {alpha1: [0.5]}\nseeds: [1]\n")
    code = main(["evaluate", str(out / "members" / "0000")])
    assert_one_sentence(code, capfd.readouterr(), "is not a sweep's configuration")


def test_members_are_those_of_the_sweep(finished: Path) -> None:
    from mgrad_jax.training.member import find_member
    from mgrad_jax.training.sweep_run import SweepConfig

    base = RunConfig("vbpr", "demo", hyper_parameters={"embedding_dim": 8}, epochs=2)
    members = SweepConfig(base, {"alpha1": [0.5, 1.0], "alpha2": [0.1, 0.2]}, 2).members()
    for index, expected in enumerate(members):
        member = find_member(finished / "members" / f"{index:04d}")
        assert member is not None
        assert {**member.config.to_dict(), "out": None} == {**expected.to_dict(), "out": None}
    assert find_member(finished / "members") is None


def test_dry_run(tmp_path: Path, finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", *BASE, "--grid", "interval=2,3", "--seeds", "2", "--dry-run", "--out"]
    assert main([*command, str(tmp_path / "sweep")]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "4, in 2 programs" in captured.out
    assert not list(tmp_path.iterdir())
    assert_one_sentence(main([*command, str(finished)]), capfd.readouterr(), "already holds a sweep; add --resume")
