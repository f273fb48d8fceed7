"""A run in one piece, again, and in two pieces: are their numbers the same? Step (a) of `gpu.py`.

    XLA_FLAGS=--xla_gpu_deterministic_ops=true python benchmarks/_gpu_resume.py --output FILE

FREEDOM with Mirror Gradient on the demo data. `again` is the same run once more, `resumed` one that stops halfway and
goes on in a program compiled anew. `equal_epochs` counts the epochs whose loss and metrics are the same text as in the
unbroken run; `seconds_train` shows what deterministic operations cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from _frame import Benchmark
from _tables import Row

from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.run import train_run

TIMES = ["seconds_train", "seconds_evaluate"]


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Two epochs of VBPR where everything is tiny."""
    epochs = 2 if options.quick else 8
    with tempfile.TemporaryDirectory() as folder:
        unbroken, again, resumed = (Path(folder) / name for name in ("unbroken", "again", "resumed"))
        for out in (unbroken, again):
            train_run(_config(out, epochs, options.quick))
        train_run(_config(resumed, epochs // 2, options.quick))
        train_run(_config(resumed, epochs, options.quick), resume=True)
        expected = _history(unbroken)
        row: Row = {
            "epochs": epochs,
            "equal_epochs": {out.name: int((_history(out) == expected).all(axis=1).sum()) for out in (again, resumed)},
            "seconds_train": statistics.median(pd.read_csv(unbroken / "history.csv")["seconds_train"][1:]),
            "flags": os.environ.get("XLA_FLAGS", ""),
        }
    yield [row]


def _config(out: Path, epochs: int, quick: bool) -> RunConfig:
    model = "vbpr" if quick else "freedom"
    return RunConfig(model, "demo", epochs=epochs, patience=1000, batch_size=512, seed=3, out=str(out))


def _history(out: Path) -> Any:
    """Rows as text, so that numbers are compared to the last digit."""
    return pd.read_csv(out / "history.csv", dtype=str).drop(columns=TIMES)


if __name__ == "__main__":
    sys.exit(Benchmark("gpu_resume", __doc__, _measure, kept=False).main())
