"""Where the time of a step of FREEDOM goes, kernel by kernel, by JAX's own profiler: step (g) of `gpu.py`.

    python benchmarks/_gpu_profile.py --output FILE

Twelve steps at the size of Amazon Baby, plain and with Mirror Gradient, after a run for warmth. Where the profiler shows no
events of the device, the row has the wall time and says so.
"""

from __future__ import annotations

import collections
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import optax
from _report import Parser, device_name, exit_status, versions, write_json
from _settings import BATCH_SIZE, LEARNING_RATE, MIRROR, SETTINGS
from _steps import Case, compile_passes, random_batches
from step_throughput import ALL_SIZES

from mgrad_jax import mirror_gradient, models
from mgrad_jax.data import synthetic_interactions
from mgrad_jax.mirror import pass_schedule
from mgrad_jax.training.epoch import split_model

N_BATCHES = 12
SHOWN = 25  # kernels a row


@exit_status
def main() -> None:
    """Profile and write."""
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny dataset")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    data = synthetic_interactions(ALL_SIZES["quick" if options.quick else "baby"], name="baby")
    parts = split_model(models.create("freedom", data, **SETTINGS["freedom"].hyper_parameters))
    batches = random_batches(data, N_BATCHES, 256 if options.quick else BATCH_SIZE)
    rows = []
    for training in ("plain", "mirror"):
        adam = optax.adam(LEARNING_RATE)
        tx = optax.chain(mirror_gradient(**MIRROR), adam) if training == "mirror" else adam
        state = tx.init(parts.params)
        case = compile_passes(parts, tx, state, pass_schedule(state, N_BATCHES), batches)
        rows.append({"training": training, **_profiled(case), "device": device_name(), "versions": versions()})
        write_json(options.output, rows)


def _profiled(case: Case) -> dict[str, Any]:
    jax.block_until_ready(case.run(case.start()))
    carry = case.start()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            started = time.perf_counter()
            jax.block_until_ready(case.run(carry))
            seconds = time.perf_counter() - started
        try:
            kernels = _kernels(Path(folder))
        except Exception as error:  # the wall time is worth having without them
            kernels, reason = [], f"{type(error).__name__}: {error}"
        else:
            reason = "" if kernels else "the trace holds no events of the device"
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
                events = (event for line in streams for event in line.events)
                for event in events:
                    if not event.name.startswith("$"):  # a call of Python
                        seconds[event.name] += event.duration_ns * 1e-9
                        calls[event.name] += 1
    names = sorted(seconds, key=lambda name: -seconds[name])
    return [{"name": name, "seconds": seconds[name], "calls": calls[name]} for name in names]


if __name__ == "__main__":
    sys.exit(main())
