"""Run a checkout of the published PyTorch trainer once, unchanged, with timers around its epochs and evaluations.

    PYTHON benchmarks/_published.py JOB.json        (started by benchmarks/vs_pytorch.py with the reference interpreter)

Everything the trainer needs to run on current NumPy, SciPy and PyTorch is patched here, from outside, before its
modules are imported. The job is a JSON object: `source` (its `src` folder), `model`, `dataset`, `mirror`, `config`
(overrides of its configuration), `device`, `threads` and `output` (where the timings go). It needs no `mgrad_jax`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import platform
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

# Imported by the trainer and never reached by a training run.
NEVER_USED = ("PIL", "lmdb", "matplotlib", "sklearn", "torch_scatter", "torchvision")


def main(path: str) -> None:
    """Run the job described in a file and write its timings."""
    with open(path, encoding="utf-8") as stream:
        job = json.load(stream)
    limit_cores(job["threads"])
    import numpy
    import scipy.sparse
    import torch

    restore_removed(numpy, scipy.sparse.dok_matrix)
    patch_torch(torch, job["device"])
    torch.set_num_threads(job["threads"])
    record = run(job, torch)
    with open(job["output"], "w", encoding="utf-8") as stream:
        json.dump(record, stream)


def limit_cores(threads: int) -> None:
    """Confine the process to its first `threads` cores, where the system can; before any thread is started."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def restore_removed(numpy: Any, dok_matrix: Any) -> None:
    """`numpy.float` and its kin, gone since NumPy 1.24, and `dok_matrix._update(entries)`, gone since SciPy 1.13."""
    for alias in (bool, float, int, object, str):
        if alias.__name__ not in vars(numpy):
            setattr(numpy, alias.__name__, alias)
    if not hasattr(dok_matrix, "_update"):  # puts a dictionary of entries in, without checks
        dok_matrix._update = lambda self, entries: self._dict.update(entries)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """An empty module in place of each one in `NEVER_USED` that is not installed, while the block imports."""
    finder = _StandIns()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Anything)]:
            del sys.modules[name]


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = name.split(".")[0] in NEVER_USED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Anything(types.ModuleType):
    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(f"{self.__name__}.{name}")


def patch_torch(torch: Any, device: str) -> None:
    """Load the trainer's own pickled caches as before PyTorch 2.6; on the CPU, act as on a GPU.

    `.cuda()` stays where it is. A parameter's `.to(device)` gives a copy, as it does on a GPU: the trainer writes
    `self.x = nn.Parameter(...).to(device)`, which makes x a trained parameter only where nothing has to be moved.
    """
    load = torch.load

    def load_own_cache(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("weights_only", False)
        return load(*args, **kwargs)

    torch.load = load_own_cache
    if device == "cpu":
        torch.Tensor.cuda = lambda self, *args, **kwargs: self
        torch.nn.Module.cuda = lambda self, *args, **kwargs: self
        torch.nn.Parameter.to = lambda self, *args, **kwargs: torch.Tensor.to(self, *args, **kwargs).clone()


def run(job: dict[str, Any], torch: Any) -> dict[str, Any]:
    """Train as its own entry point does and return what the timers saw."""
    sys.path[:] = [job["source"], *paths_without_rivals(sys.path)]
    with stand_ins():
        trainer_class = importlib.import_module("common.trainer").Trainer
        quick_start = importlib.import_module("utils.quick_start").quick_start
        importlib.import_module("models." + job["model"].lower())

    def now() -> float:
        if job["device"] != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    record: dict[str, Any] = {"epochs": [], "evaluations": [], "valid": {}, "test": {}}
    attach_timers(trainer_class, record, now)
    started = now()
    what = {"model": job["model"], "dataset": job["dataset"], "config_dict": job["config"]}
    quick_start(**what, save_model=False, mg=job["mirror"])
    record["seconds_run"] = now() - started
    installed = {name: str(importlib.import_module(name).__version__) for name in ("torch", "numpy", "scipy")}
    record["versions"] = {"python": platform.python_version(), **installed}
    record["device"] = torch.cuda.get_device_name(0) if job["device"] != "cpu" else None
    return record


def paths_without_rivals(paths: list[str]) -> list[str]:
    """The trainer's `models`, `common`, `utils` have no `__init__.py`: a package of that name elsewhere would win."""
    names = ("models", "common", "utils")
    return [path for path in paths if not any(os.path.isfile(os.path.join(path, n, "__init__.py")) for n in names)]


def attach_timers(trainer_class: Any, record: dict[str, Any], now: Callable[[], float]) -> None:
    """Time each epoch, from the start of `pre_epoch_processing` to the end of `_train_epoch`, and each evaluation."""
    names = ("__init__", "_train_epoch", "_valid_epoch", "fit")
    make, train, evaluate, fit = (getattr(trainer_class, name) for name in names)
    begun: list[float] = []

    def timed_init(self: Any, config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        make(self, config, model, *args, **kwargs)
        prepare = model.pre_epoch_processing

        def timed_prepare() -> Any:
            begun[:] = [now()]
            return prepare()

        model.pre_epoch_processing = timed_prepare

    def timed_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        record["epochs"].append(now() - begun[0])
        return result

    def timed_evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = now()
        result = evaluate(self, *args, **kwargs)
        record["evaluations"].append(now() - started)
        return result

    def kept_fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        best = fit(self, *args, **kwargs)
        record["valid"], record["test"] = ({name: float(x) for name, x in metrics.items()} for metrics in best[1:3])
        return best

    trainer_class.__init__, trainer_class._train_epoch = timed_init, timed_train
    trainer_class._valid_epoch, trainer_class.fit = timed_evaluate, kept_fit


if __name__ == "__main__":
    main(sys.argv[1])
