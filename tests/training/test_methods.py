"""The table of training methods: what is registered is known everywhere, and nothing else has to be said about it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from mgrad_jax import mirror_gradient, optimizers
from mgrad_jax.analysis.convergence import gradient_evaluations
from mgrad_jax.analysis.study import Study
from mgrad_jax.cli import main
from mgrad_jax.cli.options import config_of
from mgrad_jax.data import demo_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.optimizers import make_optimizer, register_optimizer
from mgrad_jax.training import register_method
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import expand_grid, group_members
from mgrad_jax.training.identity import differences
from mgrad_jax.training.methods import METHODS, unused
from mgrad_jax.training.run import load_run, train_run
from mgrad_jax.training.sweep import sweep

DATA = demo_interactions(n_users=60, n_items=40)
SMALL: dict[str, Any] = {"batch_size": 240, "epochs": 1, "hyper_parameters": {"embedding_dim": 4}}


@pytest.fixture
def half() -> Iterator[None]:
    """A method of one's own: a mirror whose second factor is a share of the first."""

    @register_method(
        "half-mirror",
        words="half a mirror (alpha1 {alpha1:g})",
        evaluations=lambda epoch, run: run["batches"] + len(range(0, run["batches"], run["interval"])) + run["extra"],
    )
    def half_mirror(
        optimizer: optax.GradientTransformation, alpha1: Any, interval: int, share: float = 0.5, extra: int = 0
    ) -> optax.GradientTransformation:
        del extra
        return optax.chain(mirror_gradient(alpha1, alpha1 * share, interval), optimizer)

    yield
    del METHODS["half-mirror"]


def config(**changes: Any) -> RunConfig:
    return RunConfig("vbpr", "demo", **{"training": "half-mirror", **SMALL, **changes})


# --- a method of one's own --------------------------------------------------------------------------------------------


def test_a_registered_method_is_a_run_that_can_be_resumed(half: None, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    given = {"alpha1": 0.8, "interval": 2, "flat_minima_args": {"share": 0.25}, "out": out}
    result = train_run(config(**given))
    assert result["method"] == {"name": "half-mirror", "alpha1": 0.8, "interval": 2, "share": 0.25}
    assert (result["mirror"], result["replay"], result["flat_minima"]) == (None, None, None)
    further = train_run(
        config(**{**given, "alpha2": 9.0, "epochs": 2}), resume=True
    )  # without alpha2, it does not count
    assert further["epochs_run"] == 2
    assert load_run(out).config.training == "half-mirror"
    with pytest.raises(UserError, match=r"alpha1 was 0\.8 and is 0\.7"):
        train_run(config(**{**given, "alpha1": 0.7}), resume=True)


def test_it_trains_as_what_it_builds(half: None) -> None:
    own, built_in = config(alpha2=7.0), config(training="mirror", alpha2=0.5)
    (ours,), (theirs,) = sweep(DATA, [own]), sweep(DATA, [built_in])
    assert ours.losses == theirs.losses
    assert ours.valid == theirs.valid


def test_a_grid_knows_what_it_uses_and_traces_its_numbers(half: None) -> None:
    members = expand_grid(config(), {"training": ["half-mirror", "plain"], "alpha1": [0.5, 1.0], "interval": [3, 4]})
    assert [(m.training, m.alpha1, m.interval) for m in members] == [
        *(("half-mirror", alpha1, interval) for alpha1 in (0.5, 1.0) for interval in (3, 4)),
        ("plain", 1.0, 3),
    ]
    assert group_members(members) == [[0, 2], [1, 3], [4]]
    assert unused("half-mirror") == ("alpha2",)
    with pytest.raises(UserError, match="axis 'alpha2' has no effect in half-mirror training"):
        expand_grid(config(), {"alpha2": [0.1, 0.2]})


def test_it_describes_itself_and_is_counted(half: None) -> None:
    assert config(alpha1=0.5).summary == "vbpr with half a mirror (alpha1 0.5), adam, learning rate 0.001"
    given = config(interval=2, flat_minima_args={"extra": 10})
    assert gradient_evaluations(given, 700, 2).tolist() == [15, 30]  # three batches, two of them mirror batches
    study = Study("demo", ("vbpr",), "out", methods=("plain", "half-mirror"), intervals=(2, 4))
    assert [cell.interval for cell in study.cells() if cell.method == "half-mirror"] == [2, 4]


def test_its_arguments_are_checked_as_those_of_any_method(half: None) -> None:
    with pytest.raises(
        UserError, match=r"half-mirror has no argument 'shape'; choose among share, extra \(did you mean"
    ):
        config(flat_minima_args={"shape": 1})
    with pytest.raises(UserError, match=r"half-mirror does not take \{'share': -1.0\}"):
        config(flat_minima_args={"share": -1.0})
    with pytest.raises(UserError, match="alpha1 is 0; it must be a positive number"):
        config(alpha1=0)
    assert config(alpha2=0).alpha2 == 0  # without effect


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda optimizer: optimizer, 0.5),  # clipped before
        (lambda optimizer, max_norm: optimizer, 2.0),  # clips by itself, or does not
    ],
)
def test_the_gradient_is_clipped_before_a_method_that_does_not_clip(build: Any, expected: float) -> None:
    register_method("own")(build)
    try:
        tx = RunConfig(
            "vbpr", "demo", training="own", optimizer="sgd", learning_rate=1.0, max_norm=0.5
        ).transformation()
    finally:
        del METHODS["own"]
    step, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))
    np.testing.assert_allclose(step, [-expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "build", "part"),
    [
        ("mirror", lambda optimizer: optimizer, "There is a method 'mirror' already"),
        ("a/b", lambda optimizer: optimizer, "'a/b' is no name of a method"),
        ("", lambda optimizer: optimizer, "'' is no name of a method"),
        ("own", lambda: None, "must take the optimizer as its first argument"),
        ("own", lambda *, optimizer: optimizer, "must take the optimizer as its first argument"),
    ],
)
def test_what_cannot_be_registered(name: str, build: Any, part: str) -> None:
    known = dict(METHODS)
    with pytest.raises(ValueError, match=part):
        register_method(name)(build)
    assert known == METHODS


