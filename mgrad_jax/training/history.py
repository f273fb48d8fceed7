"""`history.csv` of a run, and the curves drawn from it."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from mgrad_jax.errors import UserError
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.fit import EpochReport
from mgrad_jax.training.record import write_text


class History:
    """`history.csv`, one row an epoch, on disk as soon as the epoch is over.

    Args:
        path: of the file.
        metrics: names of the metrics in the order of their columns; only `append` needs them.
    """

    def __init__(self, path: Path, metrics: Sequence[str] = ()) -> None:
        self.path = path
        self.metrics = metrics

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
        try:
            with self.path.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, row.keys(), lineterminator="\n")
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); free space and resume.") from None

    def rows(self) -> list[dict[str, float]]:
        """All complete rows in order."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            table = list(csv.DictReader(stream))
        # A kill may leave a last row cut short.
        complete = [row for row in table if None not in row.values() and None not in row]
        return [{name: float(value) for name, value in row.items()} for row in complete]

    def rewind(self, checkpoints: Checkpoints) -> None:
        """Bring rows and checkpoints to the same epoch, the latest that both have."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        recorded = len(self.rows())
        while (checkpoints.latest_epoch() or 0) > recorded:
            # The process died between the checkpoint and its row.
            checkpoints.discard_latest()
        kept = checkpoints.latest_epoch() or 0
        text = "\n".join(lines[: kept + 1]) + "\n" if kept else ""
        write_text(self.path.parent, self.path.name, text)
        (self.path.parent / "result.json").unlink(missing_ok=True)


def draw_curves(history: Path, path: Path, config: RunConfig) -> None:
    """Draw loss and recall over the epochs of a `history.csv`; the best epoch is marked."""
    from matplotlib.figure import Figure

    rows = History(history).rows()
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, metric = figure.subplots(1, 2)
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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); free space or choose another --out.") from None
