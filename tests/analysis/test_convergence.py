"""Gradient evaluations against what a training really does, and what runs of unequal length needed."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.analysis.convergence import Curve, convergence, curve, gradient_evaluations
from mgrad_jax.mirror import pass_schedule
from mgrad_jax.training.config import RunConfig


def config(**settings: object) -> RunConfig:
    return RunConfig("vbpr", "demo", batch_size=100, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", ["plain", "mirror", "replay"])
@pytest.mark.parametrize("interval", [1, 3, 7])
def test_an_epoch_costs_the_passes_of_its_schedule(training: str, interval: int) -> None:
    given = config(training=training, interval=interval)
    state = given.transformation().init(jnp.zeros(2))
    passes = len(pass_schedule(state, math.ceil(1050 / 100)))
    assert gradient_evaluations(given, 1050, 3).tolist() == [passes, 2 * passes, 3 * passes]


@pytest.mark.parametrize(
    ("training", "arguments"),
    [("sam", {}), ("ssam-d", {}), ("ssam-f", {"refresh_epochs": 2, "fisher_samples": 5})],
)
def test_the_sam_family_is_counted_as_it_calls(training: str, arguments: dict[str, int]) -> None:
    given = config(training=training, flat_minima_args=arguments, epochs=3)
    batches, n_samples, counted = 3, 250 // 100 * 100, []
    tx = given.transformation(type("Data", (), {"train": np.zeros((250, 2))}))
    params = jnp.ones(4)
    state, count = tx.init(params), [0]

    def one(p: jax.Array, index: object) -> jax.Array:
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return p * 0.1

    update = jax.jit(lambda s, p: tx.update(one(p, 0), s, p, grad_fn=one, sample_grad_fn=one, n_samples=n_samples))
    for _ in range(3):
        for _ in range(batches):
            _, state = update(state, params)
        jax.effects_barrier()
        counted.append(count[0])
    assert gradient_evaluations(given, 250, 3).tolist() == counted


def made(loss: list[float], valid: list[float], cost: int) -> Curve:
    epochs = np.arange(1, len(loss) + 1)
    return Curve(np.array(loss), np.array(valid), cost * epochs, 0.5 * epochs)


def test_runs_of_unequal_length_and_runs_that_never_get_there() -> None:
    plain = [made([3, 2, 1], [0.1, 0.2, 0.2], 10), made([3, 2], [0.1, 0.2], 10)]
    mirror = [made([3, 2.5, 2, 1.5], [0.1, 0.15, 0.19, 0.2], 14), made([3, 1.5], [0.1, 0.18], 14)]
    found = convergence({"plain": plain, "mirror": mirror}, "plain")
    # 95% of 0.2 is 0.19; the second mirrored run ends at 0.18 and is counted, not dropped.
    assert (found["plain"].reached, found["plain"].runs) == (2, 2)
    assert (found["mirror"].reached, found["mirror"].runs) == (1, 2)
    assert found["plain"].evaluations.mean == 20
    assert (found["mirror"].evaluations.mean, found["mirror"].seconds.mean) == (42, 1.5)
    # The largest loss that all get down to is 2, of the second plain run.
    assert found["mirror"].loss_evaluations.mean == (42 + 28) / 2
    assert found["mirror"].last_evaluations.mean == (56 + 28) / 2
    assert found["plain"].last_loss.mean == 1.5
    without = convergence({"mirror": mirror}, None)["mirror"]
    assert (without.reached, without.evaluations) == (0, None)


def test_a_course_is_read_from_the_history() -> None:
    rows = [
        {"loss": 8.0, "valid_recall@5": 0.1, "seconds_train": 2.0},
        {"loss": 4.0, "valid_recall@5": 0.2, "seconds_train": 1.0},
    ]
    found = curve(rows, np.array([5, 10]), "recall@5", 4)
    assert found.loss.tolist() == [2.0, 1.0]
    assert found.valid.tolist() == [0.1, 0.2]
    assert found.seconds.tolist() == [2.0, 3.0]
