"""A run that was killed or stopped goes on to the same numbers as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mgrad_jax.errors import UserError
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.run import load_run, train_run

EPOCHS = 9
SMALL = {"embedding_dim": 8}


def config(out: Path, **changes: Any) -> RunConfig:
    values = {"model": "freedom", "data": "demo", "epochs": EPOCHS, "batch_size": 900, "seed": 3, "out": str(out)}
    return RunConfig(**{"hyper_parameters": SMALL, **values, **changes})


def history(out: Path) -> pd.DataFrame:
    """Rows as text, so that numbers are compared to the last digit, without the times."""
    return pd.read_csv(out / "history.csv", dtype=str).drop(columns=["seconds_train", "seconds_evaluate"])


def result(out: Path) -> dict[str, Any]:
    read = json.loads((out / "result.json").read_text())
    assert set(read.pop("seconds")) == {"compile", "train", "evaluate"}
    return read


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train_run(config(out))
    return out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fewer epochs, to be copied."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    train_run(config(out, epochs=4))
    assert len(history(out)) == 4
    return out


def start(out: Path) -> subprocess.Popen[bytes]:
    """The same run in another process, which does not come to its end before it is killed."""
    program = textwrap.dedent(f"""
        import time
        from mgrad_jax.training.config import RunConfig
        from mgrad_jax.training.run import train_run
        options = dict(epochs={EPOCHS}, batch_size=900, seed=3, hyper_parameters={SMALL})
        config = RunConfig("freedom", "demo", out={str(out)!r}, **options)
        train_run(config, progress=lambda report: time.sleep(0.1 if report.epoch < {EPOCHS - 2} else 3600))
    """)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE)


def wait_for_rows(process: subprocess.Popen[bytes], out: Path, n: int) -> None:
    path = out / "history.csv"
    while not path.exists() or path.read_text().count("\n") <= n:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_twice_and_resumed(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out)
    wait_for_rows(process, out, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "result.json").exists()
    rows = len(history(out))
    assert 5 <= rows < EPOCHS

    # Dying again right after the first new epoch changes nothing either.
    class Died(Exception):
        pass

    def die(_: Any) -> None:
        raise Died

    with pytest.raises(Died):
        train_run(config(out), resume=True, progress=die)
    assert len(history(out)) >= rows
    train_run(config(out), resume=True)
    pd.testing.assert_frame_equal(history(out), history(unbroken))
    assert result(out) == result(unbroken)
    best, expected = load_run(out), load_run(unbroken)
    assert best.epoch == expected.epoch
    users = np.array([0, 5])
    assert (best.model.scores(users) == expected.model.scores(users)).all()


def test_stopping_between_epochs_and_resuming(unbroken: Path, stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    train_run(config(out), resume=True)
    pd.testing.assert_frame_equal(history(out), history(unbroken))
    assert result(out) == result(unbroken)


def test_resuming_a_finished_run_changes_nothing(unbroken: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    again = train_run(config(unbroken), resume=True)
    assert again["epochs_run"] == EPOCHS
    assert {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()} == before


def test_a_checkpoint_without_its_row_is_set_aside(unbroken: Path, stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    path = out / "history.csv"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:-1]) + rows[-1][:20])  # the last row is cut short
    train_run(config(out), resume=True)
    pd.testing.assert_frame_equal(history(out), history(unbroken))


def test_files_of_a_run(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    assert names == {"config.yaml", "history.csv", "checkpoint", "result.json", "curves.png"}
    assert (unbroken / "curves.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads((unbroken / "result.json").read_text())
    assert content["mirror"] == {"alpha1": 1.0, "alpha2": 0.2, "interval": 3}
    assert content["data"] == {"name": "demo", "users": 600, "items": 400, "interactions": 8400}
    rows = pd.read_csv(unbroken / "history.csv")
    best = rows.loc[rows["valid_recall@5"].idxmax()]
    assert content["best_epoch"] == best["epoch"]
    assert content["test"]["ndcg@20"] == pytest.approx(best["test_ndcg@20"], abs=0)


def test_an_existing_run_is_not_overwritten(unbroken: Path) -> None:
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        train_run(config(unbroken))


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        train_run(config(tmp_path / "none"), resume=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"alpha2": 0.1}, ["alpha2"]),
        ({"training": "plain", "seed": 4}, ["training", "seed"]),
        ({"hyper_parameters": {**SMALL, "dropout": 0.5}}, ["dropout"]),
        ({"optimizer": "sgd", "learning_rate": 0.1}, ["optimizer", "learning_rate"]),
    ],
)
def test_another_configuration_is_refused(unbroken: Path, changes: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(UserError, match="was begun with other settings") as error:
        train_run(config(unbroken, **changes), resume=True)
    for key in keys:
        assert f"{key} was" in str(error.value)
