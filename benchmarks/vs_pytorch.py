"""Time the published PyTorch trainer and this library on the same data, and put the metrics beside the times.

    python benchmarks/vs_pytorch.py --reference PATH --data data/tiktok --models freedom bm3 vbpr --epochs 6
    python benchmarks/vs_pytorch.py --reference PATH --data data/tiktok --models vbpr --epochs 1000 --seed 1

PATH is a checkout of https://github.com/Qrange-group/Mirror-Gradient; `--reference-python` an interpreter that has
torch, numpy, scipy, pandas and pyyaml, and torch_geometric for MMGCN, GRCN, DualGNN and DRAGON. The checkout is run
unchanged, as a subprocess (`_published.py`). Both sides get the same interactions and features, batch size, optimizer,
seed, device and processor cores, train for exactly `--epochs` epochs, or stop early on validation Recall@5 with
`--patience`, and evaluate validation and test after each epoch. They take turns, each alone on the machine, `--repeats`
times; the first epoch of every run is left out. An epoch runs from the resampling of the graph to the last update, ours
without compilation; an evaluation is one split, the mean of validation and test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _frame import Benchmark, Parser, in_own_process, say
from _machine import commit, cores, device_name, versions
from _published import limit_cores
from _reference import lay_out, reference_source
from _settings import BATCH_SIZE, EMBEDDING, FEATURED, LEARNING_RATE, MIRROR, SETTINGS, SOURCES, dataset
from _tables import Row
from _timing import spread

from mgrad_jax.data import load_interactions
from mgrad_jax.training import fit
from mgrad_jax.training.config import RunConfig

PUBLISHED = [name for name, setting in SETTINGS.items() if setting.published]
SIDES = ("published", "ours")
LIMITS = ("seed", "batch_size", "epochs", "patience")
USER_GRAPH_MODELS = {"dualgnn", "dragon"}
HERE = Path(__file__).resolve().parent


def _options(parser: Parser) -> None:
    parser.add_argument("--reference", type=Path, help="checkout of the published trainer")
    parser.add_argument("--reference-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--data", default="demo", help=SOURCES)
    parser.option("--models", FEATURED, "models", ["vbpr"], choices=PUBLISHED)
    parser.option("--trainings", ["plain", "mirror"], "trainings", choices=["plain", "mirror", "replay"])
    parser.number("--epochs", 6, "epochs, of which the first is left out", 2, least=2)
    parser.add_argument("--patience", type=int, help="epochs without improvement before stopping; never by default")
    parser.number("--repeats", 1, "runs of each side; they take turns")
    parser.number("--batch-size", BATCH_SIZE, "interactions per batch")
    parser.option("--seed", 999, "seed", type=int)
    parser.option("--device", "cpu", "device", choices=["cpu", "gpu"])
    parser.number("--threads", cores(), "processor cores for either side")


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    source = reference_source(options.reference)
    options.patience = options.epochs if options.patience is None else options.patience
    common = {"threads": options.threads, "device": options.device}
    limits = {name: getattr(options, name) for name in LIMITS}
    data = dataset(options.data)
    with tempfile.TemporaryDirectory(prefix="vs_pytorch_") as name:
        folder = Path(name)
        files = lay_out(folder, source, data, not USER_GRAPH_MODELS.isdisjoint(options.models))
        for model in options.models:
            for training in options.trainings:
                config = {**files, **published_config(model, training, options)}
                ours = {"data": str(folder / "data" / data.name), "model": model, "training": training, **limits}
                theirs: Row = {"source": str(source), "model": SETTINGS[model].published, "dataset": data.name}
                theirs |= {"config": config, "mirror": training != "plain"}
                jobs = {"published": {**theirs, **common}, "ours": {**ours, **common}}
                records: dict[str, list[Row]] = {side: [] for side in SIDES}
                for repeat in range(options.repeats):
                    for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                        say(f"{model}, {training}: {side}")
                        records[side].append(_run(side, jobs[side], folder, options))
                yield _rows(records, {"model": model, "training": training, "data": data.name}, options)


def published_config(model: str, training: str, options: argparse.Namespace) -> dict[str, Any]:
    """Overrides of the trainer's configuration files, with a single setting in place of its grid."""
    setting = SETTINGS[model]
    # A second pass along the gradient, +1, is to the trainer one against it with the factor -1.
    factors = {"mirror": (MIRROR["alpha1"], MIRROR["alpha2"]), "replay": (1.0, -1.0)}.get(training)
    passes = {} if factors is None else {"alpha1": factors[0], "alpha2": factors[1], "beta": MIRROR["interval"]}
    grid = {**setting.hyper_parameters, **passes, "seed": options.seed}
    return {
        **setting.published_only,
        "use_gpu": options.device == "gpu",
        "gpu_id": 0,
        "epochs": options.epochs,
        "stopping_step": options.patience,
        "train_batch_size": options.batch_size,
        "learner": "adam",
        "learning_rate": LEARNING_RATE,
        "weight_decay": setting.weight_decay,
        "embedding_size": EMBEDDING,
        "hyper_parameters": list(grid),
        **{name: [value] for name, value in grid.items()},
    }


