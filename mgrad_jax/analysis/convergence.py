"""How fast trainings converge: by epochs, by gradient evaluations, by seconds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mgrad_jax.analysis.statistics import Spread, spread
from mgrad_jax.training.config import RunConfig

Training = TypeVar("Training", bound=Hashable)

SHARE = 0.95  # of plain training's best validation metric: what a run is to reach


def gradient_evaluations(config: RunConfig, n_train: int, epochs: int) -> np.ndarray:
    """Gradient evaluations until the end of every epoch, (epochs,).

    What an epoch costs is the method's to say: with J batches J in plain training, J + ceil(J / interval) with mirror
    and replay, 2 J in the SAM family, and where SSAM-F renews its mask one more for every sample it looks at.

    >>> gradient_evaluations(RunConfig("vbpr", "demo", batch_size=100), 1000, 2).tolist()
    [14, 28]
    """
    return np.cumsum(config.method.gradient_evaluations(epochs, config.values, n_train), dtype=np.int64)


@dataclass(frozen=True)
class Curve:
    """One run's course, (epochs,) each: loss per batch, selection metric on validation, evaluations, seconds."""

    loss: np.ndarray
    valid: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True)
class Convergence:
    """What the seeds of one training needed.

    Attributes:
        runs: how many there are.
        reached: how many ever reach `SHARE` of plain training's best validation metric.
        evaluations, seconds: until they do, over those that do; None where none does.
        loss_evaluations, loss_seconds: until the largest training loss that every run gets down to.
        last_evaluations, last_loss: where training stopped.
    """

    runs: int
    reached: int
    evaluations: Spread | None
    seconds: Spread | None
    loss_evaluations: Spread
    loss_seconds: Spread
    last_evaluations: Spread
    last_loss: Spread


def curve(history: Sequence[Mapping[str, float]], evaluations: np.ndarray, metric: str, batches: int) -> Curve:
    """The course of a run from the rows of its `history.csv`; `metric` is what selects the best epoch."""
    columns = {name: np.array([row[name] for row in history]) for name in ("loss", f"valid_{metric}", "seconds_train")}
    seconds = np.cumsum(columns["seconds_train"])
    return Curve(columns["loss"] / batches, columns[f"valid_{metric}"], evaluations, seconds)


def convergence(curves: Mapping[Training, Sequence[Curve]], plain: Training | None) -> dict[Training, Convergence]:
    """What each training needed; the thresholds are common to all of them.

    Args:
        curves: the seeds of each training, by its name.
        plain: which one is plain training; without it nothing is reached.
    """
    goal = math.inf
    if plain is not None:
        goal = SHARE * float(np.mean([run.valid.max() for run in curves[plain]]))
    loss = max(run.loss.min() for runs in curves.values() for run in runs)
    return {name: _needed(runs, goal, float(loss)) for name, runs in curves.items()}


def _needed(runs: Sequence[Curve], goal: float, loss: float) -> Convergence:
    # The first epoch with True; those where there is one only.
    good = [(run, int(np.argmax(run.valid >= goal))) for run in runs if (run.valid >= goal).any()]
    low = [(run, int(np.argmax(run.loss <= loss))) for run in runs]
    return Convergence(
        runs=len(runs),
        reached=len(good),
        evaluations=spread([run.evaluations[epoch] for run, epoch in good]) if good else None,
        seconds=spread([run.seconds[epoch] for run, epoch in good]) if good else None,
        loss_evaluations=spread([run.evaluations[epoch] for run, epoch in low]),
        loss_seconds=spread([run.seconds[epoch] for run, epoch in low]),
        last_evaluations=spread([run.evaluations[-1] for run in runs]),
        last_loss=spread([run.loss[-1] for run in runs]),
    )
