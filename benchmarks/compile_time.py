"""How long a run waits for its programs: the first time, and again with what JAX's compilation cache kept.

    python benchmarks/compile_time.py --data data/tiktok --models vbpr bm3 freedom

Every case is the command `mgrad-jax train --epochs 1` in a process of its own, twice with one cache directory that is
empty at first: `compile` are the seconds of tracing and compiling (or loading) the programs of an epoch and of both
evaluations, as `result.json` tells them; `wall` the seconds of the whole command, start of Python, reading of the data
and the epoch included. Median and spread over the repeats, each with a fresh cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _frame import Benchmark, Parser, run_command, say
from _settings import BATCH_SIZE, FEATURED, MIRROR, SETTINGS
from _tables import Row
from _timing import spread

from mgrad_jax import models
from mgrad_jax.data import load_interactions

TRAININGS = ["plain", "mirror"]
RUNS = ("first", "again")


def _options(parser: Parser) -> None:
    parser.add_argument("--data", default="demo", help="a directory in MMRec format, or 'demo'")
    parser.option("--models", FEATURED, "models", ["vbpr"], choices=models.names())
    parser.option("--trainings", TRAININGS, "trainings", ["mirror"], choices=TRAININGS)
    parser.number("--repeats", 3, "rounds", 1)


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    name = load_interactions(options.data).name
    for model in options.models:
        for training in options.trainings:
            say(model, training)
            yield [_row(model, training, name, options)]


def _row(model: str, training: str, data: str, options: argparse.Namespace) -> Row:
    seconds: dict[str, list[float]] = {f"{kind}_{run}": [] for run in RUNS for kind in ("compile", "wall")}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for run in RUNS:
                compiling, wall = _train(model, training, options.data, Path(folder), run)
                seconds[f"compile_{run}"].append(compiling)
                seconds[f"wall_{run}"].append(wall)
    times = {name: spread(values) for name, values in seconds.items()}
    return {"model": model, "training": training, "data": data, **times}


def _train(model: str, training: str, data: str, folder: Path, run: str) -> tuple[float, float]:
    """One epoch by the command line; seconds of compilation and of the whole command."""
    setting = SETTINGS[model]
    command = [sys.executable, "-m", "mgrad_jax.cli", "train", "--model", model, "--data", data, "--epochs", "1"]
    command += [
        "--batch-size",
        str(BATCH_SIZE),
        "--weight-decay",
        str(setting.weight_decay),
        "--out",
        str(folder / run),
    ]
    command += [argument for k, v in setting.hyper_parameters.items() for argument in ("--set", f"{k}={v}")]
    mirror = [text for name, value in MIRROR.items() for text in (f"--{name}", str(value))]
    command += ["--method", training, *(mirror if training == "mirror" else [])]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "MGRAD_JAX_NO_CACHE": "0"}
    started = time.perf_counter()
    run_command(command, f"training {model}", env=environment)
    wall = time.perf_counter() - started
    return json.loads((folder / run / "result.json").read_text())["seconds"]["compile"], wall


if __name__ == "__main__":
    sys.exit(Benchmark("compile_time", __doc__, _measure, _options, own_processes=True).main())
