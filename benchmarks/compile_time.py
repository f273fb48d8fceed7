"""How long a run waits for its programs: the first time, and again with what JAX's compilation cache kept.

    python benchmarks/compile_time.py --data data/tiktok --models vbpr bm3 freedom

Every case is the command `mgrad-jax train --epochs 1` in a process of its own, twice with one cache directory that is
empty at first: `compile` are the seconds of tracing and compiling (or loading) the programs of an epoch and of both
evaluations, as `result.json` tells them; `wall` the seconds of the whole command, start of Python, reading of the data
and the epoch included. Median and spread over the repeats, each with a fresh cache. The output is a JSON list of rows
of one device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import (
    RESULTS,
    Parser,
    check_at_least,
    device_name,
    earlier_rows,
    exit_status,
    spread,
    spread_cell,
    versions,
    write_json,
)
from _settings import BATCH_SIZE, MIRROR, SETTINGS
from rich.console import Console
from rich.table import Table

from mgrad_jax import models
from mgrad_jax.data import load_interactions
from mgrad_jax.errors import UserError

TRAININGS = ("plain", "mirror")
RUNS = ("first", "again")


@exit_status
def main() -> None:
    """Measure, print and write."""
    options = _options()
    check_at_least("--repeats", options.repeats)
    name = load_interactions(options.data).name
    earlier_rows(options.output)
    rows = [_row(model, training, name, options) for model in options.models for training in options.trainings]
    _print_table(rows)
    write_json(options.output, rows)


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", default="demo", help="a directory in MMRec format, or 'demo'")
    parser.add_argument("--models", nargs="+", choices=models.names(), help="vbpr, bm3 and freedom by default")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, help="both by default")
    parser.add_argument("--repeats", type=int, help="rounds (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny defaults: does it run, not how fast")
    parser.add_argument("--output", type=Path, default=RESULTS / "compile_time.json")
    options = parser.parse_args()
    options.models = options.models or (["vbpr"] if options.quick else ["vbpr", "bm3", "freedom"])
    options.trainings = options.trainings or (["mirror"] if options.quick else list(TRAININGS))
    if options.repeats is None:
        options.repeats = 1 if options.quick else 3
    return options


def _row(model: str, training: str, data: str, options: argparse.Namespace) -> dict[str, Any]:
    print(model, training, "...", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {f"{kind}_{run}": [] for run in RUNS for kind in ("compile", "wall")}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for run in RUNS:
                compiling, wall = _train(model, training, options.data, Path(folder), run)
                seconds[f"compile_{run}"].append(compiling)
                seconds[f"wall_{run}"].append(wall)
    return {
        "model": model,
        "training": training,
        "data": data,
        **{name: spread(values) for name, values in seconds.items()},
        "repeats": options.repeats,
        "device": device_name(),
        "versions": versions(),
    }


def _train(model: str, training: str, data: str, folder: Path, run: str) -> tuple[float, float]:
    """One epoch by the command line; seconds of compilation and of the whole command."""
    setting = SETTINGS[model]
    command = [sys.executable, "-m", "mgrad_jax.cli", "train", "--model", model, "--data", data, "--epochs", "1"]
    command += ["--batch-size", str(BATCH_SIZE), "--weight-decay", str(setting.weight_decay), "--out", folder / run]
    command += [argument for k, v in setting.hyper_parameters.items() for argument in ("--set", f"{k}={v}")]
    command += ["--no-mirror"] if training == "plain" else ["--mirror", *_mirror_options()]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    started = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)),
        env={**environment, "XDG_CACHE_HOME": str(folder / "cache"), "MGRAD_JAX_NO_CACHE": "0"},
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - started
    if done.returncode != 0:
        raise UserError(f"training {model} ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads((folder / run / "result.json").read_text())["seconds"]["compile"], wall


def _mirror_options() -> list[str]:
    return [text for name, value in MIRROR.items() for text in (f"--{name}", str(value))]


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"seconds, first run and the run after it; {rows[0]['data']}, {rows[0]['device']}")
    for name in ("model", "training", "compile", "with cache", "command", "with cache"):
        table.add_column(name, justify="left" if name in ("model", "training") else "right")
    for row in rows:
        cells = [spread_cell(row[f"{kind}_{run}"], 1) for kind in ("compile", "wall") for run in RUNS]
        table.add_row(row["model"], row["training"], *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
