"""Pictures of the analyses; matplotlib is imported in `figures*.py` only."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mgrad_jax.analysis.convergence import Curve
from mgrad_jax.analysis.statistics import Spread

_AXES = {"epochs": "epoch", "evaluations": "gradient evaluations", "seconds": "seconds of training"}


def png(figure: Figure) -> bytes:
    """The picture; nothing in it depends on when or where it is drawn."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()


def convergence_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]], metric: str) -> Figure:
    """Loss and validation metric against epochs, gradient evaluations and seconds; two rows per model.

    Lines are means over seeds with a band of one standard deviation as far as all seeds train, and thin single lines
    from there on.

    Args:
        curves: the seeds' courses by training, by model.
        metric: name of the validation metric.
    """
    figure = Figure(figsize=(12, 5.5 * len(curves)), layout="constrained")
    rows = figure.subplots(2 * len(curves), len(_AXES), squeeze=False)
    for number, (model, trainings) in enumerate(curves.items()):
        for axes, what, name in zip(
            rows[2 * number : 2 * number + 2],
            ("loss", "valid"),
            ("training loss per batch", f"validation {metric}"),
            strict=True,
        ):
            for axis, (x, x_name) in zip(axes, _AXES.items(), strict=True):
                for color, (training, runs) in enumerate(trainings.items()):
                    _course(axis, runs, x, what, f"C{color}", training)
                axis.set(xlabel=x_name, ylabel=name)
            axes[0].set_title(model, loc="left", fontsize="medium")
        rows[2 * number][0].legend(fontsize="small")
    return figure


def _course(axis: Axes, runs: Sequence[Curve], x: str, what: str, color: str, name: str) -> None:
    """One training: what all its seeds reach as a mean with a band, the rest seed by seed."""
    shared = min(len(run.loss) for run in runs)
    values = np.stack([getattr(run, what)[:shared] for run in runs])
    places = _places(runs, x, shared)
    mean = values.mean(axis=0)
    axis.plot(places, mean, color=color, label=name)
    if len(runs) > 1:
        sd = values.std(axis=0, ddof=1)
        axis.fill_between(places, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)
    for run in runs:
        if len(run.loss) > shared:
            rest = slice(shared - 1, None)
            own = np.arange(1, len(run.loss) + 1) if x == "epochs" else getattr(run, x)
            axis.plot(own[rest], getattr(run, what)[rest], color=color, linewidth=0.6, alpha=0.6)


def _places(runs: Sequence[Curve], x: str, shared: int) -> np.ndarray:
    if x == "epochs":
        return np.arange(1, shared + 1)
    places: np.ndarray = np.stack([getattr(run, x)[:shared] for run in runs]).mean(axis=0)
    return places


def metric_bars(
    bars: Mapping[str, Mapping[str, Mapping[str, Spread]]], levels: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Mean and standard deviation of each training by model, one panel a metric.

    Args:
        bars: by metric, model and training.
        levels: by metric and name, drawn across: recommenders without training.
    """
    figure = Figure(figsize=(max(6.0, 4.2 * len(bars)), 4.2), layout="constrained")
    for axis, (metric, by_model) in zip(figure.subplots(1, len(bars), squeeze=False)[0], bars.items(), strict=True):
        trainings = list(dict.fromkeys(name for values in by_model.values() for name in values))
        width = 0.8 / max(1, len(trainings))
        for number, training in enumerate(trainings):
            found = [(place, v[training]) for place, v in enumerate(by_model.values()) if training in v]
            places = [place + (number - (len(trainings) - 1) / 2) * width for place, _ in found]
            errors = [s.sd or 0.0 for _, s in found]
            axis.bar(
                places, [s.mean for _, s in found], width, yerr=errors, capsize=2, label=training, color=f"C{number}"
            )
        for style, (name, level) in zip(("--", ":", "-."), levels[metric].items(), strict=False):
            axis.axhline(level, color="black", linewidth=0.8, linestyle=style, label=name)
        axis.set_xticks(range(len(by_model)), list(by_model))
        axis.set(ylabel=f"test {metric}")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


def band_curves(
    panels: Mapping[str, Mapping[str, tuple[Any, Any, Any]]],
    differences: Mapping[str, Mapping[str, tuple[Any, Any, Any]]],
    x: Sequence[float],
    x_name: str,
    logarithmic: bool,
) -> Figure:
    """Drops with their bands in the first row, differences between trainings in the second; one column a panel.

    Args:
        panels: (value, low, high), each (places,), by line, by panel.
        differences: the same; a second row is drawn where there are any.
        x: the places.
        x_name: what they are.
        logarithmic: place x at log(1 + x).
    """
    n_rows = 1 + any(differences.values())
    figure = Figure(figsize=(4.2 * len(panels), 3.6 * n_rows), layout="constrained")
    rows = figure.subplots(n_rows, len(panels), squeeze=False)
    places = np.log1p(np.asarray(x, float)) if logarithmic else np.asarray(x, float)
    for axes, lines_by_panel, name in zip(
        rows, (panels, differences), ("lost, %", "difference, % points"), strict=False
    ):
        for axis, (panel, lines) in zip(axes, lines_by_panel.items(), strict=True):
            for color, (line, values) in enumerate(lines.items()):
                value, low, high = (100 * np.asarray(v, float) for v in values)
                axis.plot(places, value, color=f"C{color}", marker=".", label=line)
                axis.fill_between(places, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
            axis.axhline(0, color="black", linewidth=0.6)
            axis.set_xticks(places, [f"{number:g}" for number in x])
            axis.tick_params(axis="x", labelrotation=60)
            axis.set(xlabel=x_name, ylabel=name, title=panel)
        handles, names = max((axis.get_legend_handles_labels() for axis in axes), key=lambda found: len(found[0]))
        if handles:  # beside the row: in a panel many names would cover the lines
            axes[-1].legend(handles, names, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
