"""Where the time of a step of FREEDOM goes, kernel by kernel, by JAX's own profiler: step (g) of `gpu.py`.

    python benchmarks/_gpu_profile.py --output FILE

Twelve steps at the size of Amazon Baby, plain and with Mirror Gradient, after a run for warmth. Where the profiler
shows no events of the device, the row has the wall time and says so.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
from _frame import Benchmark
from _settings import BATCH_SIZE, LEARNING_RATE, MIRROR, dataset, make_model
from _steps import Case, compile_passes, random_batches
from _tables import Row

from mgrad_jax import mirror_gradient
from mgrad_jax.mirror import pass_schedule
from mgrad_jax.training.epoch import split_model

N_BATCHES = 12
SHOWN = 25  # kernels per row


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    data = dataset("quick" if options.quick else "baby")
    parts = split_model(make_model("freedom", data))
    batches = random_batches(data, N_BATCHES, 256 if options.quick else BATCH_SIZE)
    for training in ("plain", "mirror"):
        adam = optax.adam(LEARNING_RATE)
        tx = optax.chain(mirror_gradient(**MIRROR), adam) if training == "mirror" else adam
        state = tx.init(parts.params)
        case = compile_passes(parts, tx, state, pass_schedule(state, N_BATCHES), batches)
        yield [{"training": training, **_profiled(case)}]


def _profiled(case: Case) -> Row:
    jax.block_until_ready(case.run(case.start()))
    carry = case.start()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            started = time.perf_counter()
            jax.block_until_ready(case.run(carry))
            seconds = time.perf_counter() - started
        try:
            kernels = _kernels(Path(folder))
            reason = "" if kernels else "the trace holds no events of the device"
        except Exception as error:  # the wall time is worth having without them
            kernels, reason = [], f"{type(error).__name__}: {error}"
    row = {"seconds_per_step": seconds / case.passes, "passes": case.passes, "kernels": kernels[:SHOWN]}
    return {**row, "kernel_seconds": sum(k["seconds"] for k in kernels), **({"note": reason} if reason else {})}


def _kernels(folder: Path) -> list[dict[str, Any]]:
    """Time and number of calls of every kernel of the device, the longest first."""
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:GPU") or (jax.default_backend() == "cpu" and "CPU" in plane.name):
                # Streams hold the kernels; the other lines repeat them by module, by operation and by step.
                streams = [line for line in plane.lines if "Stream" in line.name] or list(plane.lines)
                for event in (event for line in streams for event in line.events):
                    if not event.name.startswith("$"):  # a call of Python
                        seconds[event.name] += event.duration_ns * 1e-9
                        calls[event.name] += 1
    names = sorted(seconds, key=lambda name: -seconds[name])
    return [{"name": name, "seconds": seconds[name], "calls": calls[name]} for name in names]


if __name__ == "__main__":
    sys.exit(Benchmark("gpu_profile", __doc__, _measure, kept=False).main())