# --- an optimizer of one's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupled", [True, False])
def test_a_registered_optimizer_is_known_by_name(coupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "_COUPLED", dict(optimizers._COUPLED))
    monkeypatch.setattr(optimizers, "_OPTAX", dict(optimizers._OPTAX))

    @register_optimizer("gentle-sgd", coupled=coupled)
    def slow_sgd(learning_rate: Any, divisor: float = 2.0) -> optax.GradientTransformation:
        return optax.sgd(learning_rate / divisor)

    run = config(training="plain", optimizer="gentle-sgd", learning_rate=1.0, optimizer_args={"divisor": 4.0})
    tx = run.transformation()
    step, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))
    np.testing.assert_allclose(step, [-0.25])
    with pytest.raises(UserError, match="gentle-sgd has no argument 'devisor'; choose among divisor"):
        config(training="plain", optimizer="gentle-sgd", optimizer_args={"devisor": 2.0})
    with pytest.raises(ValueError, match="There is an optimizer 'gentle-sgd' already"):
        register_optimizer("gentle-sgd")
    if coupled:
        tx = make_optimizer("gentle-sgd", 1.0, weight_decay=0.5)
        step, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))
        np.testing.assert_allclose(step, [-0.75])
    else:
        with pytest.raises(UserError, match="gentle-sgd has no weight decay"):
            make_optimizer("gentle-sgd", 1.0, weight_decay=0.5)


# --- the table and the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "mirror"),
        ({"method": "plain"}, "plain"),
        ({"method": "plain", "mirror": False}, "plain"),
        ({"method": "replay", "replay": True}, "replay"),
        ({"method": "sam", "flat_minima": "sam"}, "sam"),
        ({"flat_minima": "mirror"}, "mirror"),
        *(({"method": name}, name) for name in METHODS),
    ],
)
def test_a_method_by_its_name_and_by_its_aliases(options: dict[str, Any], method: str) -> None:
    given = {"model": "vbpr", "data": "demo", **options, "training": options.get("method")}
    assert config_of(given).training == method


@pytest.mark.parametrize("command", ["train", "sweep", "compare"])
def test_help_names_every_method(
    command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    assert main([command, "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert all(name in shown for name in METHODS)


def test_a_method_and_its_argument_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        "train",
        "--model",
        "vbpr",
        "--data",
        "demo",
        "--epochs",
        "1",
        "--set",
        "embedding_dim=4",
        "--out",
        str(out),
    ]
    assert main([*command, "--method", "sam", "--method-arg", "rho=0.1", "--dry-run"]) == 0
    assert not out.exists()
    assert main([*command, "--method", "sam", "--method-arg", "rho=0.1"]) == 0
    assert json.loads((out / "result.json").read_text())["method"] == {"name": "sam", "rho": 0.1}
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert (written["training"], written["flat_minima_args"]) == ("sam", {"rho": 0.1})


def test_a_run_of_a_method_that_is_not_registered_any_more_is_refused(half: None, tmp_path: Path) -> None:
    train_run(config(out=str(tmp_path / "run")))
    method = METHODS.pop("half-mirror")
    try:
        with pytest.raises(UserError, match="unknown training 'half-mirror'; choose one of mirror,"):
            load_run(tmp_path / "run")
        assert unused("half-mirror") == ()
    finally:
        METHODS["half-mirror"] = method


def test_what_a_method_does_not_use_tells_no_runs_apart() -> None:
    for method in METHODS.values():
        one, two = (RunConfig("vbpr", "demo", training=method.name, alpha1=a).to_dict() for a in (0.9, 0.8))
        assert (differences(one, two) == "") == ("alpha1" not in method.uses)


def test_the_package_names_its_function_fit_and_not_its_file() -> None:
    program = (
        "import sys, mgrad_jax.training as t; assert 'jax' not in sys.modules; import mgrad_jax.training.fit; "
        "from mgrad_jax.training import FitResult, fit; assert fit is t.fit is mgrad_jax.training.fit and callable(fit)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
