"""`history.csv` of a run, and the curves drawn from it."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgrad_jax.files import Damaged, read_whole, write_whole, written_whole

if TYPE_CHECKING:
    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.fit import EpochReport


@dataclass
class History:
    """The content of `history.csv`: one row per epoch.

    Every checkpoint holds the text as of its epoch, so the file can always be made again.

    Attributes:
        metrics: names of the metrics in the order of their columns.
        text: the rows so far, under their header.
    """

    metrics: Sequence[str]
    text: str = ""

    def append(self, report: EpochReport) -> None:
        """Add the row of an epoch, and the header before the first."""
        metrics = {"valid": report.valid, "test": report.test}
        row = {
            "epoch": report.epoch,
            "loss": report.loss,
            **{f"loss_{name}": value for name, value in report.parts.items()},
            **{f"{split}_{name}": values[name] for split, values in metrics.items() for name in self.metrics},
            "seconds_train": round(report.seconds_train, 6),
            "seconds_evaluate": round(report.seconds_evaluate, 6),
        }
        stream = io.StringIO()
        writer = csv.DictWriter(stream, row.keys(), lineterminator="\n")
        if not self.text:
            writer.writeheader()
        writer.writerow(row)
        self.text += stream.getvalue()

    def rows(self) -> list[dict[str, float]]:
        """All rows in order."""
        table = csv.DictReader(io.StringIO(self.text))
        return [{name: float(value) for name, value in row.items()} for row in table]

    def rewind(self, epoch: int) -> None:
        """Keep the rows up to an epoch."""
        header, *rows = self.text.splitlines(keepends=True) or [""]
        rows = [row for row in rows if int(row.partition(",")[0]) <= epoch]
        self.text = "".join([header, *rows]) if rows else ""

    def restore(self, path: Path) -> None:
        """Make the file hold these rows, if it does not.

        Raises:
            UserError: it can be neither read nor written.
        """
        with contextlib.suppress(FileNotFoundError, Damaged):
            if read_whole(path) == self.text:
                return
        write_whole(path, self.text)


def read_rows(path: Path) -> str:
    """The text of a `history.csv` up to its first row that is damaged; empty where there is none."""
    try:
        lines = read_whole(path).splitlines()
    except (FileNotFoundError, Damaged):
        return ""
    header, kept = lines[0].split(",") if lines else [], lines[:1]
    if header[:2] != ["epoch", "loss"]:
        return ""
    for number, line in enumerate(lines[1:], start=1):
        try:
            values = [float(value) for value in line.split(",")]
        except ValueError:
            break
        if len(values) != len(header) or values[0] != number:
            break
        kept.append(line)
    return "\n".join(kept) + "\n" if len(kept) > 1 else ""


def draw_curves(history: History, path: Path, config: RunConfig) -> None:
    """Draw loss and recall over the epochs; the best epoch is marked."""
    from matplotlib.figure import Figure

    rows = history.rows()
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4))
    # A constrained layout finds its margins by drawing all of it one more time.
    loss, metric = figure.subplots(1, 2, gridspec_kw={"left": 0.1, "right": 0.98, "wspace": 0.25})
    loss.plot(epochs, [row["loss"] for row in rows], color="tab:gray")
    loss.set(xlabel="epoch", ylabel="training loss, summed over batches")
    recalls = {f"recall@{k}" for k in config.ks if k in (5, 20)} | {config.metric}
    for color, name in zip(("tab:blue", "tab:orange", "tab:green"), sorted(recalls), strict=False):
        metric.plot(epochs, [row[f"valid_{name}"] for row in rows], color=color, label=f"validation {name}")
        metric.plot(epochs, [row[f"test_{name}"] for row in rows], color=color, linestyle="--", label=f"test {name}")
    best = max(rows, key=lambda row: row[f"valid_{config.metric}"])["epoch"]
    metric.axvline(best, color="black", linewidth=0.8, linestyle=":", label=f"best epoch {best:.0f}")
    metric.set(xlabel="epoch", ylabel="metric")
    metric.legend(fontsize="small")
    figure.suptitle(f"{config.summary}, seed {config.seed}", fontsize="medium")
    with written_whole(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)
