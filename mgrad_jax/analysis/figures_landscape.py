"""Pictures of loss surfaces, and of flatness along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_LEVELS = 15


class Panel(NamedTuple):
    """A surface: its title, the places along both directions, and the losses (a, b)."""

    title: str
    a: np.ndarray
    b: np.ndarray
    losses: np.ndarray


class Course(NamedTuple):
    """One number along one run: training losses and values by epoch, and which of them is the best epoch."""

    losses: np.ndarray
    values: np.ndarray
    best: int


def contours(rows: Mapping[str, Sequence[Panel]]) -> Figure:
    """Contours of every training's surface; the panels of a row share their levels and colours.

    Args:
        rows: panels by what is drawn.
    """
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(3.3 * columns + 1.0, 3.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (name, panels) in zip(grid, rows.items(), strict=True):
        levels = _levels(panels)
        for axis, panel in zip(axes, panels, strict=False):
            drawn = axis.contourf(panel.b, panel.a, panel.losses, levels=levels, cmap="viridis")
            axis.contour(panel.b, panel.a, panel.losses, levels=levels, colors="white", linewidths=0.4)
            axis.plot(0, 0, marker="+", color="red")
            axis.set(title=panel.title, xlabel="b", aspect="equal")
            axis.title.set_fontsize("small")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        axes[0].set_ylabel("a")
        figure.colorbar(drawn, ax=list(axes), label=name)
    return figure


def surfaces(rows: Mapping[str, Sequence[Panel]]) -> Figure:
    """The same in three dimensions; the panels of a row share their heights and colours."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(3.8 * columns, 3.6 * len(rows)), layout="constrained")
    for number, (name, panels) in enumerate(rows.items()):
        levels = _levels(panels)
        for place, panel in enumerate(panels):
            axis = figure.add_subplot(len(rows), columns, number * columns + place + 1, projection="3d")
            a, b = np.meshgrid(panel.a, panel.b, indexing="ij")
            low, high = levels[0], levels[-1]
            axis.plot_surface(b, a, panel.losses, cmap="viridis", vmin=low, vmax=high, linewidth=0)
            axis.set(title=panel.title, xlabel="b", ylabel="a", zlim=(low, high))
            axis.title.set_fontsize("small")
            axis.tick_params(labelsize="x-small")
            for other in (axis.xaxis, axis.yaxis, axis.zaxis):
                other.set_major_locator(MaxNLocator(4))
            if place == 0:
                axis.text2D(-0.02, 0.5, name, transform=axis.transAxes, rotation=90, va="center")
    return figure


def _levels(panels: Sequence[Panel]) -> np.ndarray:
    """Common to some panels, whatever is finite in them."""
    values = np.concatenate([panel.losses.ravel() for panel in panels])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    high = high if high > low else low + max(abs(low), 1.0) * 1e-6
    return np.asarray(MaxNLocator(_LEVELS).tick_values(low, high))


def progress(
    panels: Mapping[str, Mapping[str, Sequence[Course]]], equal_loss: float | None, title: str, columns: int = 4
) -> Figure:
    """Every flatness number against the training loss, which falls to the right; one line per training and seed.

    Args:
        panels: the seeds' courses by training, by number.
        equal_loss: where the trainings are compared, a vertical line.
        title: the model.
        columns: panels side by side.
    """
    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * n_rows + 0.6), layout="constrained")
    axes = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for axis, (name, trainings) in zip(axes, panels.items(), strict=False):
        for number, (training, courses) in enumerate(trainings.items()):
            for seed, course in enumerate(courses):
                _course(axis, course, f"C{number}", training if seed == 0 else None)
        if equal_loss is not None:
            axis.axvline(equal_loss, color="black", linewidth=0.7, linestyle=":")
        low, high = axis.get_ylim()
        if low < 0 < high:
            axis.axhline(0, color="black", linewidth=0.4)
        axis.invert_xaxis()
        axis.set_title(name, fontsize="small")
        axis.ticklabel_format(axis="y", scilimits=(-1, 3))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("training loss")
    figure.suptitle(title, fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize="small")
    return figure


def _course(axis: Axes, course: Course, color: str, name: str | None) -> None:
    """One run; a ring marks its best epoch."""
    axis.plot(course.losses, course.values, color=color, marker=".", markersize=4, linewidth=1, label=name)
    best = slice(course.best, course.best + 1)
    axis.plot(course.losses[best], course.values[best], color=color, marker="o", fillstyle="none", linestyle="none")
