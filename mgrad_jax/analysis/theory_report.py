"""What `theory` leaves behind: tables, pictures and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgrad_jax import models
from mgrad_jax.analysis import figures_theory
from mgrad_jax.analysis.figures import png
from mgrad_jax.analysis.inputs import InputNumbers, at_loss, common_loss
from mgrad_jax.analysis.report import Column, Table, csv_records, provenance, to_csv, to_latex, to_markdown
from mgrad_jax.analysis.settings import TheorySettings
from mgrad_jax.analysis.theory_run import WORST_CASE, Findings, InputFindings, Subject
from mgrad_jax.files import write_whole

# Where the slope of the residual has to lie for the theorem to be said to hold.
SLOPES = (2.9, 3.1)
_WHO = tuple(map(Column, ("model", "method", "seed")))


def residual_table(found: Sequence[Findings]) -> Table:
    """One row per subject: does the residual fall with the third power of the learning rate?"""
    columns = (*_WHO, Column("slope", ".4f"), Column("smallest step", ".3g"), Column("largest step", ".3g"))
    columns += (Column("residual / step^3", ".3g"), Column("theorem"))
    rows = []
    for f in found:
        slope, steps = f.residual.slope, f.residual.steps
        rows.append((*_who(f.subject), slope, float(steps[0]), float(steps[-1]), f.residual.coefficient, _verdict(f)))
    caption = (
        "Theorem 3.2 in float64 with gradient descent, one batch, fixed key: slope of log residual over log learning "
        f"rate at five doubling steps; by the theorem 3, and it holds here from {SLOPES[0]} to {SLOPES[1]}. A model "
        "that stops gradients steps along a g that is not the gradient of its loss's values, so that |g|^2 is not what "
        "it is led down."
    )
    return Table(caption, columns, tuple(rows))


def _verdict(f: Findings) -> str:
    """What the slope says of the theorem."""
    slope, config = f.residual.slope, f.subject.config
    if slope is None:
        return "lost in rounding"
    stops = models.model_class(config.model).stops_gradient or config.adversarial is not None
    holds = "holds" if SLOPES[0] <= slope <= SLOPES[1] else "does not hold"
    return f"{holds}, for a g that is no gradient of L" if stops else holds


def residual_points(found: Sequence[Findings]) -> Table:
    """One row per step; for programs."""
    heads = (*_WHO, Column("learning rate"), Column("residual"), Column("rounding"))
    rows = [
        (*_who(f.subject), *map(float, point))
        for f in found
        for point in zip(f.residual.steps, f.residual.residuals, f.residual.rounding, strict=True)
    ]
    return Table("Residuals.", heads, tuple(rows))


def penalty_table(found: Sequence[Findings], settings: TheorySettings) -> Table:
    """One row per epoch: what the penalty weighs beside the loss, for gradient descent and for Adam."""
    heads = (*_WHO, Column("epoch"), Column("learning rate", "g"), Column("loss"))
    heads += (Column("weight gradient descent", ".2e"), Column("weight adam", ".2e"))
    rows = [
        (*_who(f.subject), w.epoch, f.learning_rate, w.loss, w.gradient_descent, w.adam)
        for f in found
        for w in f.weights
    ]
    caption = (
        "Weight of the penalty beside the loss, eta alpha1 alpha2 g'Pg / (2 (alpha1 - alpha2) L), of one batch with "
        f"alpha1 {settings.alpha1:g} and alpha2 {settings.alpha2:g}: P = 1 for gradient descent; for Adam "
        f"P = 1 / (sqrt(v) + eps) with v its second moment over {settings.warm_up} batches, which holds for ascent "
        "steps only: Adam's own second half-step does not go back."
    )
    return Table(caption, heads, tuple(rows))


def steps_table(found: Sequence[Findings], settings: TheorySettings) -> Table:
    """One row per optimizer and state: where the second half-step goes."""
    heads = (*_WHO, *map(Column, ("optimizer", "second half-step", "state")), Column("projection", "+.3f"))
    heads += (Column("cosine with the first", "+.3f"), Column("cosine with -g", "+.3f"), Column("length", ".3f"))
    rows = [(*_who(f.subject), s.optimizer, s.second, s.state, *s.steps) for f in found for s in f.steps]
    caption = (
        f"The two half-steps of a mirror batch, alpha1 {settings.alpha1:g}, alpha2 {settings.alpha2:g}, from zero "
        f"state and after {settings.warm_up} batches: projection <d2, d1> / <d1, d1>, for gradient descent -alpha2 / "
        "alpha1 and above 0 where the second goes along the first; cosine of d2 with d1, and with -g where it starts, "
        "above 0 where it still goes downhill; length |d1 + d2| beside the optimizer's plain step. Second half-step: "
        "the optimizer's own, or gradient ascent with its step sizes."
    )
    return Table(caption, heads, tuple(rows))


def write_theory(
    out: Path, found: Sequence[Findings], settings: TheorySettings, made_with: Mapping[str, Any]
) -> tuple[Table, Table, Table]:
    """Write every table and picture; returns the tables people read."""
    tables = residual_table(found), penalty_table(found, settings), steps_table(found, settings)
    names = _names([f.subject for f in found])
    residuals = {
        n: (f.residual.steps, f.residual.residuals, f.residual.slope) for n, f in zip(names, found, strict=True)
    }
    courses = {
        title: {n: _course(f, field) for n, f in zip(names, found, strict=True)}
        for title, field in (("gradient descent, P = 1", 2), ("adam, P = 1 / (sqrt(v) + eps)", 3))
    }
    bars = {
        n: {f"{s.optimizer}, {s.second}, {s.state}": s.steps.projection for s in f.steps}
        for n, f in zip(names, found, strict=True)
    }
    slopes: dict[str, list[float | None]] = {}
    for f in found:
        slopes.setdefault(f.subject.name, []).append(f.residual.slope)
    residual = {"slope": {name: _mean(values) for name, values in slopes.items()}, "runs": csv_records(tables[0])}
    files: dict[str, str | bytes] = {
        "table.md": "\n".join(map(to_markdown, tables)),
        "table.tex": "\n".join(map(to_latex, tables)),
        "residual.csv": to_csv(residual_points(found)),
        "penalty.csv": to_csv(tables[1]),
        "half-steps.csv": to_csv(tables[2]),
        "residual.png": png(figures_theory.residual_lines(residuals)),
        "penalty.png": png(figures_theory.penalty_course(courses)),
        "half-steps.png": png(figures_theory.step_bars(bars, -settings.alpha2 / settings.alpha1)),
        "result.json": provenance(
            **made_with, residual=residual, penalty=csv_records(tables[1]), half_steps=csv_records(tables[2])
        ),
    }
    _write(out, files)
    return tables


def _course(f: Findings, field: int) -> tuple[list[int], list[float]]:
    found = [(w.epoch, w[field]) for w in f.weights]
    return [epoch for epoch, _ in found], [np.nan if value is None else float(value) for _, value in found]


def _mean(values: Sequence[float | None]) -> float | None:
    """Over the runs of a model; None where one has none."""
    return None if any(value is None for value in values) else float(np.mean(np.asarray(values, float)))


def _who(subject: Subject) -> tuple[str, str, int]:
    return subject.name, subject.method, subject.config.seed


def _names(subjects: Sequence[Subject]) -> list[str]:
    """The subjects in pictures: by model alone where there is one of each."""
    alone = len({s.name for s in subjects}) == len(subjects)
    return [s.name if alone else f"{s.name} {s.method} s{s.config.seed}" for s in subjects]


def _write(out: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        write_whole(out / name, content)


# --- inputs -----------------------------------------------------------------------------------------------------------

_NUMBERS = ("input gradient", "sensitivity", "parameter gradient", "ratio")


def inputs_table(found: Sequence[InputFindings], *, everything: bool) -> Table:
    """One row per subject and table of inputs at the best epoch, or at every place."""
    heads = (*_WHO, Column("epoch"), Column("loss"), Column("inputs"), Column("kind"))
    heads += (*(Column(name, ".3g") for name in _NUMBERS), Column("constant", ".3g"), Column("lemma holds"))
    rows = []
    for f in found:
        for epoch, numbers in f.places if everything else f.places[-1:]:
            for path, table in numbers.tables.items():
                holding = numbers.holding.get(path)
                said = None if holding is None else f"{holding} of {numbers.examples}"
                kind = "trained table" if f.trained else "features"
                row = (*_who(f.subject), epoch, numbers.loss, path, kind)
                rows.append((*row, *_numbers(numbers, path), table.constant, said))
    caption = (
        "Inputs at the best epoch. Input gradient: |dL/dX|, Frobenius; parameter gradient: |dL/dtheta|; ratio: of the "
        "two; sensitivity: mean over items of |x| |d(B L)/dx|, which does not move where X is multiplied and W divided "
        "by a number; constant: mean over items of (1 + |x|^2) / |W|^2 with the spectral norm of the first layer; "
        "lemma holds: for how many single examples |dL/dx|^2 (1 + |x|^2) / |W|^2 <= |dL/dtheta|^2. A trained table "
        "belongs to theta: nobody else can change it. Runs that stop at different losses differ in all of this for "
        "that alone."
    )
    return Table(caption, heads, tuple(rows))


def _numbers(numbers: InputNumbers, path: str) -> tuple[float, ...]:
    table = numbers.tables[path]
    return table.gradient, table.sensitivity, numbers.gradient, table.gradient / numbers.gradient


def equal_loss_table(found: Sequence[InputFindings]) -> Table | None:
    """One row per subject and table of inputs at the smallest loss that all runs of its model come down to.

    None where no model has runs with kept epochs only.
    """
    heads = (*_WHO, Column("loss"), Column("inputs"), *(Column(name, ".3g") for name in _NUMBERS))
    rows = []
    for model in dict.fromkeys(f.subject.name for f in found):
        of_model = [f for f in found if f.subject.name == model]
        if any(len(f.places) < 2 for f in of_model):
            continue
        for path in of_model[0].places[-1][1].tables:
            courses = [
                [(n.loss, dict(zip(_NUMBERS, _numbers(n, path), strict=True))) for _, n in sorted(f.places, key=_epoch)]
                for f in of_model
            ]
            loss = common_loss(courses)
            for f, course in zip(of_model, courses, strict=True):
                at = at_loss(course, loss) or {}
                rows.append((*_who(f.subject), loss, path, *(at.get(name) for name in _NUMBERS)))
    if not rows:
        return None
    caption = (
        "The same at equal loss of the measured batch: the smallest that every run of the model comes down to, "
        "interpolated between kept epochs. Nothing stands where a run was below it at its first kept epoch already."
    )
    return Table(caption, heads, tuple(rows))


def _epoch(place: tuple[int, InputNumbers]) -> int:
    return place[0]


def worst_table(found: Sequence[InputFindings]) -> Table | None:
    """One row per subject and size of change; None where no model's scores read its features."""
    scored = [f for f in found if f.worst]
    if not scored:
        return None
    metrics = list(scored[0].worst[0])
    rows = [
        (*_who(f.subject), float(size), *(row[name] for name in metrics))
        for f in scored
        for size, row in zip(WORST_CASE, f.worst, strict=True)
    ]
    caption = (
        "Test metrics after every item's features moved by this share of their length to where the training loss rises "
        "fastest; models whose scores read features."
    )
    return Table(caption, (*_WHO, Column("change", "g"), *map(Column, metrics)), tuple(rows))


