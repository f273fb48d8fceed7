"""The pictures of `theory`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def residual_lines(lines: Mapping[str, tuple[np.ndarray, np.ndarray, float | None]]) -> Figure:
    """Residuals over learning rates, both logarithmic, each beside the slope that the theorem says.

    Args:
        lines: steps, residuals and measured slope (None: lost in rounding) by name.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    for number, (name, (steps, residuals, slope)) in enumerate(lines.items()):
        said = "lost in rounding" if slope is None else f"slope {slope:.3f}"
        axis.loglog(steps, residuals, "o", color=f"C{number}", label=f"{name}: {said}")
        if slope is not None:
            axis.loglog(steps, residuals[0] * (steps / steps[0]) ** 3, color=f"C{number}", linewidth=0.8)
    axis.plot([], [], color="black", linewidth=0.8, label="slope 3 through the smallest step")
    axis.set(xlabel="learning rate", ylabel="residual of Theorem 3.2")
    axis.legend(fontsize="small")
    return figure


def penalty_course(lines: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]) -> Figure:
    """The penalty's weight beside the loss over the epochs, one panel a preconditioner.

    Args:
        lines: (epochs, weights) by name, by preconditioner.
    """
    figure = Figure(figsize=(5.2 * len(lines), 4.2), layout="constrained")
    for axis, (title, by_name) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for number, (name, (epochs, weights)) in enumerate(by_name.items()):
            axis.semilogy(epochs, weights, marker=".", color=f"C{number}", label=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="epoch", ylabel="weight of the penalty beside the loss", title=title)
        axis.legend(fontsize="small")
    return figure


def step_bars(bars: Mapping[str, Mapping[str, float]], expected: float) -> Figure:
    """The second half-step's projection on the first, by optimizer; above 0 it goes the same way.

    Args:
        bars: projections by optimizer, by model.
        expected: what gradient descent has, drawn across.
    """
    figure = Figure(figsize=(max(6.4, 0.9 * max(map(len, bars.values()))), 4.4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(bars)
    names = list(next(iter(bars.values())))
    for number, (model, values) in enumerate(bars.items()):
        places = np.arange(len(names)) + (number - (len(bars) - 1) / 2) * width
        axis.bar(places, [values.get(name, np.nan) for name in names], width, label=model, color=f"C{number}")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(expected, color="black", linewidth=0.8, linestyle="--", label="-alpha2 / alpha1")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="small")
    axis.set(ylabel="projection of the second half-step on the first")
    axis.legend(fontsize="small")
    return figure


def input_panels(panels: Sequence[tuple[str, str, Mapping[str, tuple[Any, Any]]]]) -> Figure:
    """Lines with markers, a panel each.

    Args:
        panels: name of x, name of y, and (x, y) by line.
    """
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (x_name, y_name, lines) in zip(axes, panels, strict=True):
        for number, (name, (x, y)) in enumerate(lines.items()):
            axis.plot(x, y, marker="o" if len(x) == 1 else ".", color=f"C{number % 10}", label=name)
        axis.set(xlabel=x_name, ylabel=y_name)
        axis.legend(fontsize="x-small")
    return figure
