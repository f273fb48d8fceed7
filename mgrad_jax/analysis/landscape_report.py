"""What `landscape` leaves behind: flatness at the best epochs and at equal training loss, as tables and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgrad_jax.analysis import figures, figures_landscape
from mgrad_jax.analysis.flatness import CORRECTED, RAW, Flatness
from mgrad_jax.analysis.landscape_run import Landscape, Landscapes, Place
from mgrad_jax.analysis.report import (
    Column,
    Interval,
    Table,
    csv_records,
    provenance,
    shown,
    to_csv,
    to_latex,
    to_markdown,
)
from mgrad_jax.analysis.runs import compared_pairs
from mgrad_jax.analysis.statistics import band, holm, paired_test, resampled_means, spread
from mgrad_jax.files import write_whole

BEST, EQUAL = "best epoch", "equal loss"
_SURROGATE = "of the gradient's surrogate"
# What is made of gradients; the other numbers are made of values.
_BY_GRADIENTS = ("largest eigenvalue", "smallest eigenvalue", "slope")

_LEVEL = 0.05

Key = tuple[str, str]


class Reading(NamedTuple):
    """The flatness of one run at one point of its training: epoch (between two, where interpolated), loss, numbers."""

    epoch: float
    loss: float
    numbers: Mapping[Key, np.ndarray]


# By place (`BEST`, `EQUAL`), model, training and seed.
Readings = Mapping[str, Mapping[str, Mapping[str, Mapping[int, Reading]]]]


def at_best(landscape: Landscape) -> Reading:
    """The numbers at a run's best epoch."""
    return _reading(landscape.best)


def _reading(place: Place) -> Reading:
    numbers = {key: number.values for key, number in place.flatness.numbers.items()}
    return Reading(place.epoch, place.flatness.loss, numbers)


def common_loss(landscapes: Sequence[Landscape]) -> float | None:
    """The largest training loss that all runs get down to; None where some run kept no epoch besides its best."""
    if any(len(landscape.places) < 2 for landscape in landscapes):
        return None
    return max(min(place.flatness.loss for place in landscape.places) for landscape in landscapes)


def at_loss(landscape: Landscape, loss: float) -> Reading | None:
    """The numbers where a run first gets down to a loss, interpolated; None where its first kept epoch is below it."""
    readings = [_reading(place) for place in landscape.places]
    if readings[0].loss <= loss:
        return readings[0] if readings[0].loss == loss else None
    for before, after in itertools.pairwise(readings):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss) if before.loss > after.loss else 0.0
            numbers = {key: (1 - share) * x + share * after.numbers[key] for key, x in before.numbers.items()}
            return Reading((1 - share) * before.epoch + share * after.epoch, loss, numbers)
    return None


def all_readings(landscapes: Landscapes) -> Readings:
    """Every run's numbers at its best epoch, and at the loss that all runs of its model get down to."""
    found: dict[str, dict[str, dict[str, dict[int, Reading]]]] = {BEST: {}, EQUAL: {}}
    for model, trainings in landscapes.items():
        loss = common_loss([one for by_seed in trainings.values() for one in by_seed.values()])
        for training, by_seed in trainings.items():
            best = {seed: at_best(one) for seed, one in by_seed.items()}
            found[BEST].setdefault(model, {})[training] = best
            equal = {} if loss is None else {seed: at_loss(one, loss) for seed, one in by_seed.items()}
            reached = {seed: reading for seed, reading in equal.items() if reading is not None}
            if reached:
                found[EQUAL].setdefault(model, {})[training] = reached
    return found


def notes(landscapes: Landscapes, readings: Readings) -> list[str]:
    """What has to be known of the numbers, a sentence each."""
    said = []
    for model, trainings in landscapes.items():
        runs = [one for by_seed in trainings.values() for one in by_seed.values()]
        stops = ", ".join(
            f"{training} {spread([one.best.flatness.loss for one in by_seed.values()]).mean:.4g}"
            for training, by_seed in trainings.items()
        )
        loss = common_loss(runs)
        if loss is None and len(runs) > 1:
            said.append(
                f"{model}: the runs stopped at different training losses ({stops}), and flatness goes with the loss; "
                "train with --keep-every N to compare at equal loss."
            )
        elif loss is not None:
            missing = len(runs) - sum(map(len, readings[EQUAL].get(model, {}).values()))
            said.append(f"{model}: losses at the best epochs: {stops}; all runs get down to {loss:.4g}.")
            if missing:
                said.append(
                    f"{model}: {missing} of {len(runs)} runs are below that loss at the first epoch they kept, and are "
                    "left out there; keep more epochs."
                )
        if runs[0].stops_gradient:
            said.append(
                f"{model} stops gradients: eigenvalues, slopes and the direction of the worst rise are those "
                f"{_SURROGATE}; trace and rises are the loss's own."
            )
    return said


