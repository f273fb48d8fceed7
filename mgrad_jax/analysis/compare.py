"""Trainings of a study held against each other: paired tests over seeds and users, and a sentence a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mgrad_jax.analysis.report import Interval, shown
from mgrad_jax.analysis.statistics import PairedTest, holm, paired_test, relative_difference
from mgrad_jax.analysis.study import Cell, Run

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Comparison:
    """One metric of two trainings of a model, paired by seed and by user.

    Attributes:
        ours, other: what is compared; differences are ours - other.
        metric: its name.
        over_seeds: the test of the means of the seeds that both have. The primary one.
        over_users: the test of the users' metrics averaged over those seeds. It holds for these runs only.
        relative: relative difference of the means, with its band over users and seeds; None where the other is 0.
        adjusted_seeds, adjusted_users: p after Holm, each over all comparisons of the study.
    """

    ours: Cell
    other: Cell
    metric: str
    over_seeds: PairedTest
    over_users: PairedTest
    relative: Interval | None
    adjusted_seeds: float | None = None
    adjusted_users: float | None = None


def label(cell: Cell, cells: Sequence[Cell]) -> str:
    """A training's name among others: optimizer and interval are told only where they differ."""
    name = cell.method
    if len({c.interval for c in cells} - {None}) > 1 and cell.interval is not None:
        name += f" every {cell.interval}"
    return name + (f", {cell.optimizer}" if len({c.optimizer for c in cells}) > 1 else "")


def compared(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Which trainings are held against which: each against plain, and each but plain against replay.

    Within a model and optimizer. A method with an interval meets the replay of its own, one without meets all of them.
    """
    pairs = []
    for reference in ("plain", "replay"):
        for ours in cells:
            for other in cells:
                same = ours[0] == other[0] and ours.optimizer == other.optimizer
                intervals = None in (ours.interval, other.interval) or ours.interval == other.interval
                if same and intervals and other.method == reference and ours.method not in ("plain", reference):
                    pairs.append((ours, other))
    return sorted(pairs, key=lambda pair: list(cells).index(pair[0]))


def comparisons(runs: Sequence[Run], metrics: Sequence[str]) -> list[Comparison]:
    """Every pair of trainings by every metric, tested, and p adjusted over all of them.

    Args:
        runs: of a study; those that diverged are left out, and with them the other run of the seed.
        metrics: names, e.g. "recall@5".
    """
    finished = by_cell(runs)
    made = [
        _compare(ours, other, finished[ours], finished[other], metric)
        for ours, other in compared(list(finished))
        for metric in metrics
    ]
    seeds, users = holm([c.over_seeds.p for c in made]), holm([c.over_users.p for c in made])
    return [
        Comparison(**{**vars(c), "adjusted_seeds": s, "adjusted_users": u})
        for c, s, u in zip(made, seeds, users, strict=True)
    ]


def by_cell(runs: Sequence[Run]) -> dict[Cell, dict[int, Run]]:
    """Runs that did not diverge, by training and seed; a training of which all did stays, empty."""
    found: dict[Cell, dict[int, Run]] = {}
    for run in runs:
        finished = found.setdefault(run.cell, {})
        if run.result is not None:
            finished[run.seed] = run
    return found


def _compare(ours: Cell, other: Cell, a: Mapping[int, Run], b: Mapping[int, Run], metric: str) -> Comparison:
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        nothing = PairedTest(0, math.nan, note="not tested: 0 seeds that both finished")
        return Comparison(ours, other, metric, nothing, nothing, None)
    # (seeds, users): the same users in all runs, for they are those of the data's test split.
    left, right = (np.stack([runs[seed].metrics[metric] for seed in seeds]) for runs in (a, b))
    over_seeds = paired_test(left.mean(1, dtype=np.float64), right.mean(1, dtype=np.float64))
    over_users = paired_test(left.mean(0, dtype=np.float64), right.mean(0, dtype=np.float64), "users", enough=0)
    relative = relative_difference(left, right)
    return Comparison(ours, other, metric, over_seeds, over_users, None if relative is None else Interval(*relative))


def verdicts(made: Sequence[Comparison], metric: str) -> list[str]:
    """A sentence a comparison by the run's metric: better, worse, not shown, or not tested."""
    cells = list(dict.fromkeys(cell for c in made for cell in (c.ours, c.other)))
    sentences = []
    for c in made:
        if c.metric != metric:
            continue
        p, test = c.adjusted_seeds, c.over_seeds
        size = "" if c.relative is None else f" {shown(c.relative, '+.1%')}"
        if p is None:
            found = test.note
        elif p < SIGNIFICANT:
            found = f"{'better' if test.difference > 0 else 'worse'}, p = {p:.2g} after Holm"
        else:
            found = f"no difference shown, p = {p:.2g} after Holm"
        found += f" ({test.note})" if p is not None and test.note else ""
        names = (label(cell, cells) for cell in (c.ours, c.other))
        sentences.append(f"{c.ours.model}: {' against '.join(names)}, {metric}{size}: {found}.")
    return sentences
