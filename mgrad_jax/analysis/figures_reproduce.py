"""The picture that only `reproduce` draws: test recall over alpha1 and alpha2, and what it has above replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def alpha_maps(table: pd.DataFrame, title: str, alphas: Sequence[float]) -> Figure:
    """Two maps an interval: the metric, and its difference to replay; the line alpha1 = alpha2, diverged cells hatched.

    Args:
        table: from `mgrad_jax.analysis.reproduce.alpha_grid`.
        title: model and data.
        alphas: both axes.
    """
    intervals = sorted(table["interval"].unique(), reverse=True)
    figure = Figure(figsize=(11, 4.6 * len(intervals)), layout="constrained")
    rows = figure.subplots(len(intervals), 2, squeeze=False)
    # Common to all intervals, so that they compare.
    test, most = table["test"], float(np.nanmax(np.abs(table["difference"].to_numpy()))) if len(table) else 0.0
    for axes, interval in zip(rows, intervals, strict=True):
        part = table[table["interval"] == interval]
        control = float(part["replay"].iloc[0])
        _map(axes[0], part, "test", alphas, ("viridis", float(test.min()), float(test.max())))
        axes[0].set_title(f"every {interval}: test recall@5", fontsize="medium")
        _map(axes[1], part, "difference", alphas, ("RdBu", -most or -1e-9, most or 1e-9))
        axes[1].set_title(f"every {interval}: difference to replay ({control:.4f})", fontsize="medium")
    figure.suptitle(f"{title}; hatched: diverged; dashed: alpha1 = alpha2", fontsize="medium")
    return figure


def _map(
    axes: Axes, part: pd.DataFrame, column: str, alphas: Sequence[float], colors: tuple[str, float, float]
) -> None:
    cells = part.pivot_table(index="alpha2", columns="alpha1", values=column, dropna=False)
    values = cells.reindex(index=list(alphas), columns=list(alphas)).to_numpy()
    name, low, high = colors
    image = axes.imshow(values, origin="lower", cmap=name, vmin=low, vmax=high)
    for (row, column_number), value in np.ndenumerate(values):
        if not np.isfinite(value):
            corner = (column_number - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="///", edgecolor="gray", linewidth=0))
            continue
        text = f"{value:+.4f}" if column == "difference" else f"{value:.4f}"
        red, green, blue = image.cmap(image.norm(value))[:3]
        is_light = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
        axes.text(
            column_number, row, text, ha="center", va="center", fontsize=7, color="black" if is_light else "white"
        )
    axes.axline((0, 0), slope=1, color="red", linestyle="--", linewidth=1)
    ticks = [f"{alpha:g}" for alpha in alphas]
    axes.set_xticks(range(len(alphas)), ticks)
    axes.set_yticks(range(len(alphas)), ticks)
    axes.set(xlabel="alpha1", ylabel="alpha2")
    axes.figure.colorbar(image, ax=axes)