def number_name(key: Key, stops_gradient: bool) -> str:
    """A number as the tables call it."""
    return f"{key[0]} {_SURROGATE}" if stops_gradient and key[0] in _BY_GRADIENTS else key[0]


def summary_table(landscapes: Landscapes, readings: Readings, data: str) -> Table:
    """One row per number, a column a training."""
    names = list(dict.fromkeys(name for trainings in landscapes.values() for name in trainings))
    heads = [*map(Column, ("model", "at", "number", "scale")), *(Column(name, ".4g") for name in names)]
    rows: list[tuple[Any, ...]] = []
    for at, models in readings.items():
        for model, trainings in models.items():
            surrogate = _stops_gradient(landscapes, model)
            keys = next(iter(next(iter(trainings.values())).values())).numbers.keys()

            def cells(of: Any, trainings: Mapping[str, Mapping[int, Reading]] = trainings) -> list[Any]:
                by_name = {name: [of(reading) for reading in found.values()] for name, found in trainings.items()}
                return [spread(by_name[name]) if name in by_name else None for name in names]

            rows.append((model, at, "epoch", "", *cells(lambda reading: reading.epoch)))
            rows.append((model, at, "training loss", "", *cells(lambda reading: reading.loss)))
            for key in keys:
                values = cells(lambda reading, key=key: reading.numbers[key].mean())
                rows.append((model, at, number_name(key, surrogate), key[1], *values))
    caption = (
        f"Flatness of the training loss on {data}, mean ± standard deviation over seeds. Scale-corrected: in units of "
        "each table's own root mean square, or of each row's; unlike the raw numbers they stay where a table is "
        f"rescaled and its partner undoes it. {_trust(landscapes)}"
    )
    return Table(caption, tuple(heads), tuple(rows))


def _trust(landscapes: Landscapes) -> str:
    """How far traces and eigenvalues can be trusted, in the worst case of all."""
    steps, residuals = [0.0], [0.0]
    for scale in (RAW, CORRECTED):
        measured = [place.flatness.numbers for place in _places(landscapes)]
        traces = [numbers["trace", scale] for numbers in measured]
        # In units of the largest: along training a trace may pass through 0.
        size = max(max(abs(trace.value) for trace in traces), 1e-300)
        steps += [abs(trace.value - (trace.check or 0.0)) / size for trace in traces]
        for numbers in measured:
            ends = [numbers[f"{end} eigenvalue", scale] for end in ("largest", "smallest")]
            size = max(*(abs(end.value) for end in ends), 1e-300)
            residuals += [(end.check or 0.0) / size for end in ends]
    return (
        f"Half the step changes a trace by at most {max(steps):.1%} of the largest; the largest residual of an "
        f"eigenvalue is {max(residuals):.1%} of the larger one."
    )


def _places(landscapes: Landscapes) -> list[Place]:
    runs = [one for trainings in landscapes.values() for by_seed in trainings.values() for one in by_seed.values()]
    return [place for run in runs for place in run.places]


def _stops_gradient(landscapes: Landscapes, model: str) -> bool:
    return next(iter(next(iter(landscapes[model].values())).values())).stops_gradient


