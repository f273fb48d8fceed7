"""The built wheel works in an empty environment, away from the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without_links(tmp_path: Path) -> Path:
    """A checkout by a Git that knows no symbolic links: the link is a file with its target in it."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "models")
    shutil.copytree(ROOT / "mgrad_jax", checkout / "mgrad_jax", ignore=ignored)
    shutil.copytree(ROOT / "models", checkout / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "mgrad_jax" / "models").write_text("../models")
    return checkout


def test_a_checkout_without_links_makes_the_same_wheel(without_links: Path, tmp_path: Path) -> None:
    names = []
    for root in (ROOT, without_links):
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / root.name)]
        subprocess.run([*command, str(root)], check=True, capture_output=True)
        (wheel,) = (tmp_path / root.name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names.append(archive.namelist())
    assert names[0] == names[1]
    assert {"mgrad_jax/models/__init__.py", "mgrad_jax/models/vbpr.py"} <= set(names[1])
    assert not [name for name in names[1] if name.startswith("models")]


def test_an_editable_installation_without_links_is_refused_in_one_sentence(without_links: Path) -> None:
    program = "import sys, hatchling.build; print(hatchling.build.build_editable(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(without_links / "dist")]
    refused = subprocess.run(command, cwd=without_links, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "is not a link to the folder models" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    (without_links / "mgrad_jax" / "models").unlink()
    (without_links / "mgrad_jax" / "models").symlink_to("../models")
    # What follows needs the package editables, which need not be here.
    allowed = subprocess.run(command, cwd=without_links, capture_output=True, text=True)
    assert "is not a link to the folder models" not in allowed.stderr


@pytest.mark.slow
def test_wheel_installs_and_trains_from_another_folder(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", str(wheel)], check=True)

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
