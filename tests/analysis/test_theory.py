"""`mgrad-jax theory`: known answers, a model's numbers, files and bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgrad_jax.analysis import theory
from mgrad_jax.cli import main

A = np.array([[3.0, 1.0], [1.0, 2.0]])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# --- Theorem 3.2 ------------------------------------------------------------------------------------------------------


def test_a_quadratic_loss_leaves_no_residual_but_rounding(x64: None) -> None:
    found = theory.theorem_residual(lambda p: jnp.asarray(A) @ p, jnp.array([1.0, -2.0]))
    assert found.slope is None
    assert (found.residuals < 1e-14 * found.steps).all()


def test_a_cubic_loss_leaves_what_the_theorem_says(x64: None) -> None:
    """L = theta^3: g = 3 theta^2 and T[g, g] = 6 g^2, with nothing of higher order."""
    theta, alpha1, alpha2 = 0.7, 0.9, 0.3
    found = theory.theorem_residual(lambda p: 3 * p**2, jnp.array([theta]), alpha1, alpha2)
    expected = 0.5 * alpha1**2 * alpha2 * 6 * (3 * theta**2) ** 2
    np.testing.assert_allclose(found.residuals / found.steps**3, expected, rtol=1e-7)
    assert found.coefficient == pytest.approx(expected, rel=1e-7)
    assert found.slope == pytest.approx(3.0, abs=1e-7)
    np.testing.assert_allclose(found.steps[1:], 2 * found.steps[:-1])


def test_what_is_no_gradient_is_expanded_by_its_own_jacobian(x64: None) -> None:
    """As where a loss stops gradients: the Jacobian is not symmetric, and no Hessian product would do."""
    found = theory.theorem_residual(lambda p: jnp.stack([p[1] ** 2 + p[0], jnp.sin(p[0])]), jnp.array([0.4, 1.3]))
    assert found.slope == pytest.approx(3.0, abs=0.05)


def test_a_gradient_of_zero_has_no_slope(x64: None) -> None:
    found = theory.theorem_residual(lambda p: 0 * p, jnp.array([1.0]))
    assert found.slope is None
    assert (found.residuals == 0).all()


def test_the_penaltys_weight_is_the_formula() -> None:
    g, p = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(2.0)}, {"a": jnp.array([1.0, 0.5]), "b": jnp.array(10.0)}
    weight = theory.penalty_weight(2.0, g, p, 0.1, 1.0, 0.2)
    assert weight == pytest.approx(0.1 * 0.2 * (9 + 8 + 40) / (2 * 0.8 * 2.0), rel=1e-6)
    assert theory.penalty_weight(2.0, g, p, 0.1, 0.2, 0.2) is None


def test_the_second_moment_is_adams() -> None:
    gradients = [jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0]), jnp.array([-1.0, 0.0])]
    state = optax.scale_by_adam().init(gradients[0])
    for g in gradients:
        _, state = optax.scale_by_adam().update(g, state)
    np.testing.assert_allclose(theory.second_moment(gradients), state.nu / (1 - 0.999**3), rtol=1e-4)


# --- half-steps -------------------------------------------------------------------------------------------------------


def constant(params: Any) -> Any:
    return jnp.asarray([1.0, -3.0], params.dtype)


def of(optimizer: optax.GradientTransformation, gradient: Any, alpha2: float = 0.2, **options: Any) -> theory.HalfSteps:
    params = jnp.array([1.0, -2.0])
    return theory.half_steps(optimizer, gradient, params, optimizer.init(params), 1.0, alpha2, **options)


def test_gradient_descent_goes_back_by_the_ratio_of_the_factors_to_first_order(x64: None) -> None:
    def error(rate: float) -> float:
        return abs(of(optax.sgd(rate), lambda p: jnp.asarray(A) @ p).projection + 0.2)

    assert error(1e-3) < 1e-3
    assert error(1e-4) == pytest.approx(error(1e-3) / 10, rel=1e-2)
    steps = of(optax.sgd(1e-4), lambda p: jnp.asarray(A) @ p)
    assert (steps.cosine, steps.downhill) == (pytest.approx(-1, abs=1e-6), pytest.approx(-1, abs=1e-6))
    assert steps.length == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("alpha2", [0.2, 0.95])
def test_adam_from_zero_state_goes_on_by_its_closed_form(alpha2: float, x64: None) -> None:
    """m2 = (1 - b1)(b1 alpha1 - alpha2) g, v2 = (1 - b2)(b2 alpha1^2 + alpha2^2) g^2, with their bias corrected."""
    b1, b2 = 0.9, 0.999
    found = of(optax.adam(1e-3), constant, alpha2)
    expected = (b1 - alpha2) / (1 + b1) / np.sqrt((b2 + alpha2**2) / (1 + b2))
    assert found.projection == pytest.approx(expected, rel=1e-6)
    assert found.downhill * np.sign(b1 - alpha2) > 0.8


def test_adam_with_running_momentum_goes_along_its_first_half_step_and_with_ascent_back() -> None:
    batches = [None] * 30
    for ascent, least, most in ((False, 0.8, 1.0), (True, -0.21, -0.19)):
        params, state = theory.warmed_up(
            optax.adam(1e-3), lambda p, _: constant(p), jnp.zeros(2), batches, ascent=ascent
        )
        found = theory.half_steps(optax.adam(1e-3), constant, params, state, ascent=ascent)
        assert least < found.projection < most


# --- the command ------------------------------------------------------------------------------------------------------


SMALL = ("--warm-up", "2", "--batch-size", "256")


@pytest.fixture(scope="module")
def run(study: Path) -> Path:
    return study / "runs" / "vbpr-mirror-adam-i3-s999"


@pytest.fixture(scope="module")
def measured(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("theory") / "run"
    assert main(["theory", str(run), "--optimizers", "sgd,adam,lion", *SMALL, "--out", str(out)]) == 0
    return out


def test_the_theorem_holds_for_a_run_and_is_written_down(measured: Path) -> None:
    result = json.loads((measured / "result.json").read_text(encoding="utf-8"))
    assert 2.9 <= result["residual"]["slope"]["vbpr"] <= 3.1
    assert jnp.zeros(1).dtype == jnp.float32  # float64 was the command's own
    points = read(measured / "residual.csv")
    assert len(points) == theory.N_STEPS
    assert list(points[0]) == ["model", "method", "seed", "learning_rate", "residual", "rounding"]
    for name in ("residual.png", "penalty.png", "half-steps.png", "table.tex"):
        assert (measured / name).stat().st_size > 500


def test_a_runs_penalty_is_weighed_along_its_kept_epochs(measured: Path, run: Path) -> None:
    rows = read(measured / "penalty.csv")
    best = json.loads((run / "result.json").read_text(encoding="utf-8"))["best_epoch"]
    assert [int(row["epoch"]) for row in rows] == [1, 2, best]
    assert {row["seed"] for row in rows} == {"999"}
    assert all(float(row["weight_adam"]) > 10 * float(row["weight_gradient_descent"]) > 0 for row in rows)


def test_the_half_steps_of_every_optimizer_are_told_apart(measured: Path) -> None:
    rows = {
        (row["optimizer"], row["second_half-step"], row["state"]): float(row["projection"])
        for row in read(measured / "half-steps.csv")
    }
    assert {key[:2] for key in rows} == {("sgd", "own"), ("adam", "own"), ("adam", "ascent"), ("lion", "own")}
    assert rows["sgd", "own", "zero"] == pytest.approx(-0.2, abs=0.01)
    assert rows["adam", "own", "running"] > 0.4
    assert rows["adam", "ascent", "running"] < -0.05


@pytest.mark.slow
def test_the_theorem_holds_for_models_trained_here(tmp_path: Path) -> None:
    words = ["theory", "--model", "vbpr,freedom", "--data", "demo", "--epochs", "1", "--set", "embedding_dim=8"]
    assert main([*words, *SMALL, "--optimizers", "sgd", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["residual"]["slope"].keys() == {"vbpr", "freedom"}
    assert all(2.9 <= slope <= 3.1 for slope in result["residual"]["slope"].values())
    assert [row["epoch"] for row in read(tmp_path / "out" / "penalty.csv")] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give either directories of runs or --model with --data"),
        (["RUN", "--model", "vbpr", "--data", "demo"], "give either directories of runs or --model"),
        (["--model", "vbpr"], "--model needs --data"),
        (["RUN", "--set", "embedding_dim=8"], "--set is for --model"),
        (["--model", "vbpr", "--data", "demo", "--alpha2", "1"], "the theorem wants 0 < alpha2 < alpha1"),
        (["--model", "vbpr", "--data", "demo", "--warm-up", "0"], "--warm-up is 0; it must be at least 1"),
        (["--model", "vbpr", "--data", "demo", "--learning-rate", "-1"], "it must be a positive number"),
        (["--model", "vbpr", "--data", "demo", "--optimizers", "adan"], "unknown optimizer 'adan'"),
        (["--model", "vbbr", "--data", "demo"], "vbbr"),
        (["--model", "vbpr,vbpr", "--data", "demo"], "--model names one of vbpr, vbpr twice"),
        (["--model", "vbpr", "--data", "nowhere"], "nowhere"),
        (["--model", "vbpr", "--data", "demo", "--metrics", "recall"], "is no metric"),
        (["--model", "lightgcn", "--data", "demo", "--inputs"], "lightgcn reads no features in training"),
        (["nowhere"], "nowhere holds no run"),
    ],
)
def test_bad_input_gets_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["theory", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error) < 500
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_there_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["theory", "--model", "vbpr", "--data", "demo", "--out", str(tmp_path)]) == 2
    assert "exists already; choose another --out" in capsys.readouterr().err
