"""What single runs and sweeps write alike: the content of `result.json`, and how it is read back."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError
from mgrad_jax.files import Damaged, read_mapping
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.fit import FitResult
from mgrad_jax.training.identity import machine, spread
from mgrad_jax.training.sweep import MemberResult

_PACKAGES = ("mgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")


def result_record(
    config: RunConfig,
    data: Interactions,
    run: str,
    outcome: FitResult | MemberResult,
    seconds: Mapping[str, float],
    devices: int = 1,
) -> dict[str, Any]:
    """The content of `result.json`: settings, data, metrics of the best epoch, times, machine, versions.

    `run` is the run's digest (`mgrad_jax.training.identity.identity`).
    """
    here, method = machine(), config.method
    numbers = method.numbers(config.values)
    return {
        "run": run,
        "model": config.model,
        "data": {
            "name": data.name,
            "users": data.n_users,
            "items": data.n_items,
            "interactions": len(data.train) + len(data.valid) + len(data.test),
        },
        "seed": config.seed,
        "training": config.training,
        "method": {"name": config.training, **numbers},
        # As earlier versions have it.
        "mirror": numbers if method.record == "mirror" else None,
        "replay": numbers if method.record == "replay" else None,
        "flat_minima": {"name": config.training, **numbers} if method.record == "flat_minima" else None,
        "adversarial": None if config.adversarial is None else dict(config.adversarial),
        "feature_dtype": config.feature_dtype,
        "matmul_precision": config.matmul_precision,
        "deterministic": config.deterministic,
        "optimizer": {
            "name": config.optimizer,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "max_norm": config.max_norm,
            **config.optimizer_args,
        },
        "batch_size": config.batch_size,
        "hyper_parameters": dataclasses.asdict(config.model_config),
        "epochs_run": outcome.epochs_run,
        "best_epoch": outcome.best_epoch,
        "metric": config.metric,
        "valid": {name: outcome.valid[name] for name in config.metric_names if name in outcome.valid},
        "test": {name: outcome.test[name] for name in config.metric_names if name in outcome.test},
        "seconds": dict(seconds),
        "device": here["device"],
        "platform": here["device"].partition(" ")[0],
        "devices": devices,
        "processes": spread(devices).get("processes", 1),
        "threads": here["threads"],
        "xla_flags": here["xla_flags"],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers come from."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def read_record(path: Path, run: str) -> dict[str, Any]:
    """Read a `result.json` of the run with this digest, in which everything that is computed with is checked.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not what was written.
        UserError: it cannot be read now, or it is the result of another run.
    """
    record = read_mapping(path, json.loads)
    epochs, best = record.get("epochs_run"), record.get("best_epoch")
    numbers = [record.get(name) for name in ("valid", "test", "seconds")]
    if not (type(epochs) is type(best) is int and 0 <= best <= epochs):
        raise Damaged("its epochs are no counts")
    if not all(isinstance(table, dict) and all(map(_is_number, table.values())) for table in numbers):
        raise Damaged("its metrics or times are no numbers")
    if "run" in record and record["run"] != run:  # earlier versions do not say
        raise UserError(f"{path} is the result of another run; move it away, or choose another --out.")
    return record


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def nothing_left(record: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether a run with this result has reached its end under these settings."""
    epochs: int = record["epochs_run"]
    best: int = record["best_epoch"]
    return epochs >= config.epochs or epochs - best > config.patience
