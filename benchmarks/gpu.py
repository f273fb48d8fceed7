"""Everything worth measuring on a GPU, in the order of its worth, within some minutes.

    python benchmarks/gpu.py --minutes 12 --reference PATH --data data/tiktok --output benchmarks/results/gpu
    python benchmarks/gpu.py --minutes 1 --device cpu --quick --output /tmp/gpu

    (a) parity    recorded numbers, trajectories and graph operations; resuming, deterministic and not
    (b) price     Mirror Gradient over plain per step: chain, opaque and idle form, intervals 3 and 1
    (c) trainer   epoch and evaluation beside the published PyTorch trainer on the same device (needs --reference)
    (d) products  sparse products, and gradients of gathered rows
    (e) memory    FREEDOM at the size of Electronics, 4,096-d features trained
    (f) sweep     twelve members as one program and one by one
    (g) profile   one step of FREEDOM by kernels; its floors

Every part is a process of its own with a limit of time and is written as soon as it ends, so nothing can end or hang
the others. What no longer fits into the minutes is skipped and said; the same command again goes on with what is not
done. Data are made up at the sizes of TikTok, Baby and Electronics unless `--data` gives them. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _frame import Parser, exit_status, refuse_dirty
from _gpu_budget import Outcome, Part, Results, run_parts
from _gpu_summary import summary
from _machine import package_version, versions
from _reference import reference_source
from _settings import FEATURED, PRECISIONS

from mgrad_jax.data import load_interactions
from mgrad_jax.errors import UserError

HERE = Path(__file__).resolve().parent
ALL_SIZES = ("tiktok", "baby", "electronics")
ELECTRONICS = ("--data", "electronics", "--repeats", "2")
QUICK_SECONDS = 4.0  # of a part where everything is tiny
UNOPTIMISED = "--xla_backend_optimization_level=0"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def main() -> int:
    """Measure what fits; print and write the summary; returns the exit status."""
    return exit_status(lambda: _run(_options()))


def _run(options: argparse.Namespace) -> None:
    refuse_dirty(options.allow_dirty or options.quick or options.commit is not None)
    results = Results(options.output, _machine(options))
    with tempfile.TemporaryDirectory(prefix="gpu_benchmark_") as work:
        worker = Worker(Path(work), options)
        run_parts(plan(options), 60 * options.minutes, results, worker.execute)
    text = summary(options.output)
    (options.output / "summary.md").write_text(text, encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="the budget (default 12)")
    parser.add_argument("--reference", type=Path, help="checkout of the published PyTorch trainer; without it no (c)")
    parser.add_argument("--reference-python", default=sys.executable, help="interpreter that has torch (default this)")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="directories in MMRec format, named as a size")
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--quick", action="store_true", help="everything tiny: does it run, not how fast")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--allow-dirty", action="store_true", help="measure though the tree differs from its commit")
    options = parser.parse_args()
    if options.minutes <= 0:
        raise UserError(f"--minutes is {options.minutes:g}; it must be positive.")
    if options.reference is not None:
        reference_source(options.reference)
        options.reference = options.reference.resolve()
    options.data = {path.resolve().name: path.resolve() for path in options.data}
    for name, path in options.data.items():
        if name not in ALL_SIZES:
            raise UserError(f"--data {path} is named '{name}'; only {', '.join(ALL_SIZES)} have a place to take.")
        if not {"image", "text"} <= set(load_interactions(path).features):
            raise UserError(f"--data {path} lacks image or text features, which FREEDOM and BM3 need; leave it out.")
    return options


def plan(options: argparse.Namespace) -> list[Part]:
    """All parts, the most worth first; the seconds are guesses for a GPU, or for two cores where everything is tiny."""

    def part(step: str, name: str, seconds: float, script: str, *arguments: str, sized: Any = (), **more: Any) -> Part:
        # Whether the tree may be dirty is decided above, once.
        chosen = (*arguments, "--quick") if options.quick else (*arguments, "--allow-dirty", *sized)
        command = (script, *chosen, "--output", "{rows}")
        return Part(step, name, QUICK_SECONDS if options.quick else seconds, command, **more)

    def source(size: str) -> str:
        return str(options.data.get(size, size))

    def price(size: str, interval: int, forms: str, seconds: float) -> Part:
        arguments = ("--intervals", str(interval), "--forms", *forms.split())
        sized = ("--models", *FEATURED, "--data", source(size))
        return part("b", f"{size}, interval {interval}", seconds, "step_throughput.py", *arguments, sized=sized)

    def trainer(model: str, training: str) -> Part:
        checkout = ("--reference", str(options.reference), "--reference-python", options.reference_python)
        reference = () if options.reference is None else checkout
        arguments = (*reference, "--models", model, "--trainings", training, "--device", options.device)
        missing = None if reference else "no --reference was given"
        sized = ("--data", source("tiktok"), "--epochs", "4")
        return part("c", f"{model}, {training}", 45, "vs_pytorch.py", *arguments, sized=sized, missing=missing)

    sizes, modes = (ALL_SIZES[:1], PRECISIONS[:1]) if options.quick else (ALL_SIZES, PRECISIONS)
    members = ("--data", source("tiktok"), "--epochs", "3", "--slots", "12", "--repeats", "1")
    first = [
        part("a", "graph operations", 35, "_gpu_graph.py"),
        *(part("a", f"numbers, {mode}", 35, "_gpu_parity.py", "--mode", mode) for mode in modes),
        part("a", "resuming, deterministic", 30, "_gpu_resume.py", xla_flags=DETERMINISTIC),
        *(price(size, 3, "plain mirror mirrored idle", 70 if size == "electronics" else 45) for size in sizes),
        *(trainer(model, "plain") for model in FEATURED),
        part("d", "products, baby", 60, "propagation.py"),
        part("d", "gathered rows", 25, "_gpu_gather.py"),
        part("e", "electronics", 60, "scaling.py", "--models", "freedom", "--max-batches", "20", sized=ELECTRONICS),
        part("f", "twelve members", 130, "sweep_throughput.py", "--model", "vbpr", sized=members),
        part("g", "kernels", 25, "_gpu_profile.py"),
        part("g", "floors", 45, "floors.py", sized=("--data", source("baby"), "--models", "freedom", "bm3", "vbpr")),
    ]
    second = [  # what the tables would miss least
        part("a", "resuming, default", 30, "_gpu_resume.py"),
        *(price(size, 1, "plain mirror mirrored", 50 if size == "electronics" else 25) for size in sizes),
        part("d", "products, electronics", 70, "propagation.py", sized=("--size", "electronics")),
        trainer("freedom", "mirror"),
    ]
    return first if options.quick else first + second


class Worker:
    """Runs parts as processes."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.device = work, options.device
        # Compilation is most of the time where everything is tiny.
        self.flags = UNOPTIMISED if options.quick and options.device == "cpu" else ""

    def execute(self, part: Part, limit: float) -> Outcome:
        """Run a part's command; whatever it started is gone afterwards."""
        rows, log = self.work / "rows.json", self.work / "log.txt"
        rows.unlink(missing_ok=True)
        script, *arguments = (str(rows) if argument == "{rows}" else argument for argument in part.command)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, str(HERE / script), *arguments],
                env=self._environment(part),
                cwd=self.work,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = json.loads(rows.read_text()) if rows.exists() else None  # written whole or not at all
        if code is None:
            return Outcome("too long", found, f"ended after {limit:.0f} s")
        if code != 0 or found is None:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
            return Outcome("failed", found, f"exit code {code}: {lines[-1][:300]}")
        return Outcome("done", found)

    def _environment(self, part: Part) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), part.xla_flags, self.flags)))
        platforms = "cpu" if self.device == "cpu" else "cuda"
        return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": platforms, "XLA_FLAGS": flags}


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on and with; asked without JAX, which would take the card's memory."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        card = None
    cuda = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cuda-runtime", "nvidia-cusparse", "torch")
    found = {name: package_version(name) for name in cuda if package_version(name)}
    found |= {"commit": options.commit} if options.commit else {}
    here = {"device": options.device, "card": card, "quick": options.quick, "system": platform.platform()}
    return {**here, **versions(), **found}


if __name__ == "__main__":
    sys.exit(main())
