"""The precision of dense products and deterministic operations: what is recorded, traced and asked of XLA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml

from mgrad_jax.errors import UserError
from mgrad_jax.training import numerics
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import group_members
from mgrad_jax.training.numerics import MATMUL_PRECISIONS, as_configured, make_deterministic

FLAG = "--xla_gpu_deterministic_ops=true"


@pytest.mark.parametrize("precision", MATMUL_PRECISIONS)
def test_products_are_traced_at_the_precision_of_the_run_and_only_there(precision: str) -> None:
    def equation() -> str:
        return str(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))))

    outside = equation()
    with as_configured(RunConfig("vbpr", "demo", matmul_precision=precision)):
        inside = equation()
    assert f"Precision.{precision.upper()}" in inside
    assert equation() == outside
    assert "HIGHEST" not in outside


def test_runs_of_different_precision_share_no_program() -> None:
    members = [RunConfig("vbpr", "demo", matmul_precision=p, seed=seed) for p in ("high", "highest") for seed in (1, 2)]
    assert group_members(members) == [[0, 1], [2, 3]]


def test_an_unknown_precision_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown matmul precision 'tf32'; choose one of default, high, highest"):
        RunConfig("vbpr", "demo", matmul_precision="tf32")


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, FLAG), ("--xla_dump_to=x", f"--xla_dump_to=x {FLAG}"), (f"{FLAG} --a", f"{FLAG} --a")],
)
def test_the_flag_joins_those_that_are_there(before: str | None, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    make_deterministic()
    assert os.environ["XLA_FLAGS"] == after


def test_a_process_that_cannot_be_deterministic_any_more_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig("vbpr", "demo", deterministic=True)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with as_configured(config):  # a CPU needs no flag
        pass
    monkeypatch.setattr(numerics.jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=f"set the environment variable XLA_FLAGS={FLAG}"), as_configured(config):
        pass
    monkeypatch.setenv("XLA_FLAGS", FLAG)
    with as_configured(config):
        pass


def test_the_command_line_sets_the_flag_in_time_and_records_both(tmp_path: Path) -> None:
    """XLA reads its flags once, when JAX first computes."""
    out = tmp_path / "run"
    options = ["--model", "vbpr", "--data", "demo", "--no-mirror", "--epochs", "1", "--set", "embedding_dim=4"]
    program = (
        "import os, sys; from jax._src import xla_bridge; from mgrad_jax.cli import options\n"
        "make = options.TrainingOptions.config\n"
        "def config(self, out):\n"
        "    assert not xla_bridge._backends\n"
        "    made = make(self, out)\n"
        f"    assert {FLAG!r} in os.environ['XLA_FLAGS'].split()\n"
        "    return made\n"
        "options.TrainingOptions.config = config\n"
        "from mgrad_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["train", *options, "--deterministic", "--matmul-precision", "high", "--out", str(out)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"matmul_precision": "high", "deterministic": True}
    for found in (yaml.safe_load((out / "config.yaml").read_text()), json.loads((out / "result.json").read_text())):
        assert {name: found[name] for name in expected} == expected


def test_a_run_is_traced_at_its_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mgrad_jax.training import run

    seen: list[Any] = []

    def fit(*arguments: Any, **options: Any) -> None:
        del arguments, options
        seen.append(jax.config.jax_default_matmul_precision)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fit", fit)
    for precision in ("highest", "default"):
        config = RunConfig("vbpr", "demo", matmul_precision=precision, out=str(tmp_path / precision))
        with pytest.raises(run.RunInterrupted):
            run.train_run(config)
    assert seen == ["highest", "default"]
