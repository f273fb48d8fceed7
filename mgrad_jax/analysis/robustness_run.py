"""Which changes are made to which runs, and the measurement of all of them, run by run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mgrad_jax.analysis.baselines import popularity
from mgrad_jax.analysis.perturb import FeatureChange, item_tables
from mgrad_jax.analysis.robustness import Measured, Response, changed_features, check_features, table_noise
from mgrad_jax.analysis.runs import each_run
from mgrad_jax.analysis.settings import ADJUSTMENT_DRAWS, NOISE_DRAWS, RobustnessSettings
from mgrad_jax.data import Interactions
from mgrad_jax.data.features import MODALITIES, read_features
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.metrics import METRICS
from mgrad_jax.evaluation.ranking import make_eval_split, metrics_of_scores
from mgrad_jax.training.numerics import as_configured
from mgrad_jax.training.run import LoadedRun, load_run

NOISE = "table noise"


class Change(NamedTuple):
    """One kind of change.

    Attributes:
        name: `NOISE`, or the adjustment's.
        places: scales or shares, ascending, the first 0.
        draws: at every place.
        check: raises a `UserError` where a run's model does not know such a change.
        measure: what the metrics of a run become.
    """

    name: str
    places: tuple[float, ...]
    draws: int
    check: Callable[[LoadedRun], None]
    measure: Callable[[LoadedRun, Measured], Response]


class Experiment(NamedTuple):
    """A change and what it did, by model, training and seed."""

    name: str
    places: tuple[float, ...]
    draws: int
    responses: Mapping[str, Mapping[str, Mapping[int, Response]]]

    @property
    def x(self) -> np.ndarray:
        """Over what areas are taken: log(1 + scale), or the share."""
        places = np.asarray(self.places)
        return np.log1p(places) if self.name == NOISE else places


def noise_change(
    scales: Sequence[float], draws: int, *, per: str = "table", at: str = "table", tables: Sequence[str] = ()
) -> Change:
    """Noise in item tables; see `mgrad_jax.analysis.robustness.table_noise`."""

    def check(run: LoadedRun) -> None:
        if at == "table":
            item_tables(run.model, tables)

    def measure(run: LoadedRun, what: Measured) -> Response:
        return table_noise(run, places, what, per=per, at=at, tables=tables)

    places = _with_zero(scales)
    return Change(NOISE, places, draws, check, measure)


def feature_change(
    change: FeatureChange,
    shares: Sequence[float],
    draws: int,
    *,
    other: Mapping[str, np.ndarray] | None = None,
    rebuild: bool = False,
) -> Change:
    """Other features of some items; see `mgrad_jax.analysis.robustness.changed_features`."""

    def check(run: LoadedRun) -> None:
        check_features(run, change, rebuild)

    def measure(run: LoadedRun, what: Measured) -> Response:
        return changed_features(run, places, what, change, other, rebuild=rebuild)

    places = _with_zero(shares)
    return Change(change.kind, places, draws, check, measure)


def changes_of(settings: RobustnessSettings, data: Interactions) -> list[Change]:
    """The changes asked for; a user's own features are read here, to take the place of the data's."""
    found = []
    if settings.adds_noise:
        draws = settings.draws or NOISE_DRAWS
        found.append(noise_change(settings.scales, draws, per=settings.per, at=settings.at, tables=settings.tables))
    modalities, draws = modalities_of(settings.modality), settings.draws or ADJUSTMENT_DRAWS
    for kind in settings.kinds:
        change = FeatureChange(kind, modalities, settings.mix, settings.feature_noise)
        found.append(feature_change(change, settings.shares, draws, rebuild=settings.rebuild))
    if settings.directory is not None:
        other = other_features(settings.directory, data, modalities)
        change = FeatureChange("given", tuple(other))
        found.append(feature_change(change, settings.shares, draws, other=other, rebuild=settings.rebuild))
    return found


def _with_zero(places: Sequence[float]) -> tuple[float, ...]:
    """In order, each once, and the unchanged model first: everything is told relative to it."""
    return tuple(sorted({0.0, *map(float, places)}))


def measure_runs(
    groups: Mapping[str, Mapping[str, Mapping[int, Path]]],
    changes: Sequence[Change],
    metrics: Sequence[str],
    split: Literal["valid", "test"] = "test",
    *,
    seed: int = 0,
    data: str | None = None,
    progress: Callable[[Path], None] | None = None,
) -> list[Experiment]:
    """Make every change to every run.

    Args:
        groups: run directories by model, training and seed, from `mgrad_jax.analysis.runs.group_runs`.
        changes: what is done to them.
        metrics, split: what is measured, e.g. "recall@5".
        seed: of the draws, which are the same in every run.
        data: where the runs' data lie now, if they were moved.
        progress: called with every run before it is measured.

    Raises:
        UserError: a run that cannot be read, or a model that does not know a change; before anything is measured.
    """
    for trainings in groups.values():
        some = load_run(next(iter(next(iter(trainings.values())).values())), data)
        for change in changes:
            change.check(some)
    found: list[dict[str, dict[str, dict[int, Response]]]] = [{} for _ in changes]
    for model, training, run_seed, run in each_run(groups, data, progress):
        for change, responses in zip(changes, found, strict=True):
            what = Measured(tuple(metrics), split, change.draws, seed)
            with as_configured(run.config):
                response = change.measure(run, what)
            responses.setdefault(model, {}).setdefault(training, {})[run_seed] = response
    return [Experiment(*change[:3], responses) for change, responses in zip(changes, found, strict=True)]


def popularity_metrics(
    data: Interactions, metrics: Sequence[str], split: Literal["valid", "test"]
) -> dict[str, np.ndarray]:
    """Each user's metrics where items are ranked by popularity."""
    ks = sorted({int(name.partition("@")[2]) for name in metrics})
    found = metrics_of_scores(make_eval_split(data, split, ks), popularity(data))[1]
    return {name: found[name] for name in metrics}


def check_metric_names(metrics: Sequence[str]) -> None:
    """Refuse what is no metric at a cut-off."""
    for metric in metrics:
        name, _, k = metric.partition("@")
        if name not in METRICS or not k.isdecimal() or int(k) < 1:
            raise UserError(f"'{metric}' is no metric; write for example recall@20, with one of {', '.join(METRICS)}.")


def other_features(directory: Path, data: Interactions, modalities: Sequence[str]) -> dict[str, np.ndarray]:
    """A user's own features to put in place of the data's, by modality.

    Raises:
        UserError: there are none, or a file of another shape than the data's.
    """
    found = {}
    for modality in modalities:
        file = directory / f"{modality}_feat.npy"
        table = read_features(file, data.n_items)
        if table is None:
            continue
        own = data.features.get(modality)
        if own is None:
            raise UserError(f"{file} replaces nothing, for {data.source} has no {modality} features; remove it.")
        if table.shape != own.shape:
            raise UserError(f"{file} has shape {table.shape} and the data's {own.shape}; give features of that shape.")
        found[modality] = table
    if not found:
        wanted = " or ".join(f"{modality}_feat.npy" for modality in modalities)
        raise UserError(f"{directory} holds no {wanted}; write one with numpy.save, one row per item.")
    return found


def modalities_of(text: str) -> tuple[str, ...]:
    """The modalities that "image", "text" or "both" names."""
    return MODALITIES if text == "both" else (text,)
