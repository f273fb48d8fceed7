"""Everything worth measuring on a GPU, in the order of its worth, within some minutes.

    python benchmarks/gpu.py --minutes 12 --reference PATH --data data/tiktok --output benchmarks/results/gpu
    python benchmarks/gpu.py --minutes 1 --device cpu --quick --output /tmp/gpu

    (a) parity    recorded numbers, trajectories and graph operations; resuming, with deterministic operations and without
    (b) price     Mirror Gradient over plain per step: chain, opaque and idle form, intervals 3 and 1
    (c) trainer   epoch and evaluation beside the published PyTorch trainer on the same device (needs --reference)
    (d) products  sparse products, and gradients of gathered rows
    (e) memory    FREEDOM at the size of Electronics, 4,096-d features trained
    (f) sweep     twelve members as one program and one by one
    (g) profile   one step of FREEDOM by kernels; its floors

Every step is one JSON file in `--output`; every part of it is a process of its own with a limit of time, and is written as
soon as it ends, so nothing can end or hang the others. What no longer fits into the minutes is skipped and said; the
same command again goes on with what is not done. It ends with `summary.md`. Data are made up at the sizes of TikTok, Baby
and Electronics where `--data` gives none of that name. A checkout suffices (`PYTHONPATH=.`), the library need
not be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _gpu_budget import Outcome, Part, Results, run_parts
from _gpu_parity import MODES
from _gpu_summary import summary
from _report import Parser, exit_status, versions
from vs_pytorch import _write_files, published_source

from mgrad_jax.data import load_interactions, synthetic_interactions
from mgrad_jax.data.synthetic import SIZES
from mgrad_jax.errors import UserError

HERE = Path(__file__).resolve().parent
MODELS = ("vbpr", "bm3", "freedom")
ALL_SIZES = ("tiktok", "baby", "electronics")
ELECTRONICS = ("--sizes", "electronics", "--repeats", "2")
QUICK_SECONDS = 4.0  # of a part where everything is tiny
UNOPTIMISED = "--xla_backend_optimization_level=0"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@exit_status
def main() -> None:
    """Measure what fits; print and write the summary."""
    options = _options()
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
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="directories in MMRec format, named as a size")
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--quick", action="store_true", help="everything tiny: does it run, not how fast")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args()
    if options.minutes <= 0:
        raise UserError(f"--minutes is {options.minutes:g}; it must be positive.")
    if options.reference is not None:
        published_source(options.reference)
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
        chosen = (*arguments, "--quick") if options.quick else (*arguments, *sized)
        return Part(
            step, name, QUICK_SECONDS if options.quick else seconds, (script, *chosen, "--output", "{rows}"), **more
        )

    def price(size: str, interval: int, forms: str, seconds: float) -> Part:
        source = ("--data", str(options.data[size])) if size in options.data else ("--sizes", size)
        arguments = ("--intervals", str(interval), "--forms", *forms.split())
        sized = ("--models", *MODELS, *source)
        return part("b", f"{size}, interval {interval}", seconds, "step_throughput.py", *arguments, sized=sized)

    def trainer(model: str, training: str) -> Part:
        reference = () if options.reference is None else ("--reference", str(options.reference))
        data, epochs = ("demo", "2") if options.quick else ("{tiktok}", "4")
        arguments = (*reference, "--models", model, "--trainings", training, "--device", options.device)
        command = ("vs_pytorch.py", *arguments, "--data", data, "--epochs", epochs, "--output", "{rows}")
        missing = None if reference else "no --reference was given"
        return Part("c", f"{model}, {training}", QUICK_SECONDS if options.quick else 45, command, missing=missing)

    sizes, modes = (ALL_SIZES[:1], MODES[:1]) if options.quick else (ALL_SIZES, MODES)
    members = ("--data", "{tiktok}", "--epochs", "3", "--slots", "12", "--repeats", "1")
    first = [
        part("a", "graph operations", 35, "_gpu_graph.py"),
        *(part("a", f"numbers, {mode}", 35, "_gpu_parity.py", "--mode", mode) for mode in modes),
        part("a", "resuming, deterministic", 30, "_gpu_resume.py", xla_flags=DETERMINISTIC),
        *(price(size, 3, "plain mirror mirrored idle", 70 if size == "electronics" else 45) for size in sizes),
        *(trainer(model, "plain") for model in MODELS),
        part("d", "products, baby", 60, "propagation.py"),
        part("d", "gathered rows", 25, "_gpu_gather.py"),
        part("e", "electronics", 60, "scaling.py", "--models", "freedom", "--max-batches", "20", sized=ELECTRONICS),
        part("f", "twelve members", 130, "sweep_throughput.py", "--model", "vbpr", sized=members),
        part("g", "kernels", 25, "_gpu_profile.py"),
        part("g", "floors", 45, "floors.py", sized=("--data", "{baby}", "--models", "freedom", "bm3", "vbpr")),
    ]
    second = [  # what the tables would miss least
        part("a", "resuming, default", 30, "_gpu_resume.py"),
        *(price(size, 1, "plain mirror mirrored", 50 if size == "electronics" else 25) for size in sizes),
        part("d", "products, electronics", 70, "propagation.py", sized=("--size", "electronics")),
        trainer("freedom", "mirror"),
    ]
    return first if options.quick else first + second


class Worker:
    """Runs parts as processes; makes data up where a command names a directory that is not given."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.device, self.data = work, options.device, dict(options.data)
        # Compilation is most of the time where everything is tiny.
        self.flags = UNOPTIMISED if options.quick and options.device == "cpu" else ""

    def execute(self, part: Part, limit: float) -> Outcome:
        """Run a part's command; whatever it started is gone afterwards."""
        rows, log = self.work / "rows.json", self.work / "log.txt"
        rows.unlink(missing_ok=True)
        script, *arguments = (self._filled(argument, rows) for argument in part.command)
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
        found = _rows(rows)
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

    def _filled(self, argument: str, rows: Path) -> str:
        if argument == "{rows}":
            return str(rows)
        size = argument.strip("{}")
        return str(self._directory(size)) if argument == f"{{{size}}}" else argument

    def _directory(self, size: str) -> Path:
        """Data of a size in MMRec format, made up at their first use."""
        if size not in self.data:
            self.data[size] = self.work / size
            self.data[size].mkdir()
            _write_files(self.data[size], synthetic_interactions(SIZES[size], name=size))
        return self.data[size]


def _rows(file: Path) -> Any:
    """What a part wrote; None where that is nothing, or half of it."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on and with; asked without JAX, which would take the card's memory."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        card = None
    cuda = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cuda-runtime", "nvidia-cusparse", "torch")
    return {
        "device": options.device,
        "card": card,
        "quick": options.quick,
        "system": platform.platform(),
        **versions(),
        **({"commit": options.commit} if options.commit else {}),
        **{name: found for name in cuda if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
