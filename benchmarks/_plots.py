"""Bars with their spread, a panel for each value of one field and a colour for each value of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from _tables import Row
from matplotlib.figure import Figure


def bars(
    rows: Sequence[Row],
    panel: str,
    groups: Sequence[str],
    colour: str,
    value: Callable[[Row], tuple[float, float, float]],
    mark: Callable[[Row], float],
    label: str,
) -> Figure:
    """A bar for each row.

    Args:
        rows: what is drawn.
        panel, groups, colour: fields: of a panel, of the bars that stand together, of those of one colour.
        value: median, least and largest of a row.
        mark: where a black line goes through its bar.
        label: of the vertical axis.
    """
    panels, colours = (list(dict.fromkeys(row[name] for row in rows)) for name in (panel, colour))
    figure = Figure(figsize=(10, 3.4 * len(panels)), layout="constrained")
    width = 0.8 / len(colours)
    for axes, name in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        shown = [("\n".join(str(row[field]) for field in groups), row) for row in rows if row[panel] == name]
        places = list(dict.fromkeys(place for place, _ in shown))
        for number, one in enumerate(colours):
            mine = [(places.index(place), row) for place, row in shown if row[colour] == one]
            x = np.array([place for place, _ in mine]) + (number + 0.5) * width - 0.4
            middle, low, high = np.array([value(row) for _, row in mine]).reshape(-1, 3).T
            axes.bar(
                x, middle, 0.9 * width, yerr=[middle - low, high - middle], label=one, error_kw={"elinewidth": 0.8}
            )
            axes.hlines([mark(row) for _, row in mine], x - width / 2, x + width / 2, colors="black")
        axes.set_xticks(range(len(places)), places, fontsize=min(10, 120 / len(places)))
        axes.set_ylabel(label)
        axes.set_title(name)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(rows[0]["device"])
    return figure
