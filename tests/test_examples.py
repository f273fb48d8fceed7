"""Every example runs as a script and prints a result."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mgrad_jax import second_pass_pending

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


SLOW = ("train_freedom", "scan_and_vmap")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_example_runs(path, capsys, monkeypatch):
    if path.stem == "equinox_mlp":
        pytest.importorskip("equinox")  # the extra `test` installs it
    monkeypatch.setattr(sys, "argv", [str(path)])  # without those of pytest
    with jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    numbers = re.findall(r"\d+\.\d+", printed)
    assert numbers, printed
    assert "nan" not in printed.lower()


def test_there_are_examples():
    loops = {"plain_optax", "flax_nnx", "flax_linen", "equinox_mlp", "own_loop", "scan_and_vmap"}
    assert loops <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_under_sixty_lines(path):
    assert len(path.read_text().splitlines()) < 60


def test_loops_of_the_readme_run_and_train():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Mirror Gradient for any Optax optimizer")[1].split("\n## ")[0]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, names)
        assert names["loss_fn"](names["params"], jnp.eye(2)) < 1.0
        assert not second_pass_pending(names["opt_state"])
