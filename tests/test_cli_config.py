"""`train --config FILE`: what a run wrote trains the same run again, and options override it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import assert_one_sentence

from mgrad_jax.cli import main
from mgrad_jax.cli import train as command
from mgrad_jax.training import run
from mgrad_jax.training.config import RunConfig

CONFIG = RunConfig(
    "vbpr",
    "demo",
    training="ssam-f",
    flat_minima_args={"sparsity": 0.5},
    optimizer="sgd",
    optimizer_args={"momentum": 0.9, "nesterov": True},
    adversarial={"epsilon": 0.1, "weight": 1e-7},
    learning_rate=1 / 3,
    learning_rate_decay=(0.96, 50.0),
    hyper_parameters={"embedding_dim": 8, "reg_weight": 1e-5},
    max_norm=2.0,
    seed=4,
    evaluate="stale",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG.to_dict(), "data_digest": "0"}))
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that `train` would have trained."""
    found: list[RunConfig] = []
    monkeypatch.setattr(run, "train_run", lambda config, **_: found.append(config))
    monkeypatch.setattr(command, "_print_result", lambda result, directory: None)
    return found


def settings(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "out"}


def test_a_file_trains_the_run_that_wrote_it(file: Path, trained: list[RunConfig]) -> None:
    assert main(["train", "--config", str(file)]) == 0
    assert settings(trained[0]) == settings(CONFIG)
    assert trained[0].out is None  # another run has its own place


def test_options_override_the_file(file: Path, trained: list[RunConfig]) -> None:
    words = ["--config", str(file), "--seed=9", "--set", "reg_weight=0.5", "--learning-rate-decay", "1", "9"]
    assert main(["train", *words]) == 0
    changed = {"seed": 9, "learning_rate_decay": [1.0, 9.0]}
    hyper = {**settings(CONFIG)["hyper_parameters"], "reg_weight": 0.5}
    assert settings(trained[0]) == {**settings(CONFIG), **changed, "hyper_parameters": hyper}


@pytest.mark.parametrize("words", [["--no-mirror"], ["--method", "plain"]])
def test_another_method_takes_no_arguments_of_the_files(file: Path, trained: list[RunConfig], words: list[str]) -> None:
    assert main(["train", "--config", str(file), *words]) == 0
    assert settings(trained[0]) == {**settings(CONFIG), "training": "plain", "flat_minima_args": {}}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "does not exist; give the config.yaml of a run"),
        ("{a: [", "is no run's configuration"),
        ("3", "is no run's configuration"),
        (
            "model: vbpr\ndata: demo\nsede: 3\n",
            "has the setting 'sede', of which there is no option (did you mean seed?)",
        ),
        ("model: vbpr\ndata: demo\nhyper_parameters: 3\n", "it must be a table of names and values"),
        ("model: vbpr\ndata: demo\nalpha1: high\n", "alpha1"),
        ("model: vbpr\ndata: demo\nks: [7]\n", "has the setting 'ks', of which there is no option"),
    ],
)
def test_a_file_that_is_no_configuration(
    content: str | None, part: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.yaml"
    if content is not None:
        path.write_text(content)
    assert_one_sentence(main(["train", "--config", str(path)]), capfd.readouterr(), part)


def test_a_dry_run_shows_the_file_with_its_overrides(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(file), "--seed", "77", "--dry-run"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "77" in shown
    assert "0.3333333333333333" in shown
