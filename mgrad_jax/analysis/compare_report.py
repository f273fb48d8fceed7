"""What a study leaves behind: tables as Markdown, CSV and LaTeX, pictures, and every number in `result.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgrad_jax.analysis import figures
from mgrad_jax.analysis.baselines import baselines
from mgrad_jax.analysis.compare import Comparison, by_cell, comparisons, label, verdicts
from mgrad_jax.analysis.compare_equal import (
    at_equal_updates,
    equal_comparisons,
    equal_table,
    equal_tests_table,
    equal_verdicts,
)
from mgrad_jax.analysis.convergence import SHARE, Convergence, Curve, convergence, curve
from mgrad_jax.analysis.report import Column, Table, csv_records, provenance, to_csv, to_latex, to_markdown
from mgrad_jax.analysis.statistics import Spread, spread
from mgrad_jax.analysis.study import Cell, Outcome, Run, Study, Tried
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.declaration import check_choice
from mgrad_jax.evaluation.candidates import CANDIDATE_METRICS, CAPTION, candidate_metrics, read_candidates
from mgrad_jax.evaluation.ranking import make_eval_split, metrics_of_scores
from mgrad_jax.files import write_whole
from mgrad_jax.training.config import RunConfig

BASELINE = "no training"
# Each user's metrics by name, of the recommenders without training.
Baselines = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Report:
    """The tables of a study and its sentences, one a comparison; `tried` is None where nothing was tuned."""

    means: Table
    tests: Table
    equal: Table
    equal_tests: Table
    convergence: Table
    tried: Table | None
    verdicts: tuple[str, ...]

    @property
    def shown(self) -> tuple[Table, ...]:
        """The tables that people read, in order."""
        tuned = () if self.tried is None else (self.tried,)
        tests = (readable(self.tests), self.equal, readable(self.equal_tests))
        return self.means, *tuned, *tests, self.convergence


def check_metrics(metrics: Sequence[str], config: RunConfig) -> None:
    """Refuse a metric that the runs do not measure."""
    for metric in metrics:
        check_choice("unknown metric", metric, config.metric_names)


def write_report(study: Study, outcome: Outcome, metrics: Sequence[str]) -> Report:
    """Make every table and picture of a study and write them into its directory.

    Args:
        study: what was compared.
        outcome: from `train_study`.
        metrics: what the tables show; the runs' own metric comes first and is the one to go by, those on sampled
            candidates come last.
    """
    config = next(iter(study.configs().values()))
    of_history = list(dict.fromkeys([config.metric, *metrics]))
    metrics = [*of_history, *(CANDIDATE_METRICS if study.candidates else ())]
    data, runs = load_interactions(study.data), outcome.runs
    made = comparisons(runs, metrics)
    at_budget = at_equal_updates(runs, of_history, config.metric)
    made_equal = equal_comparisons(at_budget, of_history)
    curves = curves_of(runs, config.metric, len(data.train), config.batch_size)
    untrained = _untrained(study, data, config)
    report = Report(
        means_table(runs, untrained, metrics, data.name),
        comparison_table(made),
        equal_table(at_budget, of_history),
        equal_tests_table(made_equal),
        convergence_table(curves, config.metric),
        tried_table(outcome.tried, config.metric) if outcome.tried else None,
        (*verdicts(made, config.metric), *equal_verdicts(made_equal, config.metric)),
    )
    sentences = "".join(f"- {sentence}\n" for sentence in report.verdicts)
    files: dict[str, str | bytes] = {
        "table.md": "\n".join([*map(to_markdown, report.shown), sentences]),
        "table.tex": "\n".join(map(to_latex, report.shown)),
        "table.csv": to_csv(report.means),
        "tests.csv": to_csv(report.tests),
        "equal.csv": to_csv(report.equal),
        "equal_tests.csv": to_csv(report.equal_tests),
        "convergence.csv": to_csv(report.convergence),
        "runs.csv": to_csv(runs_table(runs, metrics)),
        "curves.csv": to_csv(curves_table(curves, runs)),
        "result.json": _result(study, runs, report),
    }
    if report.tried is not None:
        files["tried.csv"] = to_csv(report.tried)
    if curves:  # not every run diverged
        files["curves.png"] = figures.png(figures.convergence_curves(_by_model(curves), config.metric))
        files["bars.png"] = figures.png(figures.metric_bars(*_bars(runs, untrained, metrics)))
    for name, content in files.items():
        write_whole(study.directory / name, content)
    return report


def _untrained(study: Study, data: Interactions, config: RunConfig) -> dict[str, dict[str, np.ndarray]]:
    """The recommenders without training, measured as the runs are."""
    eval_split = make_eval_split(data, "test", config.ks)
    candidates = None if study.candidates is None else read_candidates(Path(study.candidates), data)
    found = {}
    for name, baseline in baselines(data, config.metric).items():
        sampled = {} if candidates is None else candidate_metrics(candidates, baseline.scores)[1]
        found[name] = {**metrics_of_scores(eval_split, baseline.scores)[1], **sampled}
    return found


def _result(study: Study, runs: Sequence[Run], report: Report) -> str:
    finished = [run for run in runs if run.result is not None]
    return provenance(
        settings=study.to_dict(),
        runs={run.directory.name: run.result for run in finished},
        diverged=[run.directory.name for run in runs if run.result is None],
        verdicts=list(report.verdicts),
        means=csv_records(report.means),
        tests=csv_records(report.tests),
        equal=csv_records(report.equal),
        equal_tests=csv_records(report.equal_tests),
        convergence=csv_records(report.convergence),
        tried=[] if report.tried is None else csv_records(report.tried),
    )


def _by_model(curves: Mapping[Cell, Sequence[Curve]]) -> dict[str, dict[str, Sequence[Curve]]]:
    return {
        model: {label(cell, list(curves)): runs for cell, runs in curves.items() if cell.model == model}
        for model in dict.fromkeys(cell.model for cell in curves)
    }


def _bars(
    runs: Sequence[Run], untrained: Baselines, metrics: Sequence[str]
) -> tuple[dict[str, dict[str, dict[str, Spread]]], dict[str, dict[str, float]]]:
    finished = {cell: found for cell, found in by_cell(runs).items() if found}
    bars: dict[str, dict[str, dict[str, Spread]]] = {metric: {} for metric in metrics}
    for cell, found in finished.items():
        for metric in metrics:
            values = [_mean(run.metrics[metric]) for run in found.values()]
            bars[metric].setdefault(cell.model, {})[label(cell, list(finished))] = spread(values)
    levels = {m: {name: _mean(values[m]) for name, values in untrained.items()} for m in metrics}
    return bars, levels


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))


def means_table(runs: Sequence[Run], baselines: Baselines, metrics: Sequence[str], data: str) -> Table:
    """One row per training: mean ± standard deviation over seeds; the recommenders without training stand first."""
    columns = [Column("model"), Column("method"), Column("optimizer"), Column("interval"), Column("seeds")]
    columns += [*map(Column, metrics), Column("best epoch", ".0f"), Column("diverged"), Column("note")]
    rows: list[tuple[Any, ...]] = [
        (name, BASELINE, "", None, None, *(_mean(values[m]) for m in metrics), None, None, "")
        for name, values in baselines.items()
    ]
    for cell, finished in by_cell(runs).items():
        spreads = [_spread([_mean(run.metrics[m]) for run in finished.values()]) for m in metrics]
        epochs = _spread([run.result["best_epoch"] for run in finished.values() if run.result])
        lost = sum(run.cell == cell and run.result is None for run in runs)
        above = [
            name for name, values in baselines.items() if spreads[0] and spreads[0].mean < _mean(values[metrics[0]])
        ]
        notes = [f"below {', '.join(above)}"] if above else []
        notes += dict.fromkeys(run.note for run in runs if run.cell == cell and run.note)
        rows.append((*_names(cell), len(finished), *spreads, epochs, lost, "; ".join(notes)))
    caption = (
        f"Test metrics on {data} at the best epoch by validation, mean ± standard deviation over seeds. "
        "Popularity and item neighbours are not trained; what a model adds is what it has above them. The note names "
        f"those that are above it by {metrics[0]}, and in how many tries a training was tuned."
    )
    caption += f" {CAPTION}" if any(metric in CANDIDATE_METRICS for metric in metrics) else ""
    return Table(caption, tuple(columns), tuple(rows))


def tried_table(tried: Sequence[Tried], metric: str) -> Table:
    """One row per try of every training that was tuned; what is chosen is chosen on validation."""
    heads = ["model", "method", "optimizer", "interval", "setting", "seeds"]
    columns = [*map(Column, heads), Column(f"valid {metric}"), Column("diverged"), Column("chosen")]
    rows = [
        (*_names(t.cell), t.setting, len(t.valid), _spread(t.valid), t.diverged, "yes" if t.is_chosen else "")
        for t in tried
    ]
    caption = (
        f"Tries of the trainings that were tuned, by mean validation {metric} over seeds; the best one stands in the "
        "other tables. replay is tried as often with other seeds, so that it has as many chances; plain training has "
        "one."
    )
    return Table(caption, tuple(columns), tuple(rows))


def _names(cell: Cell) -> tuple[Any, ...]:
    return cell.model, cell.method, cell.optimizer, cell.interval


def _spread(values: Sequence[float]) -> Spread | None:
    return spread(values) if values else None


def comparison_table(made: Sequence[Comparison]) -> Table:
    """One row per comparison: the difference, its relative size with band, and both tests."""
    heads = ["model", "comparison", "optimizer", "interval", "metric", "seeds", "users"]
    columns = [*map(Column, heads), Column("difference", "+.4f"), Column("relative", "+.1%")]
    for over in ("seeds", "users"):
        columns += [Column(f"d_z over {over}", "+.2f"), Column(f"t over {over}", "+.2f")]
        columns += [Column(f"p over {over}", ".2g"), Column(f"Holm over {over}", ".2g"), Column(f"note on {over}")]
    rows = []
    for c in made:
        row: list[Any] = [c.ours.model, f"{c.ours.method} - {c.other.method}", c.ours.optimizer]
        row += [c.ours.interval or c.other.interval, c.metric, c.over_seeds.n, c.over_users.n, c.over_seeds.difference]
        row.append(c.relative)
        for test, adjusted in ((c.over_seeds, c.adjusted_seeds), (c.over_users, c.adjusted_users)):
            row += [test.d_z, test.t, test.p, adjusted, test.note]
        rows.append(tuple(row))
    n_seeds = sum(c.adjusted_seeds is not None for c in made)
    n_users = sum(c.adjusted_users is not None for c in made)
    caption = (
        "Differences on test, with the relative one's 95% band from resampling users and seeds at once. Over seeds: "
        "the paired t-test to go by. Over users: paired t-test of the users' metrics averaged over seeds, given these "
        "runs; with thousands of users nearly everything becomes significant, so read the size. Holm: adjusted for the "
        f"{n_seeds} tests over seeds and the {n_users} over users in this table."
    )
    return Table(caption, tuple(columns), tuple(rows))


def readable(tests: Table) -> Table:
    """The table of tests without the columns that only a program reads."""
    left_out = {"users", "t", "t over seeds", "t over users", "note on users", "p over users"}
    if len({row[2] for row in tests.rows}) < 2:
        left_out.add("optimizer")
    kept = [number for number, column in enumerate(tests.columns) if column.name not in left_out]
    columns = tuple(tests.columns[number] for number in kept)
    return Table(tests.caption, columns, tuple(tuple(row[number] for number in kept) for row in tests.rows))


def curves_of(runs: Sequence[Run], metric: str, n_train: int, batch_size: int) -> dict[Cell, list[Curve]]:
    """The course of every run that did not diverge, by training; trainings without any are left out."""
    batches = math.ceil(n_train / batch_size)
    return {
        cell: [curve(run.history, run.evaluations, metric, batches) for run in finished.values()]
        for cell, finished in by_cell(runs).items()
        if finished
    }


def convergence_table(curves: Mapping[Cell, Sequence[Curve]], metric: str) -> Table:
    """What each training needed, in gradient evaluations and in seconds of training without compilation."""
    heads = ["model", "method", "optimizer", "interval", "seeds", "reached"]
    columns = [*map(Column, heads)]
    for what in ("goal", "common loss"):
        columns += [Column(f"evaluations to {what}", ".0f"), Column(f"seconds to {what}", ".1f")]
    columns += [Column("evaluations at the stop", ".0f"), Column("last loss", ".4g")]
    rows = []
    for cell, needed in _needed(curves).items():
        goal = (needed.evaluations, needed.seconds)
        loss = (needed.loss_evaluations, needed.loss_seconds, needed.last_evaluations, needed.last_loss)
        rows.append((*_names(cell), needed.runs, f"{needed.reached} of {needed.runs}", *goal, *loss))
    caption = (
        f"Convergence. The goal is {SHARE:.0%} of plain training's best validation {metric}, averaged over its seeds; "
        "the common loss is the largest training loss (a batch) that every run of the model and optimizer gets down "
        "to. Where training stops is chosen by a noisy metric, so that fewer epochs say little without their spread."
    )
    return Table(caption, tuple(columns), tuple(rows))


def _needed(curves: Mapping[Cell, Sequence[Curve]]) -> dict[Cell, Convergence]:
    """Thresholds are common to the trainings of a model and optimizer."""
    found: dict[Cell, Convergence] = {}
    for model, optimizer in dict.fromkeys((cell.model, cell.optimizer) for cell in curves):
        group = {c: runs for c, runs in curves.items() if (c.model, c.optimizer) == (model, optimizer)}
        plain = next((cell for cell in group if cell.method == "plain"), None)
        found.update(convergence(group, plain))
    return found


def runs_table(runs: Sequence[Run], metrics: Sequence[str]) -> Table:
    """One row per run, for programs; no times, so that the same runs give the same bytes."""
    heads = [
        "model",
        "method",
        "optimizer",
        "interval",
        "seed",
        "directory",
        "diverged",
        "epochs_run",
        "best_epoch",
        "evaluations",
    ]
    columns = [*map(Column, heads)]
    columns += [Column(f"{split}_{metric}") for split in ("valid", "test") for metric in metrics]
    rows = []
    for run in runs:
        result = run.result or {}
        values = [result.get(split, {}).get(metric) for split in ("valid", "test") for metric in metrics]
        epochs = [result.get(name) for name in ("epochs_run", "best_epoch")]
        total = int(run.evaluations[-1]) if len(run.evaluations) else 0
        place = f"runs/{run.directory.name}"
        rows.append((*_names(run.cell), run.seed, place, run.result is None, *epochs, total, *values))
    return Table("Runs.", tuple(columns), tuple(rows))


def curves_table(curves: Mapping[Cell, Sequence[Curve]], runs: Sequence[Run]) -> Table:
    """One row per epoch of every run, for programs."""
    heads = ["model", "method", "optimizer", "interval", "seed", "epoch", "evaluations", "seconds", "loss", "valid"]
    finished = by_cell(runs)
    rows = [
        (
            *_names(cell),
            seed,
            epoch + 1,
            int(run.evaluations[epoch]),
            *map(float, (run.seconds[epoch], run.loss[epoch], run.valid[epoch])),
        )
        for cell, found in curves.items()
        for seed, run in zip(finished[cell], found, strict=True)
        for epoch in range(len(run.loss))
    ]
    return Table("Curves.", tuple(map(Column, heads)), tuple(rows))
