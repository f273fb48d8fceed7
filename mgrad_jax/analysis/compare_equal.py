"""Trainings at equal numbers of updates: what early stopping, which goes by a noisy metric, does not decide.

Every epoch of `history.csv` holds the metrics of both splits. The budget of a model and optimizer is the number of
gradient evaluations that all of its runs get to; a run counts up to its last whole epoch within it. In plain training,
mirror and replay a gradient evaluation is an update; the SAM family takes two for one.

| rule | test metric of a run |
|---|---|
| best | at the best epoch by validation within the budget |
| last | mean of the last `LAST` epochs within the budget: no selection at all |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mgrad_jax.analysis.compare import SIGNIFICANT, by_cell, compared, label
from mgrad_jax.analysis.report import Column, Table
from mgrad_jax.analysis.statistics import PairedTest, holm, paired_test, spread
from mgrad_jax.analysis.study import Cell, Run

LAST = 5
RULES = ("best", "last")


@dataclass(frozen=True)
class AtBudget:
    """One training at its budget.

    Attributes:
        evaluations: the budget, in gradient evaluations.
        epochs: how many epochs of each seed lie within it, by seed.
        values: test metrics by rule, metric and seed.
    """

    evaluations: int
    epochs: dict[int, int]
    values: dict[str, dict[str, dict[int, float]]]


@dataclass(frozen=True)
class EqualComparison:
    """Two trainings of a model at the same budget: the paired test over seeds, and its p after Holm."""

    ours: Cell
    other: Cell
    rule: str
    metric: str
    test: PairedTest
    adjusted: float | None


def at_equal_updates(runs: Sequence[Run], metrics: Sequence[str], select: str) -> dict[Cell, AtBudget]:
    """Every training whose runs did not all diverge, at the budget of its model and optimizer.

    Args:
        runs: of a study.
        metrics: of the test split, by name.
        select: the validation metric that says which epoch is best.
    """
    finished = {cell: found for cell, found in by_cell(runs).items() if found}
    budgets: dict[tuple[str, str], int] = {}
    for cell, found in finished.items():
        totals = [int(run.evaluations[-1]) for run in found.values()]
        key = cell.model, cell.optimizer
        budgets[key] = min([*totals, budgets.get(key, totals[0])])
    return {
        cell: _at_budget(found, budgets[cell.model, cell.optimizer], metrics, select)
        for cell, found in finished.items()
    }


def _at_budget(runs: Mapping[int, Run], budget: int, metrics: Sequence[str], select: str) -> AtBudget:
    # At least one epoch, although one of the SAM family may cost more than all of a run of another method.
    epochs = {seed: max(1, int((run.evaluations <= budget).sum())) for seed, run in runs.items()}
    values: dict[str, dict[str, dict[int, float]]] = {rule: {metric: {} for metric in metrics} for rule in RULES}
    for seed, run in runs.items():
        history = run.history[: epochs[seed]]
        best = int(np.argmax([row[f"valid_{select}"] for row in history]))
        for metric in metrics:
            course = [row[f"test_{metric}"] for row in history]
            values["best"][metric][seed] = course[best]
            values["last"][metric][seed] = float(np.mean(course[-LAST:]))
    return AtBudget(budget, epochs, values)


def equal_comparisons(found: Mapping[Cell, AtBudget], metrics: Sequence[str]) -> list[EqualComparison]:
    """Every pair of trainings, as `mgrad_jax.analysis.compare.compared` has them, by every rule and metric."""
    made = []
    for ours, other in compared(list(found)):
        for rule in RULES:
            for metric in metrics:
                a, b = (found[cell].values[rule][metric] for cell in (ours, other))
                seeds = [seed for seed in a if seed in b]
                made.append((ours, other, rule, metric, paired_test([a[s] for s in seeds], [b[s] for s in seeds])))
    adjusted = holm([test.p for *_, test in made])
    return [EqualComparison(*c, p) for c, p in zip(made, adjusted, strict=True)]


def equal_table(found: Mapping[Cell, AtBudget], metrics: Sequence[str]) -> Table:
    """One row per training: budget, epochs, and the metrics by both rules."""
    columns = [*map(Column, ("model", "method", "optimizer", "interval", "seeds", "evaluations"))]
    columns += [Column("epochs", ".0f"), *(Column(f"{metric} {rule}") for metric in metrics for rule in RULES)]
    rows = []
    for cell, at in found.items():
        values = [spread(list(at.values[rule][metric].values())) for metric in metrics for rule in RULES]
        rows.append((*cell, len(at.epochs), at.evaluations, spread(list(at.epochs.values())), *values))
    caption = (
        "Test metrics at equal numbers of updates, mean ± standard deviation over seeds: every run counts up to the "
        "number of gradient evaluations that all runs of its model and optimizer get to (in the SAM family two make an "
        f"update). best: at the best epoch by validation until there; last: mean of the {LAST} last epochs until "
        "there, without any selection."
    )
    return Table(caption, tuple(columns), tuple(rows))


def equal_tests_table(made: Sequence[EqualComparison]) -> Table:
    """One row per comparison, rule and metric."""
    columns = [*map(Column, ("model", "comparison", "optimizer", "interval", "rule", "metric", "seeds"))]
    columns += [Column("difference", "+.4f"), Column("d_z", "+.2f"), Column("t", "+.2f"), Column("p", ".2g")]
    columns += [Column("Holm", ".2g"), Column("note")]
    rows = []
    for c in made:
        names = f"{c.ours.method} - {c.other.method}"
        place = (c.ours.model, names, c.ours.optimizer, c.ours.interval or c.other.interval, c.rule, c.metric)
        test = c.test
        rows.append((*place, test.n, test.difference, test.d_z, test.t, test.p, c.adjusted, test.note))
    caption = (
        "Differences on test at equal numbers of updates, with the paired t-test over seeds; Holm: adjusted for the "
        f"{sum(c.adjusted is not None for c in made)} tests of this table."
    )
    return Table(caption, tuple(columns), tuple(rows))


def equal_verdicts(made: Sequence[EqualComparison], metric: str) -> list[str]:
    """A sentence a comparison by the run's metric, of the last epochs."""
    cells = list(dict.fromkeys(cell for c in made for cell in (c.ours, c.other)))
    sentences = []
    for c in made:
        if c.metric != metric or c.rule != "last":
            continue
        if c.adjusted is None:
            outcome = c.test.note
        elif c.adjusted < SIGNIFICANT:
            outcome = f"{'better' if c.test.difference > 0 else 'worse'}, p = {c.adjusted:.2g} after Holm"
        else:
            outcome = f"no difference shown, p = {c.adjusted:.2g} after Holm"
        outcome += f" ({c.test.note})" if c.adjusted is not None and c.test.note else ""
        names = " against ".join(label(cell, cells) for cell in (c.ours, c.other))
        sentences.append(f"{c.ours.model}: {names}, {metric} at equal updates {c.test.difference:+.4f}: {outcome}.")
    return sentences