def write_inputs(out: Path, found: Sequence[InputFindings], made_with: Mapping[str, Any]) -> list[Table]:
    """Write every table and the picture; returns the tables people read."""
    summary, equal, worst = inputs_table(found, everything=False), equal_loss_table(found), worst_table(found)
    tables = [table for table in (summary, equal, worst) if table is not None]
    files: dict[str, str | bytes] = {
        "table.md": "\n".join(map(to_markdown, tables)),
        "table.tex": "\n".join(map(to_latex, tables)),
        "inputs.csv": to_csv(inputs_table(found, everything=True)),
        "inputs.png": png(figures_theory.input_panels(_panels(found))),
        "result.json": provenance(
            **made_with,
            inputs=csv_records(summary),
            equal_loss=None if equal is None else csv_records(equal),
            worst_case=None if worst is None else csv_records(worst),
        ),
    }
    if worst is not None:
        files["worst-case.csv"] = to_csv(worst)
    _write(out, files)
    return tables


def _panels(found: Sequence[InputFindings]) -> list[tuple[str, str, dict[str, tuple[Any, Any]]]]:
    """Sensitivity and the inputs' gradient against the loss, and the first metric against the size of the change."""
    names = _names([f.subject for f in found])
    panels = []
    for y_name, field in (("relative sensitivity", "sensitivity"), ("|dL/dX|", "gradient")):
        lines = {}
        for name, f in zip(names, found, strict=True):
            for path in f.places[-1][1].tables:
                course = [n for _, n in sorted(f.places, key=_epoch)]
                values = [getattr(n.tables[path], field) for n in course]
                lines[f"{name}: {path}"] = ([n.loss for n in course], values)
        panels.append(("loss of the measured batch", y_name, lines))
    scored = {name: f.worst for name, f in zip(names, found, strict=True) if f.worst}
    if scored:
        metric = next(iter(next(iter(scored.values()))[0]))
        lines = {name: (list(WORST_CASE), [row[metric] for row in worst]) for name, worst in scored.items()}
        panels.append(("worst-case change, share of the features' length", f"test {metric}", lines))
    return panels