def differences_table(landscapes: Landscapes, readings: Readings) -> Table:
    """One row per pair of trainings and number: by how much they differ, with a band, and whether over seeds."""
    heads = ("model", "at", "comparison", "number", "scale", "seeds")
    columns = [*map(Column, heads), Column("difference", "+.3g"), Column("d_z", "+.2f"), Column("p", ".2g")]
    columns += [Column("Holm", ".2g"), Column("note")]
    rows, tests = [], []
    for at, models in readings.items():
        for model, trainings in models.items():
            for ours, other in compared_pairs(list(trainings)):
                seeds = [seed for seed in trainings[ours] if seed in trainings[other]]
                if not seeds:
                    continue
                both = [{seed: trainings[name][seed].numbers for seed in seeds} for name in (ours, other)]
                values = {key: _values(both[0], key) - _values(both[1], key) for key in both[0][seeds[0]]}
                for key, difference in _differences(values).items():
                    tests.append(paired_test(*(_values(numbers, key).mean(axis=1) for numbers in both)))
                    name = number_name(key, _stops_gradient(landscapes, model))
                    rows.append((model, at, f"{ours} - {other}", name, key[1], len(seeds), difference))
    adjusted = holm([test.p for test in tests])
    full = [(*row, t.d_z, t.p, p, t.note) for row, t, p in zip(rows, tests, adjusted, strict=True)]
    caption = (
        "Differences of flatness, with the 95% band from resampling seeds and random directions at once (with one "
        "seed: given these runs; a number without directions then has none), and the paired t-test over seeds; Holm: "
        f"adjusted for the {sum(t.p is not None for t in tests)} tests of this table."
    )
    return Table(caption, tuple(columns), tuple(full))


def verdicts(differences: Table) -> list[str]:
    """A sentence a comparison at equal loss, by the scale-corrected trace."""
    said = []
    columns = [column.name for column in differences.columns]
    for row in differences.rows:
        cell = dict(zip(columns, row, strict=True))
        if (cell["at"], cell["number"], cell["scale"]) == (EQUAL, "trace", CORRECTED):
            found, p = cell["difference"], cell["Holm"]
            said.append(
                f"{cell['model']} at equal loss, {cell['comparison']}: scale-corrected trace {shown(found, '+.3g')}; "
                + (f"{cell['note']}." if p is None else f"{_word(found.value, p)}, p = {p:.2g} over seeds, adjusted.")
            )
    return said


def _word(difference: float, p: float) -> str:
    if p >= _LEVEL:
        return "no difference shown"
    return "flatter" if difference < 0 else "sharper"


def _values(numbers: Mapping[int, Mapping[Key, np.ndarray]], key: Key) -> np.ndarray:
    """One number of some seeds, (seeds, probes)."""
    return np.stack([of_seed[key] for of_seed in numbers.values()])


def _differences(values: Mapping[Key, np.ndarray]) -> dict[Key, Interval]:
    """Means of (seeds, probes) differences, with their bands where there is anything to resample."""
    found = {}
    for probes in {array.shape[1] for array in values.values()}:
        keys = [key for key, array in values.items() if array.shape[1] == probes]
        stacked = np.stack([values[key] for key in keys])
        means = stacked.mean(axis=(1, 2))
        # Users are resampled nowhere: the last axis has one.
        ends = band(resampled_means(stacked[..., None])) if stacked[0].size > 1 else np.full((2, len(keys)), np.nan)
        found.update({key: Interval(*map(float, end)) for key, *end in zip(keys, means, *ends, strict=True)})
    return {key: found[key] for key in values}


def surface_table(landscapes: Landscapes, runs: Mapping[str, Mapping[str, Mapping[int, Path]]]) -> Table:
    """One row per run and point; for programs."""
    rows = []
    for model, trainings in landscapes.items():
        for training, by_seed in trainings.items():
            for seed, one in by_seed.items():
                a, b, losses = one.surface.a, one.surface.b, one.surface.losses
                run = str(runs[model][training][seed])
                rows += [
                    (run, float(x), float(y), float(losses[i, j])) for i, x in enumerate(a) for j, y in enumerate(b)
                ]
    return Table("Surfaces.", tuple(map(Column, ("run", "a", "b", "loss"))), tuple(rows))


def flatness_table(landscapes: Landscapes) -> Table:
    """One row per run, measured epoch and number; for programs."""
    heads = ("model", "method", "seed", "epoch", "best", "loss", "scale", "number", "value", "check")
    rows = []
    for model, trainings in landscapes.items():
        for training, by_seed in trainings.items():
            for seed, one in by_seed.items():
                for place in one.places:
                    where = (model, training, seed, place.epoch, int(place.is_best), place.flatness.loss)
                    for key, number in place.flatness.numbers.items():
                        name = number_name(key, one.stops_gradient)
                        rows.append((*where, key[1], name, number.value, number.check))
    return Table("Flatness.", tuple(map(Column, heads)), tuple(rows))


