"""The precision of dense products and deterministic operations: what is recorded, traced and asked of XLA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml

from mgrad_jax.data import demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training import FitResult, numerics
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import group_members
from mgrad_jax.training.identity import differences, identity, run_settings
from mgrad_jax.training.numerics import as_configured, make_deterministic
from mgrad_jax.training.record import result_record
from mgrad_jax.training.settings import MATMUL_PRECISIONS

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


def test_the_command_line_sets_the_flag_before_jax_computes_and_records_both() -> None:
    """XLA reads its flags once, when JAX first computes."""
    program = (
        "import os; from mgrad_jax.cli.options import config_of\n"
        "options = {'model': 'vbpr', 'data': 'demo', 'deterministic': True, 'matmul_precision': 'high'}\n"
        "config = config_of(options)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
        "print(os.environ['XLA_FLAGS'], config.to_dict())"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(FLAG)
    assert "'matmul_precision': 'high', 'deterministic': True" in done.stdout


def test_the_result_says_how_it_was_computed() -> None:
    config = RunConfig("vbpr", "demo", matmul_precision="high", deterministic=True)
    data = demo_interactions()
    record = result_record(config, data, identity(run_settings(config, data)), FitResult(1, 1, {}, {}), {})
    assert (record["matmul_precision"], record["deterministic"]) == ("high", True)


def test_a_run_from_before_the_settings_existed_is_the_same_run() -> None:
    settings = run_settings(RunConfig("vbpr", "demo"), demo_interactions())
    old = {name: value for name, value in settings.items() if name not in ("matmul_precision", "deterministic")}
    assert differences(old, settings) == ""
    changed = differences(old, {**settings, "matmul_precision": "default"})
    assert changed == "matmul_precision was 'highest' and is 'default'"


def test_a_sweep_begun_before_the_settings_existed_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mgrad_jax.training import sweep_run

    def trained(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt  # the settings were accepted

    monkeypatch.setattr(sweep_run, "sweep", trained)

    def begin(precision: str, resume: bool) -> None:
        config = RunConfig("vbpr", "demo", matmul_precision=precision)
        sweep_run.train_sweep(sweep_run.SweepConfig(config, out=str(tmp_path)), resume=resume)

    with pytest.raises(sweep_run.SweepInterrupted):
        begin("highest", resume=False)
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    old = {name: value for name, value in settings.items() if name not in ("matmul_precision", "deterministic")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(UserError, match=r"matmul_precision was '?highest'? and is '?default'?"):
        begin("default", resume=True)
    with pytest.raises(sweep_run.SweepInterrupted):
        begin("highest", resume=True)


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
