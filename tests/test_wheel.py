"""The built wheel works in an empty environment, away from the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_installs_and_trains_from_another_folder(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], check=True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    train = [python.with_name("mgrad-jax"), "train", "--model", "freedom", "--data", "demo", "--epochs", "2"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([*map(str, train), "--out", "run"], check=True, cwd=elsewhere, env=environment)

    result = json.loads((elsewhere / "run" / "result.json").read_text())
    assert result["model"] == "freedom"
    assert result["epochs_run"] == 2
    where = "import mgrad_jax, mgrad_jax.models as m; print(mgrad_jax.__file__, m.__file__)"
    shown = subprocess.run([str(python), "-c", where], check=True, cwd=elsewhere, env=environment, capture_output=True)
    assert shown.stdout.decode().count(str(tmp_path / "venv")) == 2
