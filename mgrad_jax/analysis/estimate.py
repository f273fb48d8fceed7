"""How long a study will take: two epochs of plain training are timed, and the rest is reckoned from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from mgrad_jax.analysis.convergence import gradient_evaluations
from mgrad_jax.analysis.study import Cell, Study, check_models, is_finished
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.fit import fit


class Estimate(NamedTuple):
    """Seconds a cell's runs will take.

    Attributes:
        cell: which.
        runs: how many there are to train, finished ones left out.
        compilation: of one run, where nothing is in the cache.
        epoch: of training and evaluating once.
        evaluation: of the latter alone.
        least, most: of all the runs: patience + 1 epochs each, and all the epochs that are allowed.
    """

    cell: Cell
    runs: int
    compilation: float
    epoch: float
    least: float
    most: float
    evaluation: float


def estimate(study: Study) -> Iterator[Estimate]:
    """Time two epochs of plain training of every model and optimizer, in memory, and reckon the rest from them.

    Raises:
        UserError: data that cannot be loaded or trained on.
    """
    data = load_interactions(study.data)
    check_models(study.configs().values(), data)
    measured: dict[tuple[str, str], tuple[float, float, float]] = {}
    for cell in study.cells():
        key = cell.model, cell.optimizer
        if key not in measured:
            measured[key] = _measure(study.config(cell._replace(method="plain", interval=None), study.seeds[0]), data)
        compilation, gradient, evaluation = measured[key]
        configs = [config for key, config in study.configs().items() if key.cell == cell]
        runs = sum(not is_finished(config.directory) for config in configs)
        epoch = float(gradient_evaluations(configs[0], len(data.train), 1)[0]) * gradient + evaluation
        patience, epochs = configs[0].patience, configs[0].epochs
        least, most = (runs * (compilation + n * epoch) for n in (min(patience + 1, epochs), epochs))
        yield Estimate(cell, runs, compilation, epoch, least, most, evaluation)


def _measure(config: RunConfig, data: Interactions) -> tuple[float, float, float]:
    """Seconds of compilation, of one gradient evaluation with its update, and of one evaluation of the metrics."""
    timed = fit(
        config.create_model(data),
        data,
        config.transformation(data),
        epochs=2,
        seed=config.seed,
        batch_size=config.batch_size,
        metric=config.metric,
        ks=config.ks,
    )
    batches = math.ceil(len(data.train) / config.batch_size)
    warm = timed.history[-1]
    return timed.seconds["compile"], warm.seconds_train / batches, warm.seconds_evaluate