def _run(side: str, job: dict[str, Any], folder: Path, options: argparse.Namespace) -> Row:
    """Run one side in a process of its own, with as many threads as it has cores; returns what it recorded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(options.threads))}
    environment["JAX_PLATFORMS"] = "cpu" if options.device == "cpu" else "cuda"
    what = f"{side} {job['model']}"
    if side == "ours":
        return in_own_process([sys.executable, str(HERE / "vs_pytorch.py"), "--job"], job, what, env=environment)
    python = shutil.which(options.reference_python) or options.reference_python
    return in_own_process([python, str(HERE / "_published.py")], job, what, cwd=folder / "run", env=environment)


def _train_ours(job: dict[str, Any]) -> Row:
    """Our side of one run: train, and report what the trainer does."""
    limit_cores(job["threads"])
    started = time.perf_counter()
    data = load_interactions(job["data"])
    setting = SETTINGS[job["model"]]
    limits = {name: job[name] for name in LIMITS}
    config = RunConfig(
        job["model"],
        job["data"],
        training=job["training"],
        **MIRROR,
        learning_rate=LEARNING_RATE,
        weight_decay=setting.weight_decay,
        **limits,
        hyper_parameters={"embedding_dim": EMBEDDING, **setting.hyper_parameters},
    )
    model, tx = config.create_model(data), config.transformation(data)
    result = fit(model, data, tx, **limits)
    return {
        "epochs": [report.seconds_train for report in result.history],
        # A report covers both splits; an evaluation is one of them.
        "evaluations": [report.seconds_evaluate / 2 for report in result.history for _ in range(2)],
        "valid": result.valid,
        "test": result.test,
        "seconds_run": time.perf_counter() - started,
        "seconds_compile": result.seconds["compile"],
        "versions": versions(),
        "device": device_name(),
    }


def _rows(records: dict[str, list[Row]], key: dict[str, str], options: argparse.Namespace) -> list[Row]:
    """A row for each side: times over all its runs, without each run's first epoch, and its metrics (alike in all)."""
    mirror = MIRROR if key["training"] == "mirror" else {}
    rows = []
    for side in SIDES:
        first = records[side][0]
        row = {
            **key,
            "side": side,
            "commit": commit(),
            "seconds_per_epoch": spread([x for record in records[side] for x in record["epochs"][1:]]),
            "seconds_per_evaluation": spread([x for record in records[side] for x in _both_splits(record)[1:]]),
            "seconds_compile": first.get("seconds_compile", 0.0),
            "seconds_run": spread([record["seconds_run"] for record in records[side]]),
            "epochs_run": len(first["epochs"]),
            "hyper_parameters": {**SETTINGS[key["model"]].hyper_parameters, **mirror},
            "metrics": {"valid": first["valid"], "test": first["test"]},
            "device": first["device"] or records["ours"][0]["device"],
            "versions": first["versions"],
        }
        rows.append(row)
        for ratio, seconds in (("ratio", "seconds_per_epoch"), ("ratio_evaluation", "seconds_per_evaluation")):
            row[ratio] = rows[0][seconds]["median"] / row[seconds]["median"]
    return rows


def _both_splits(record: Row) -> list[float]:
    """Seconds for one split after each epoch: the mean of validation and test, which differ in size."""
    return [float(mean) for mean in np.reshape(record["evaluations"], (-1, 2)).mean(axis=1)]


if __name__ == "__main__":
    sys.exit(Benchmark("vs_pytorch", __doc__, _measure, _options, own_processes=True, job=_train_ours).main())
