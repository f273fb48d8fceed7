"""What `robustness` leaves behind: what each training loses under each change, with bands, as tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mgrad_jax.analysis import figures
from mgrad_jax.analysis.report import Column, Interval, Table, csv_records, provenance, to_csv, to_latex, to_markdown
from mgrad_jax.analysis.robustness import Measured, Response
from mgrad_jax.analysis.robustness_run import NOISE, Experiment, popularity_metrics
from mgrad_jax.analysis.runs import compared_pairs
from mgrad_jax.analysis.statistics import band, holm, paired_test, resampled_means, spread
from mgrad_jax.data import Interactions
from mgrad_jax.files import write_whole

LOSSES = (0.05, 0.2)


@dataclass(frozen=True)
class Line:
    """One metric of one training at every place, averaged over seeds, draws and users.

    Attributes:
        mean: (places,) R, the metric.
        ratio: (places,) R / R(0); NaN where R(0) is 0.
        samples, ratios: the same two of every resample, (places, replicates).
        areas: area under each seed's own ratio, divided by its width.
        x: over what the area is taken.
    """

    mean: np.ndarray
    ratio: np.ndarray
    samples: np.ndarray
    ratios: np.ndarray
    areas: np.ndarray
    x: np.ndarray

    @property
    def area(self) -> Interval:
        """Area under the ratio, divided by its width, with its band."""
        return Interval(float(_area(self.ratio, self.x)), *_ends(_area(self.ratios, self.x)))

    def first_lost(self, share: float, places: Sequence[float]) -> float | None:
        """The smallest place at which this share is lost; None where it never is."""
        return next((p for p, kept in zip(places, self.ratio, strict=True) if 1 - kept >= share), None)


class Lines:
    """The lines of all experiments, each resampled once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Line] = {}

    def of(
        self, experiment: Experiment, model: str, training: str, metric: str, seeds: Sequence[int] | None = None
    ) -> Line:
        """That of one metric of some seeds of a training, all of them by default."""
        responses = experiment.responses[model][training]
        chosen = tuple(responses if seeds is None else seeds)
        key = (experiment.name, model, training, metric, chosen)
        if key not in self._made:
            self._made[key] = line(responses, chosen, metric, experiment.x)
        return self._made[key]