@dataclass(frozen=True)
class LandscapeReport:
    """The tables people read, what has to be known of them, and what they say in sentences."""

    summary: Table
    differences: Table
    notes: tuple[str, ...]


def write_landscape(
    out: Path,
    landscapes: Landscapes,
    runs: Mapping[str, Mapping[str, Mapping[int, Path]]],
    data: str,
    settings: Mapping[str, Any],
) -> LandscapeReport:
    """Make every table and picture and write them.

    Args:
        out: the directory.
        landscapes: what was measured.
        runs: the directories of the runs.
        data: the dataset's name.
        settings: what else `result.json` says.
    """
    readings = all_readings(landscapes)
    differences = differences_table(landscapes, readings)
    sentences = (*notes(landscapes, readings), *verdicts(differences))
    report = LandscapeReport(summary_table(landscapes, readings, data), differences, sentences)
    tables = [report.summary, *([report.differences] if report.differences.rows else [])]
    files: dict[str, str | bytes] = {
        "table.md": "\n".join([*map(to_markdown, tables), *(f"{note}\n" for note in report.notes)]),
        "table.tex": "\n".join(map(to_latex, tables)),
        "table.csv": to_csv(report.summary),
        "tests.csv": to_csv(report.differences),
        "surface.csv": to_csv(surface_table(landscapes, runs)),
        "flatness.csv": to_csv(flatness_table(landscapes)),
        **_pictures(landscapes),
        "result.json": provenance(
            **settings,
            runs=runs,
            notes=report.notes,
            summary=csv_records(report.summary),
            differences=csv_records(report.differences),
        ),
    }
    for name, content in files.items():
        write_whole(out / name, content)
    return report


def _pictures(landscapes: Landscapes) -> dict[str, bytes]:
    """By file name; a picture of progress a model that kept epochs."""
    rows: dict[str, list[figures_landscape.Panel]] = {}
    found = {}
    for model, trainings in landscapes.items():
        rows[f"{model}: L"] = [_panel(name, by_seed, False) for name, by_seed in trainings.items()]
        rows[f"{model}: L - L(θ)"] = [_panel(name, by_seed, True) for name, by_seed in trainings.items()]
        if any(len(one.places) > 1 for by_seed in trainings.values() for one in by_seed.values()):
            suffix = "" if len(landscapes) == 1 else f"-{model}"
            found[f"progress{suffix}.png"] = figures.png(_progress(model, trainings))
    found["contours.png"] = figures.png(figures_landscape.contours(rows))
    found["surface.png"] = figures.png(figures_landscape.surfaces(rows))
    return found


def _panel(training: str, by_seed: Mapping[int, Landscape], is_rise: bool) -> figures_landscape.Panel:
    """A training's surface, averaged over its seeds."""
    runs = list(by_seed.values())
    losses = np.mean([one.surface.losses - (one.surface.centre if is_rise else 0.0) for one in runs], axis=0)
    loss = np.mean([one.surface.centre for one in runs])
    epochs = ", ".join(str(one.best.epoch) for one in runs)
    size = np.mean([one.norm for one in runs])
    seeds = "" if len(runs) == 1 else f", mean of {len(runs)} seeds"
    title = f"{training}{seeds}\nL(θ) {loss:.4g}, epoch {epochs}, |θ| {size:.4g}"
    return figures_landscape.Panel(title, runs[0].surface.a, runs[0].surface.b, losses)


def _progress(model: str, trainings: Mapping[str, Mapping[int, Landscape]]) -> Any:
    """Every number of a model's runs against their loss."""
    runs = [one for by_seed in trainings.values() for one in by_seed.values()]
    panels = {}
    for key in runs[0].best.flatness.numbers:
        name = f"{number_name(key, runs[0].stops_gradient)}, {key[1]}"
        panels[name] = {
            training: [_course([place.flatness for place in one.places], one, key) for one in by_seed.values()]
            for training, by_seed in trainings.items()
        }
    title = f"{model}: flatness along training; rings: best epochs, dotted: the loss all runs get down to"
    return figures_landscape.progress(panels, common_loss(runs), title)


def _course(measured: Sequence[Flatness], landscape: Landscape, key: Key) -> figures_landscape.Course:
    losses = np.asarray([one.loss for one in measured])
    values = np.asarray([one.numbers[key].value for one in measured])
    return figures_landscape.Course(losses, values, landscape.places.index(landscape.best))
