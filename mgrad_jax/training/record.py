"""What single runs and sweeps write alike: the content of `result.json`, and files that are whole or not there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training.config import FLAT_MINIMA, RunConfig

_PACKAGES = ("mgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")


def result_record(
    config: RunConfig,
    data: Interactions,
    *,
    epochs_run: int,
    best_epoch: int,
    valid: Mapping[str, float],
    test: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `result.json`: settings, data, metrics of the best epoch, times, device, versions."""
    device = jax.devices()[0]
    return {
        "model": config.model,
        "data": {
            "name": data.name,
            "users": data.n_users,
            "items": data.n_items,
            "interactions": len(data.train) + len(data.valid) + len(data.test),
        },
        "seed": config.seed,
        "training": config.training,
        "mirror": config.mirror,
        "flat_minima": {"name": config.training, **config.flat_minima_args} if config.training in FLAT_MINIMA else None,
        "adversarial": None if config.adversarial is None else dict(config.adversarial),
        "feature_dtype": config.feature_dtype,
        "matmul_precision": config.matmul_precision,
        "deterministic": config.deterministic,
        "replay": {"interval": config.interval} if config.training == "replay" else None,
        "optimizer": {
            "name": config.optimizer,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "max_norm": config.max_norm,
            **config.optimizer_args,
        },
        "batch_size": config.batch_size,
        "hyper_parameters": dataclasses.asdict(models.make_config(config.model, dict(config.hyper_parameters))),
        "epochs_run": epochs_run,
        "best_epoch": best_epoch,
        "metric": config.metric,
        "valid": {name: valid[name] for name in config.metric_names if name in valid},
        "test": {name: test[name] for name in config.metric_names if name in test},
        "seconds": dict(seconds),
        "device": f"{device.platform} ({device.device_kind})",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def write_text(directory: Path, name: str, text: str) -> None:
    """Write a file in one step: it is there as a whole or not at all."""
    temporary = directory / f".{name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / name)
    except OSError as error:
        raise UserError(f"{directory / name} cannot be written ({error.strerror}); choose another --out.") from None
