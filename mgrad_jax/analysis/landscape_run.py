"""The landscapes of several runs: what is asked of each, and the measurement of all of them, run by run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mgrad_jax.analysis.flatness import Flatness, flatness
from mgrad_jax.analysis.landscape import Surface, norm, objective, parameters, surface
from mgrad_jax.analysis.runs import each_run
from mgrad_jax.analysis.settings import LandscapeSettings
from mgrad_jax.deprecation import renamed
from mgrad_jax.training.numerics import as_configured
from mgrad_jax.training.run import LoadedRun

# Points side by side on a GPU; on a CPU that brings nothing.
_SIDE_BY_SIDE = 16


renamed(__name__, {"Asked": "LandscapeSettings"})


class Place(NamedTuple):
    """A point of training: its epoch, whether that is the best one, and the flatness there."""

    epoch: int
    is_best: bool
    flatness: Flatness


@dataclass(frozen=True)
class Landscape:
    """What the loss of one run looks like.

    Attributes:
        surface: around the best epoch's parameters.
        norm: of these.
        places: the best epoch and the kept ones that were measured, by epoch.
        stops_gradient: whether the gradient is not that of the loss's values, but of a surrogate.
    """

    surface: Surface
    norm: float
    places: tuple[Place, ...]
    stops_gradient: bool

    @property
    def best(self) -> Place:
        """The best epoch."""
        return next(place for place in self.places if place.is_best)


# By model, training and seed.
Landscapes = Mapping[str, Mapping[str, Mapping[int, Landscape]]]


def measure_landscapes(
    groups: Mapping[str, Mapping[str, Mapping[int, Path]]],
    asked: LandscapeSettings,
    *,
    data: str | None = None,
    progress: Callable[[Path], None] | None = None,
) -> tuple[Landscapes, str]:
    """Measure every run; returns also the dataset's name.

    Args:
        groups: run directories by model, training and seed, from `mgrad_jax.analysis.runs.group_runs`.
        asked: what is measured.
        data: where the runs' data lie now, if they were moved.
        progress: called with every run before it is measured.

    Raises:
        UserError: a run that cannot be read.
    """
    found: dict[str, dict[str, dict[int, Landscape]]] = {}
    name = ""
    for model, training, seed, run in each_run(groups, data, progress):
        name = run.data.name
        with as_configured(run.config):
            measured = measure(run, asked)
        found.setdefault(model, {}).setdefault(training, {})[seed] = measured
    return found, name


def measure(run: LoadedRun, asked: LandscapeSettings) -> Landscape:
    """The surface around a run's best parameters, and the flatness there and at its kept epochs.

    The run's model is left with the parameters of the last of these.
    """
    sample_key, direction_key, probe_key = jax.random.split(jax.random.key(asked.seed), 3)
    side_by_side = None if jax.default_backend() == "cpu" else _SIDE_BY_SIDE
    loss, fixed = objective(run.model, run.data, asked.sample, sample_key)

    def place(epoch: int) -> Place:
        numbers = flatness(
            loss,
            fixed,
            parameters(run.model),
            probe_key,
            scale_per=asked.scale_per,
            probes=asked.probes,
            batch_size=side_by_side,
        )
        return Place(epoch, epoch == run.epoch, numbers)

    params = parameters(run.model)
    around = surface(
        loss,
        fixed,
        params,
        direction_key,
        kind=asked.directions,
        points=asked.points,
        reach=asked.reach,
        batch_size=side_by_side,
    )
    places, size = [place(run.epoch)], norm(params)
    kept = run.kept
    for epoch in _spread([epoch for epoch in kept.epochs() if epoch != run.epoch], asked.kept_epochs):
        kept.load(epoch, run.model)
        places.append(place(epoch))
    places.sort(key=lambda place: place.epoch)
    return Landscape(around, size, tuple(places), run.model.stops_gradient)


def _spread(epochs: Sequence[int], most: int) -> list[int]:
    """At most so many of them, the first and the last among these."""
    if len(epochs) <= most:
        return list(epochs)
    return [epochs[i] for i in np.unique(np.round(np.linspace(0, len(epochs) - 1, most)).astype(int))]
