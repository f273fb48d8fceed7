"""Train several seeds of models, plain, with the replay control and mirrored; mean ± standard deviation and paired tests.

    python benchmarks/reproduce.py --data data/tiktok --models vbpr bm3 freedom --seeds 999 42 2024 \
        --output benchmarks/results/tiktok_runs.json

Every run stops early on validation Recall@5; its metrics are those of its best validation epoch on test. Run directories
lie under `--runs`, and what is finished there is not trained again, so that the command can be interrupted, repeated and
extended. The output is a JSON list with a row a run; the tables lie beside it as Markdown.

The paired test is over users: each user's metric is averaged over the seeds that both trainings have, and the
differences between the trainings are held against zero by a two-sided t-test. With `--reference FILE.csv` (columns model,
training, seed, test_recall@5 ...) each mean is marked `=` where it agrees with the reference's within 5% or two standard
errors of the difference, whichever is larger, and else with the relative difference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _report import RESULTS, Parser, device_name, exit_status, versions, write_json
from _settings import BATCH_SIZE, LEARNING_RATE, MIRROR, SETTINGS
from scipy import stats

from mgrad_jax import models
from mgrad_jax.cli.console import use_compilation_cache
from mgrad_jax.data import load_interactions
from mgrad_jax.evaluation.ranking import make_eval_split, per_user_metrics
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.methods import METHODS
from mgrad_jax.training.run import load_run, train_run

METRICS = ("recall@5", "recall@20", "ndcg@20")
PAIRED = ("recall@5", "recall@20")
COMPARISONS = (("mirror", "plain"), ("mirror", "replay"), ("replay", "plain"))


@exit_status
def main() -> None:
    """Train what is missing, then print and write rows and tables."""
    options = _options()
    use_compilation_cache()
    name = load_interactions(options.data).name
    configs = [
        _config(model, training, seed, name, options)
        for model in options.models
        for training in options.trainings
        for seed in options.seeds
    ]
    rows = []
    for config in configs:
        rows.append(_run(config))
        print(*(rows[-1][key] for key in ("model", "training", "seed", "epochs_run")), rows[-1]["test"], flush=True)
    write_json(options.output, rows)
    text = "\n\n".join([_markdown(_summary(rows, options.reference)), _markdown(_paired(configs))]) + "\n"
    options.output.with_suffix(".md").write_text(text)
    print(text)


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="a directory in MMRec format, or 'demo'")
    parser.add_argument("--models", nargs="+", choices=models.names(), default=["vbpr", "bm3", "freedom"])
    parser.add_argument("--trainings", nargs="+", choices=METHODS, default=["plain", "replay", "mirror"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[999, 42, 2024])
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--patience", type=int, default=20)
    parser.add_argument("--feature-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--reference", type=Path, help="CSV with a reference's runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--output", type=Path, default=RESULTS / "runs.json")
    return parser.parse_args()


def _config(model: str, training: str, seed: int, data: str, options: argparse.Namespace) -> RunConfig:
    narrow = "" if options.feature_dtype == "float32" else f"-{options.feature_dtype}"
    return RunConfig(
        model,
        options.data,
        training=training,
        **MIRROR,
        learning_rate=LEARNING_RATE,
        weight_decay=SETTINGS[model].weight_decay,
        batch_size=BATCH_SIZE,
        seed=seed,
        epochs=options.epochs,
        patience=options.patience,
        feature_dtype=options.feature_dtype,
        hyper_parameters=SETTINGS[model].hyper_parameters,
        out=str(options.runs / f"{model}-{data}-{training}-s{seed}{narrow}"),
    )


def _run(config: RunConfig) -> dict[str, Any]:
    """Train, or go on with, one run; its result and, beside it, every user's metrics on test."""
    result = train_run(config, resume=(config.directory / "config.yaml").exists())
    users_file = config.directory / "users.npz"
    if not users_file.exists():
        loaded = load_run(config.directory)
        vectors = loaded.vectors()
        users, metrics = per_user_metrics(make_eval_split(loaded.data, "test", config.ks), *vectors)
        np.savez(users_file, users=users, **{name: metrics[name] for name in PAIRED})
    kept = ("model", "training", "seed", "hyper_parameters", "epochs_run", "best_epoch", "valid", "test", "seconds")
    return {
        **{key: result[key] for key in kept},
        "data": result["data"],
        "feature_dtype": config.feature_dtype,
        "device": device_name(),
        "versions": versions(),
    }


def _summary(rows: list[dict[str, Any]], reference: Path | None) -> pd.DataFrame:
    """One line a model and training: mean ± standard deviation, and whether the reference's mean agrees."""
    runs = pd.DataFrame([{**row, **row["test"], "total": sum(row["seconds"].values())} for row in rows])
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
        line["seconds a run"] = f"{group['total'].median():.0f}"
        lines.append(line)
    return pd.DataFrame(lines)


def _reference(path: Path | None) -> dict[tuple[str, str], pd.DataFrame]:
    if path is None:
        return {}
    table = pd.read_csv(path)
    return {(str(model), str(training)): group for (model, training), group in table.groupby(["model", "training"])}


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> str:
    difference = ours.mean() - theirs.mean()
    error = np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
    if abs(difference) <= max(0.05 * theirs.mean(), 2 * error):
        return "(=)"
    return f"({difference / theirs.mean():+.0%})"


def _paired(configs: list[RunConfig]) -> pd.DataFrame:
    """One line a model and pair of trainings: mean difference of each metric and the test's p."""
    by_run = {(c.model, c.training, c.seed): np.load(c.directory / "users.npz") for c in configs}
    lines = []
    for model in dict.fromkeys(c.model for c in configs):
        for ours, other in COMPARISONS:
            seeds = [c.seed for c in configs if (c.model, c.training) == (model, ours)]
            seeds = [seed for seed in seeds if (model, other, seed) in by_run]
            if not seeds:
                continue
            line: dict[str, Any] = {"model": model, "difference": f"{ours} - {other}", "seeds": len(seeds)}
            for metric in PAIRED:
                a, b = (
                    np.mean([by_run[model, name, seed][metric] for seed in seeds], axis=0) for name in (ours, other)
                )
                p = stats.ttest_rel(a, b).pvalue
                line[metric] = f"{(a - b).mean():+.4f} (p = {p:.2g})"
            lines.append({**line, "users": len(a)})
    return pd.DataFrame(lines)


def _markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
