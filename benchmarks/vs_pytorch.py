"""Time the published PyTorch trainer and this library on the same data, and put the metrics beside the times.

    python benchmarks/vs_pytorch.py --reference PATH --data data/tiktok --models freedom bm3 vbpr --epochs 6 \
        --output benchmarks/results/vs_pytorch.json
    python benchmarks/vs_pytorch.py --reference PATH --data data/tiktok --models vbpr --epochs 1000 --patience 20 --seed 1

PATH is a checkout of https://github.com/Qrange-group/Mirror-Gradient; `--reference-python` an interpreter that has
torch, numpy, scipy, pandas and pyyaml, and torch_geometric for MMGCN, GRCN, DualGNN and DRAGON. The checkout is run
unchanged, as a subprocess (`_published.py`). Both sides get the same interactions and features, batch size, optimizer,
seed, device and processor cores, train for exactly `--epochs` epochs, or stop early on validation Recall@5 with
`--patience`, and evaluate validation and test after each epoch. They take turns, each alone on the machine, `--repeats`
times; the first epoch of every run is left out. An epoch runs from the resampling of the graph to the last update; an
evaluation is one split, the mean of validation and test. Our compile time is reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _published import limit_cores
from _report import RESULTS, Parser, cores, device_name, exit_status, spread, spread_cell, versions, write_json
from _settings import BATCH_SIZE, EMBEDDING, LEARNING_RATE, MIRROR, SETTINGS
from rich.console import Console
from rich.table import Table

from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.data.user_graph import build_user_graph
from mgrad_jax.errors import UserError
from mgrad_jax.training import fit
from mgrad_jax.training.config import RunConfig

PUBLISHED = [name for name, setting in SETTINGS.items() if setting.published]
TRAININGS = ("plain", "mirror", "replay")
SIDES = ("published", "ours")
SHOWN = ("recall@5", "recall@20")
USER_GRAPH, USER_GRAPH_MODELS = "user_graph_dict.npy", ("dualgnn", "dragon")
HERE = Path(__file__).resolve().parent


@exit_status
def main() -> None:
    """Run the comparison, or, as a subprocess of it, our side of one run."""
    options = _options()
    if options.job is not None:
        _train_ours(json.loads(options.job.read_text()))
    else:
        _compare(options)


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--reference", type=Path, help="checkout of the published trainer")
    parser.add_argument("--reference-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--data", default="demo", help="a directory in MMRec format, or 'demo'")
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=["vbpr", "bm3", "freedom"])
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=["plain", "mirror"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--patience", type=int, help="epochs without improvement before stopping; never by default")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side; they take turns")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--seed", type=int, default=999)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=cores(), help="processor cores for either side")
    parser.add_argument("--output", type=Path, default=RESULTS / "vs_pytorch.json")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(options: argparse.Namespace) -> None:
    source = published_source(options.reference)
    for name, value, least in (("--epochs", options.epochs, 2), ("--repeats", options.repeats, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least} (the first epoch is left out).")
    data = load_interactions(options.data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vs_pytorch_") as folder:
        files = lay_out(Path(folder), source, data, not set(USER_GRAPH_MODELS).isdisjoint(options.models))
        for model in options.models:
            for training in options.trainings:
                rows += _pair(Path(folder), source, files, data.name, model, training, options)
                write_json(options.output, rows)
    _print_table(rows)


def published_source(reference: Path | None) -> Path:
    """The `src` folder of a checkout; anything else is a `UserError`."""
    if reference is None:
        raise UserError("--reference is missing; give a checkout of github.com/Qrange-group/Mirror-Gradient.")
    for source in (reference / "src", reference):
        if all((source / part).exists() for part in ("common/trainer.py", "utils/quick_start.py", "configs")):
            return source.resolve()
    raise UserError(
        f"--reference {reference} holds no src/common/trainer.py, src/utils/quick_start.py and src/configs; "
        "give a checkout of github.com/Qrange-group/Mirror-Gradient."
    )


def lay_out(folder: Path, source: Path, data: Interactions, user_graph: bool = False) -> dict[str, str]:
    """Give the trainer the working directory it expects: its own configurations, and the data in its layout.

    With `user_graph` the file of user neighbours that its DualGNN and DRAGON read is among them.

    Returns:
        The part of its configuration that says where the data are and how the columns are called.
    """
    (folder / "run").mkdir()
    shutil.copytree(source / "configs", folder / "run" / "configs")
    home = folder / "data" / data.name
    home.mkdir(parents=True)
    if data.source == "demo":
        _write_files(home, data)
    else:
        given = Path(data.source).resolve()
        for file in (given if given.is_dir() else given.parent).iterdir():
            if file.name in (f"{data.name}.inter", "image_feat.npy", "text_feat.npy"):
                (home / file.name).symlink_to(file)
    if user_graph:
        _write_user_graph(home / USER_GRAPH, data)
    with (home / f"{data.name}.inter").open(encoding="utf-8") as stream:
        header = stream.readline().rstrip("\r\n").split("\t")
    columns = {role: next(name for name in header if role in name.lower()) for role in ("user", "item", "label")}
    return {
        "data_path": f"{folder / 'data'}{os.sep}",
        "inter_file_name": f"{data.name}.inter",
        "vision_feature_file": "image_feat.npy",
        "text_feature_file": "text_feat.npy",
        "user_graph_dict_file": USER_GRAPH,
        "USER_ID_FIELD": columns["user"],
        "ITEM_ID_FIELD": columns["item"],
        "inter_splitting_label": columns["label"],
        "field_separator": "\t",
    }


def _write_files(home: Path, data: Interactions) -> None:
    parts = (data.train, data.valid, data.test)
    table = np.concatenate([np.insert(pairs, 2, label, axis=1) for label, pairs in enumerate(parts)])
    file, header = home / f"{data.name}.inter", "userID\titemID\tx_label"
    np.savetxt(file, table, fmt="%d", delimiter="\t", header=header, comments="")
    for modality, features in data.features.items():
        np.save(home / f"{modality}_feat.npy", features)


def _write_user_graph(file: Path, data: Interactions) -> None:
    graph = build_user_graph(data)
    lengths = np.count_nonzero(graph.shared, axis=1)
    lists = {
        user: [graph.neighbours[user, :n].tolist(), graph.shared[user, :n].astype(float).tolist()]
        for user, n in enumerate(lengths)
    }
    np.save(file, np.array(lists, dtype=object))


def _pair(
    folder: Path,
    source: Path,
    files: dict[str, str],
    dataset: str,
    model: str,
    training: str,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Both sides of one model and training, turn by turn; one row each."""
    published = {
        "source": str(source),
        "model": SETTINGS[model].published,
        "dataset": dataset,
        "config": {**files, **published_config(model, training, options)},
        "mirror": training != "plain",
    }
    ours = {"data": str(folder / "data" / dataset), "model": model, "seed": options.seed, "training": training}
    ours |= {"epochs": options.epochs, "patience": _patience(options), "batch_size": options.batch_size}
    common = {"threads": options.threads, "device": options.device}
    jobs = {"published": {**published, **common}, "ours": {**ours, **common}}
    records: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(options.repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            print(f"{model}, {training}: {side} ...", file=sys.stderr, flush=True)
            records[side].append(_launch(side, jobs[side], folder, options.reference_python))
    rows = [_row(side, records[side], model, training, dataset, options) for side in SIDES]
    for row in rows:
        row["ratio"] = rows[0]["seconds_per_epoch"]["median"] / row["seconds_per_epoch"]["median"]
        row["ratio_evaluation"] = rows[0]["seconds_per_evaluation"]["median"] / row["seconds_per_evaluation"]["median"]
        row["device"] = row["device"] or rows[1]["device"]
    return rows


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
        "stopping_step": _patience(options),
        "train_batch_size": options.batch_size,
        "learner": "adam",
        "learning_rate": LEARNING_RATE,
        "weight_decay": setting.weight_decay,
        "embedding_size": EMBEDDING,
        "hyper_parameters": list(grid),
        **{name: [value] for name, value in grid.items()},
    }


