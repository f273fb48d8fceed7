"""What came of a sweep: a row per member, a row per setting, the best setting, and a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mgrad_jax.files import written_whole
from mgrad_jax.training.grid import SweepConfig


class SweepOutcome(NamedTuple):
    """What a sweep found.

    Attributes:
        results: one row per member.
        summary: one row per setting, the best first.
        best: the content of `best.json`.
    """

    results: pd.DataFrame
    summary: pd.DataFrame
    best: dict[str, Any]


def outcome_of(config: SweepConfig, records: Sequence[Mapping[str, Any]]) -> SweepOutcome:
    """The tables of a sweep, of its members' results in their order, and its best setting."""
    results = _results(config, records)
    summary = _summary(config, results)
    top, names = summary.iloc[0], config.base.metric_names
    chosen = results[_same_setting(results, top, config.axes)]
    best = {
        "setting": {axis: _plain(top[axis]) for axis in config.axes},
        "metric": config.base.metric,
        "seeds": [int(seed) for seed in chosen["seed"]],
        "members": chosen["member"].tolist(),
        **{
            split: {name: {k: _plain(top[f"{split}_{name}_{k}"]) for k in ("mean", "std")} for name in names}
            for split in ("valid", "test")
        },
    }
    return SweepOutcome(results, summary, best)


def _results(config: SweepConfig, records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per member."""
    names = config.base.metric_names
    rows = [
        {
            "member": f"{index:04d}",
            **config.setting(member),
            "seed": member.seed,
            "epochs_run": record["epochs_run"],
            "best_epoch": record["best_epoch"],
            "diverged": record["diverged"],
            **{f"{split}_{name}": record[split].get(name) for split in ("valid", "test") for name in names},
            "seconds": round(sum(record["seconds"].values()), 3),
        }
        for index, (member, record) in enumerate(zip(config.members(), records, strict=True))
    ]
    return pd.DataFrame(rows)


def _summary(config: SweepConfig, results: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, the best first; a setting with a member that diverged comes after those without."""
    metrics = [f"{split}_{name}" for split in ("valid", "test") for name in config.base.metric_names]
    rows = []
    for _, part in results.groupby(config.axes or (lambda _: 0), sort=False, dropna=False):
        values = part[metrics].astype(float)
        row = {**part.iloc[0][config.axes].to_dict(), "seeds": len(part), "diverged": int(part["diverged"].sum())}
        for name in metrics:
            row[f"{name}_mean"], row[f"{name}_std"] = values[name].mean(), values[name].std()
        rows.append(row)
    table = pd.DataFrame(rows)
    order = np.lexsort((-table[f"valid_{config.base.metric}_mean"].fillna(-1.0), table["diverged"] > 0))
    return table.iloc[order].reset_index(drop=True)


def _same_setting(results: pd.DataFrame, setting: pd.Series, axes: Sequence[str]) -> np.ndarray:
    same = np.ones(len(results), bool)
    for axis in axes:
        value = setting[axis]
        same &= results[axis].isna().to_numpy() if pd.isna(value) else (results[axis] == value).to_numpy()
    return same


def _plain(value: Any) -> Any:
    """A cell as JSON has it: no NaN, no numpy."""
    if isinstance(value, (float, np.floating)) and np.isnan(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def draw_heatmap(summary: pd.DataFrame, path: Path, config: SweepConfig) -> None:
    """Draw the mean selection metric on validation over alpha1 and alpha2; other axes take their best value."""
    from matplotlib.figure import Figure

    metric = f"valid_{config.base.metric}_mean"
    table = summary.pivot_table(index="alpha2", columns="alpha1", values=metric, aggfunc="max")
    values = table.to_numpy()
    figure = Figure(figsize=(1.6 + 0.9 * values.shape[1], 1.6 + 0.6 * values.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "black" if value > middle else "white"
            weight = "bold" if value == np.nanmax(values) else "normal"
            axes.text(column, row, f"{value:.4f}", ha="center", va="center", color=color, fontweight=weight)
    axes.set(xlabel="alpha1", ylabel="alpha2", title=f"{config.base.model}, validation {config.base.metric}")
    axes.set_xticks(range(values.shape[1]), [f"{x:g}" for x in table.columns])
    axes.set_yticks(range(values.shape[0]), [f"{x:g}" for x in table.index])
    figure.colorbar(image)
    with written_whole(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)