def line(responses: Mapping[int, Response], seeds: Sequence[int], metric: str, x: np.ndarray) -> Line:
    """One metric of some seeds of a training, with resamples of users, draws and seeds at once."""
    values = np.stack([responses[seed].values[metric] for seed in seeds], axis=1)  # (places, seeds, draws, users)
    by_seed = values.mean(axis=(2, 3), dtype=np.float64)
    samples = resampled_means(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = by_seed.mean(axis=1)
        ratio, ratios = (np.where(m[0] > 0, m / m[0], np.nan) for m in (mean, samples))
        areas = _area(by_seed / np.where(by_seed[0] > 0, by_seed[0], np.nan), x)
    return Line(mean, ratio, samples, ratios, areas, x)


def _area(ratios: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Trapezoids along the first axis, divided by the width; of a single place its own ratio."""
    area: np.ndarray = np.trapezoid(ratios, x, axis=0) / (x[-1] - x[0]) if len(x) > 1 else ratios[0]
    return area


def _ends(samples: np.ndarray) -> tuple[float, float]:
    low, high = band(samples)
    return float(low), float(high)


def summary_table(
    experiments: Sequence[Experiment],
    lines: Lines,
    what: Measured,
    popularity: Mapping[str, np.ndarray],
    data: str,
) -> Table:
    """One row per change, training and metric; popularity, which no noise reaches, stands first."""
    columns = [*map(Column, ("change", "model", "method", "seeds", "metric")), Column("without change")]
    columns += [Column("area", ".3f"), *(Column(f"{share:.0%} lost at", "g") for share in LOSSES)]
    columns += [Column("zero table"), Column("noise only"), Column("note")]
    levels = {name: float(popularity[name].mean(dtype=np.float64)) for name in what.metrics}
    rows: list[tuple[Any, ...]] = [
        ("-", "popularity", "no training", None, name, level, *[None] * 5, "") for name, level in levels.items()
    ]
    for experiment in experiments:
        for model, trainings in experiment.responses.items():
            for training, by_seed in trainings.items():
                for metric in what.names:
                    made = lines.of(experiment, model, training, metric)
                    clean = spread([float(r.clean[metric].mean(dtype=np.float64)) for r in by_seed.values()])
                    lost = [made.first_lost(share, experiment.places) for share in LOSSES]
                    references = [_reference(by_seed, name, metric) for name in ("zero table", "noise only")]
                    note = "below popularity" if clean.mean < levels.get(metric, 0.0) else ""
                    row = (experiment.name, model, training, len(by_seed), metric, clean, made.area)
                    rows.append((*row, *lost, *references, note))
    draws = ", ".join(f"{experiment.draws} of {experiment.name}" for experiment in experiments)
    caption = (
        f"Changes at inference on {data}, {what.split}; draws: {draws}. Without change: mean ± standard deviation over "
        "seeds. Area: under the share of the metric that is kept, over log(1 + scale) of noise or over the share of "
        "items changed, divided by its width, with its 95% band from resampling users, draws and seeds at once (with "
        "one seed: given this run). Lost at: the smallest scale or share measured at which so much is lost. Zero "
        "table, noise only: the metric without the learned table, or with noise of its size in its place. Overlap: "
        "share of the clean list that stays."
    )
    return Table(caption, tuple(columns), tuple(rows))


def _reference(by_seed: Mapping[int, Response], name: str, metric: str) -> float | None:
    found = [r.references[name][metric].mean(dtype=np.float64) for r in by_seed.values() if name in r.references]
    return float(np.mean(found)) if found else None


def curves_table(experiments: Sequence[Experiment], lines: Lines, what: Measured) -> Table:
    """One row per place: the metric and what is lost of it, with bands; for programs."""
    heads = ("change", "model", "method", "metric", "place")
    rows = []
    for experiment in experiments:
        for model, trainings in experiment.responses.items():
            for training in trainings:
                for metric in what.names:
                    made = lines.of(experiment, model, training, metric)
                    for i, place in enumerate(experiment.places):
                        value = Interval(float(made.mean[i]), *_ends(made.samples[i]))
                        lost = Interval(float(1 - made.ratio[i]), *_ends(1 - made.ratios[i]))
                        rows.append((experiment.name, model, training, metric, float(place), value, lost))
    return Table("Curves.", (*map(Column, heads), Column("value"), Column("lost")), tuple(rows))


@dataclass(frozen=True)
class Difference:
    """What one training loses less than another: both lines over the seeds that both have."""

    experiment: Experiment
    model: str
    names: tuple[str, str]
    metric: str
    seeds: int
    lines: tuple[Line, Line]

    @property
    def kept_more(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Difference of the shares kept at every place and its band, (places,) each."""
        ours, other = self.lines
        return ours.ratio - other.ratio, *band(ours.ratios - other.ratios)

    @property
    def area(self) -> Interval:
        """Difference of the areas, with its band."""
        (ours, other), x = self.lines, self.experiment.x
        samples = _area(ours.ratios, x) - _area(other.ratios, x)
        return Interval(float(_area(ours.ratio, x) - _area(other.ratio, x)), *_ends(samples))


def differences(experiments: Sequence[Experiment], lines: Lines, what: Measured) -> list[Difference]:
    """Every pair of trainings of a model under every change, by every metric."""
    made = []
    for experiment in experiments:
        for model, trainings in experiment.responses.items():
            for ours, other in compared_pairs(list(trainings)):
                seeds = [seed for seed in trainings[ours] if seed in trainings[other]]
                for metric in what.names if seeds else ():
                    first, second = (lines.of(experiment, model, name, metric, seeds) for name in (ours, other))
                    made.append(Difference(experiment, model, (ours, other), metric, len(seeds), (first, second)))
    return made


def differences_table(made: Sequence[Difference]) -> Table:
    """One row per pair of trainings and metric: by how much the kept area differs, and whether over seeds."""
    heads = ("change", "model", "comparison", "metric", "seeds")
    columns = [*map(Column, heads), Column("area, % points", "+.1f"), Column("d_z", "+.2f"), Column("p", ".2g")]
    columns += [Column("Holm", ".2g"), Column("note")]
    tests = [paired_test(d.lines[0].areas, d.lines[1].areas) for d in made]
    rows = []
    for d, test, adjusted in zip(made, tests, holm([t.p for t in tests]), strict=True):
        area = Interval(*(100 * end for end in d.area))
        names = " - ".join(d.names)
        rows.append((d.experiment.name, d.model, names, d.metric, d.seeds, area, test.d_z, test.p, adjusted, test.note))
    caption = (
        "Differences of the kept area, with the 95% band from resampling users, draws and seeds at once, and the "
        f"paired t-test over seeds; Holm: adjusted for the {sum(t.p is not None for t in tests)} tests of this table."
    )
    return Table(caption, tuple(columns), tuple(rows))


def long_table(experiments: Sequence[Experiment]) -> Table:
    """One row per run, place, draw and metric; for programs."""
    noise = all(experiment.name == NOISE for experiment in experiments)
    heads = ["model", "method", "seed", *(["scale"] if noise else ["adjustment", "share"]), "draw", "metric", "value"]
    rows: list[tuple[Any, ...]] = []
    for experiment in experiments:
        for model, trainings in experiment.responses.items():
            for training, by_seed in trainings.items():
                for seed, response in by_seed.items():
                    for i, place in enumerate(experiment.places):
                        where = (float(place),) if noise else (experiment.name, float(place))
                        for draw in range(experiment.draws):
                            found = {name: float(v[i, draw].mean()) for name, v in response.values.items()}
                            found |= {name: float(v[i, draw]) for name, v in response.parts.items()}
                            row = (model, training, seed, *where, draw)
                            rows += [(*row, name, value) for name, value in found.items() if value == value]
    return Table("Draws.", tuple(map(Column, heads)), tuple(rows))


def parts_table(experiments: Sequence[Experiment]) -> Table | None:
    """Metrics of the users whose positives changed and of the others, and the changed items' share of all lists."""
    rows: list[tuple[Any, ...]] = []
    names: list[str] = []
    for experiment in experiments:
        for model, trainings in experiment.responses.items():
            for training, by_seed in trainings.items():
                parts = [response.parts for response in by_seed.values()]
                names = names or list(parts[0])
                for i, place in enumerate(experiment.places) if names else ():
                    means = [_nanmean([p[name][i] for p in parts]) for name in names]
                    rows.append((experiment.name, model, training, float(place), *means))
    if not names:
        return None
    heads = [Column("change"), Column("model"), Column("method"), Column("share", "g"), *map(Column, names)]
    caption = (
        "Users one of whose positives was changed, and the others; share of the places in all lists that changed items "
        "take."
    )
    return Table(caption, tuple(heads), tuple(rows))


def _nanmean(values: Sequence[np.ndarray]) -> float | None:
    numbers = np.concatenate([np.ravel(v) for v in values])
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if len(numbers) else None


@dataclass(frozen=True)
class RobustnessReport:
    """The tables people read."""

    summary: Table
    differences: Table


def write_robustness(
    out: Path,
    experiments: Sequence[Experiment],
    metrics: Sequence[str],
    split: Literal["valid", "test"],
    data: Interactions,
    settings: Mapping[str, Any],
) -> RobustnessReport:
    """Make every table and picture and write them.

    Args:
        out: the directory.
        experiments: what was measured.
        metrics, split: what was measured.
        data: the runs' dataset.
        settings: what else `result.json` says.
    """
    noise = next((e for e in experiments if e.name == NOISE), None)
    adjustments = [e for e in experiments if e.name != NOISE]
    what = Measured(tuple(metrics), split)
    popular = popularity_metrics(data, metrics, split)
    lines = Lines()
    made = differences(experiments, lines, what)
    report = RobustnessReport(summary_table(experiments, lines, what, popular, data.name), differences_table(made))
    parts = parts_table(adjustments)
    shown = [report.summary, *([report.differences] if made else []), *([] if parts is None else [parts])]
    files: dict[str, str | bytes] = {
        "table.md": "\n".join(map(to_markdown, shown)),
        "table.tex": "\n".join(map(to_latex, shown)),
        "table.csv": to_csv(report.summary),
        "tests.csv": to_csv(report.differences),
        "curves.csv": to_csv(curves_table(experiments, lines, what)),
    }
    if noise is not None:
        files["noise.csv"] = to_csv(long_table([noise]))
        files["noise.png"] = _picture(noise, lines, what, made)
    if adjustments:
        files["adjustment.csv"] = to_csv(long_table(adjustments))
        for experiment in adjustments:
            suffix = "" if len(adjustments) == 1 else f"-{experiment.name}"
            files[f"adjustment{suffix}.png"] = _picture(experiment, lines, what, made)
    files["result.json"] = provenance(
        **settings, summary=csv_records(report.summary), differences=csv_records(report.differences)
    )
    for name, content in files.items():
        write_whole(out / name, content)
    return report


def _picture(experiment: Experiment, lines: Lines, what: Measured, made: Sequence[Difference]) -> bytes:
    """What is lost by every training of every model, a column a metric, and below the differences."""
    panels: dict[str, dict[str, tuple[Any, Any, Any]]] = {name: {} for name in what.names}
    below: dict[str, dict[str, tuple[Any, Any, Any]]] = {name: {} for name in what.names}
    for model, trainings in experiment.responses.items():
        for training in trainings:
            for metric in what.names:
                drawn = lines.of(experiment, model, training, metric)
                panels[metric][f"{model} {training}"] = (1 - drawn.ratio, *band(1 - drawn.ratios))
    for d in made:
        if d.experiment is experiment:
            # Lost by the first less what is lost by the second: below 0 the first holds better.
            value, low, high = d.kept_more
            below[d.metric][f"{d.model} {' - '.join(d.names)}"] = (-value, -high, -low)
    x_name = "scale of the noise" if experiment.name == NOISE else f"share of items, {experiment.name}"
    drawn_figure = figures.band_curves(panels, below, experiment.places, x_name, experiment.name == NOISE)
    return figures.png(drawn_figure)