def _patience(options: argparse.Namespace) -> int:
    return options.epochs if options.patience is None else options.patience


def _launch(side: str, job: dict[str, Any], folder: Path, reference_python: str) -> dict[str, Any]:
    """Run one side in a process of its own; returns what it recorded."""
    output, description = folder / "record.json", folder / "job.json"
    output.unlink(missing_ok=True)
    description.write_text(json.dumps({**job, "output": str(output)}))
    if side == "published":
        command = [shutil.which(reference_python) or reference_python, str(HERE / "_published.py"), str(description)]
    else:
        command = [sys.executable, str(HERE / "vs_pytorch.py"), "--job", str(description)]
    where = folder / "run" if side == "published" else None
    try:
        done = subprocess.run(command, cwd=where, env=_environment(job), capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--reference-python {command[0]} cannot be started ({error.strerror}).") from None
    if done.returncode != 0 or not output.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{side} {job['model']} ended with exit code {done.returncode}: {last}")
    return json.loads(output.read_text())


def _environment(job: dict[str, Any]) -> dict[str, str]:
    """The environment of either side: its device, and as many threads as it has cores."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job["threads"]))
    return {**os.environ, **threads, "JAX_PLATFORMS": "cpu" if job["device"] == "cpu" else "cuda"}


def _train_ours(job: dict[str, Any]) -> None:
    """Our side of one run: train, and write what the trainer reports."""
    limit_cores(job["threads"])
    started = time.perf_counter()
    data = load_interactions(job["data"])
    setting = SETTINGS[job["model"]]
    limits = {name: job[name] for name in ("seed", "batch_size", "epochs", "patience")}
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
    record = {
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
    Path(job["output"]).write_text(json.dumps(record))


def _row(
    side: str,
    records: list[dict[str, Any]],
    model: str,
    training: str,
    dataset: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One side's times over all its runs, without each run's first epoch, and its metrics (alike in every run)."""
    first = records[0]
    return {
        "model": model,
        "training": training,
        "side": side,
        "data": dataset,
        "seconds_per_epoch": spread([x for record in records for x in record["epochs"][1:]]),
        "seconds_per_evaluation": spread([x for record in records for x in _both_splits(record)[1:]]),
        "seconds_compile": first.get("seconds_compile", 0.0),
        "seconds_run": spread([record["seconds_run"] for record in records]),
        "epochs_run": len(first["epochs"]),
        "repeats": options.repeats,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "threads": options.threads,
        "hyper_parameters": {**SETTINGS[model].hyper_parameters, **(MIRROR if training == "mirror" else {})},
        "metrics": {"valid": first["valid"], "test": first["test"]},
        "device": first["device"],
        "versions": first["versions"],
    }


def _both_splits(record: dict[str, Any]) -> list[float]:
    """Seconds for one split after each epoch: the mean of validation and test, which differ in size."""
    return np.reshape(record["evaluations"], (-1, 2)).mean(axis=1).tolist()


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{rows[0]['data']}, batch {rows[0]['batch_size']}, {rows[0]['threads']} cores")
    for name in ("model", "training", "side", "s / epoch", "ratio", "s / evaluation", "ratio", "s compile", "s run"):
        table.add_column(name, justify="left" if name in ("model", "training", "side") else "right")
    for name in SHOWN:
        table.add_column(f"test {name}", justify="right")
    for row in rows:
        times = [spread_cell(row["seconds_per_epoch"], 3), f"{row['ratio']:.2f}x"]
        times += [spread_cell(row["seconds_per_evaluation"], 3), f"{row['ratio_evaluation']:.2f}x"]
        times += [f"{row['seconds_compile']:.1f}", f"{row['seconds_run']['median']:.1f}"]
        metrics = [f"{row['metrics']['test'][name]:.4f}" for name in SHOWN]
        table.add_row(row["model"], row["training"], row["side"], *times, *metrics, end_section=row["side"] == "ours")
    console = Console(width=160)
    console.print(table)
    console.print(rows[1]["device"], rows[0]["versions"], rows[1]["versions"])


if __name__ == "__main__":
    sys.exit(main())
