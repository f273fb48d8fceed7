"""Train the paper's settings over several seeds and print mean ± standard deviation, plain, replay and mirrored.

    python benchmarks/reproduce.py --data data/tiktok --models vbpr bm3 freedom --seeds 999 42 2024 \
        --output benchmarks/results/tiktok_runs.json

Every run stops early on validation Recall@5; the metrics are those of its best validation epoch on test. Finished runs
are kept in the output file, so that the command can be interrupted and repeated. With `--reference FILE.csv` (columns
model, training, seed, test_recall@5 ...) each mean is held against the reference's: the difference must be within 5%
or two standard errors of the difference, whichever is larger.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _report import device_name, versions

from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.training.sweep import Member, MemberResult, sweep

SETTINGS: dict[str, dict[str, Any]] = {
    "vbpr": {"reg_weight": 1e-3},
    "bm3": {"n_layers": 1, "dropout": 0.3, "reg_weight": 0.1},
    "freedom": {"dropout": 0.8, "reg_weight": 1e-3},
}
METRICS = ("recall@5", "recall@20", "ndcg@5", "ndcg@20", "precision@5", "map@5")


def main() -> int:
    """Run what is missing, then print and write the table."""
    options = _options()
    data = load_interactions(options.data)
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    done = {(row["model"], row["training"], row["seed"]) for row in rows}
    for model in options.models:
        for training in options.trainings:
            base = Member(model, SETTINGS.get(model, {}), training=training)
            members = [replace(base, seed=seed) for seed in options.seeds if (model, training, seed) not in done]
            if members:
                _train(data, members, rows, options)
    print(_markdown(_summary(rows, options.reference)))
    return 0


def _train(data: Interactions, members: list[Member], rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """One program, one member after another; every result is written as soon as it is there."""
    started = time.perf_counter()

    def keep(_: int, result: MemberResult) -> None:
        nonlocal started
        rows.append(_row(result, data.name, time.perf_counter() - started))
        started = time.perf_counter()
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
        print(result.member.model, result.member.training, result.member.seed, result.test, flush=True)

    sweep(data, members, epochs=options.epochs, patience=options.patience, slots=1, on_result=keep)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a directory in MMRec format, or 'demo'")
    parser.add_argument("--models", nargs="+", default=list(SETTINGS))
    parser.add_argument("--trainings", nargs="+", default=["plain", "replay", "mirror"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[999, 42, 2024])
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--patience", type=int, default=20)
    parser.add_argument("--reference", type=Path, help="CSV with a reference's runs")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def _row(result: MemberResult, data: str, seconds: float) -> dict[str, Any]:
    member = result.member
    return {
        "model": member.model,
        "training": member.training,
        "seed": member.seed,
        "data": data,
        "hyper_parameters": dict(member.hyper_parameters),
        "epochs_run": result.epochs_run,
        "best_epoch": result.best_epoch,
        "valid": result.valid,
        "test": result.test,
        "seconds": seconds,
        "device": device_name(),
        "versions": versions(),
    }


def _summary(rows: list[dict[str, Any]], reference: Path | None) -> pd.DataFrame:
    """One line a model and training: mean ± standard deviation, and whether the reference's mean agrees."""
    runs = pd.DataFrame([{**row, **row["test"]} for row in rows])
    theirs = _reference(reference)
    lines = []
    for (model, training), group in runs.groupby(["model", "training"], sort=False):
        line: dict[str, Any] = {"model": model, "training": training, "seeds": len(group)}
        for metric in METRICS:
            line[metric] = f"{group[metric].mean():.4f} ± {group[metric].std(ddof=1):.4f}"
            other = theirs.get((model, training))
            if other is not None:
                line[metric] += " " + _agreement(group[metric].to_numpy(), other[f"test_{metric}"].to_numpy())
        line["epochs run"] = ", ".join(map(str, group["epochs_run"]))
        line["seconds a run"] = f"{group['seconds'].median():.0f}"
        lines.append(line)
    return pd.DataFrame(lines)


def _reference(path: Path | None) -> dict[tuple[str, str], pd.DataFrame]:
    if path is None:
        return {}
    table = pd.read_csv(path)
    names = {"MG": "mirror"}
    return {
        (str(model).lower(), names.get(str(training), str(training))): group
        for (model, training), group in table.groupby(["model", "training"])
    }


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> str:
    """`=` where the means agree within 5% or two standard errors of their difference, else the relative difference."""
    difference = ours.mean() - theirs.mean()
    error = np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
    if abs(difference) <= max(0.05 * theirs.mean(), 2 * error):
        return "(=)"
    return f"({difference / theirs.mean():+.0%})"


def _markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
