"""A training run on disk: its configuration, history, checkpoints, result and curves."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import optax
import yaml

from mgrad_jax import models
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.mirror import mirror_gradient, replay
from mgrad_jax.models import Recommender
from mgrad_jax.optimizers import clip_by_torch_norm, make_optimizer
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.fit import EpochReport, FitResult, fit, restore_best

TRAININGS = ("mirror", "plain", "replay")
# What may change when a run is resumed: how long it goes on, not what it computes.
_MAY_CHANGE = ("epochs", "patience")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on; it is written to `config.yaml`.

    Attributes:
        model: a name of `mgrad_jax.models.names()`.
        data: a directory in MMRec format, or "demo".
        training: "mirror", "plain", or "replay" (the equal-update control).
        alpha1, alpha2, interval: of Mirror Gradient; `replay` uses the interval.
        optimizer, learning_rate, weight_decay, optimizer_args: the base optimizer, see `mgrad_jax.optimizers`.
        max_norm: clip the gradient's global norm before the last update of a batch; None for no clipping.
        decay_factor, decay_epochs: the learning rate of epoch e is multiplied by factor ** (e / epochs).
        seed: of the initial parameters and of everything drawn in training.
        epochs, patience, batch_size: as in `mgrad_jax.training.fit`.
        evaluate: "fresh" or "stale", as in `mgrad_jax.training.fit`.
        hyper_parameters: the model's, by published name.
    """

    model: str
    data: str
    training: str = "mirror"
    alpha1: float = 1.0
    alpha2: float = 0.2
    interval: int = 3
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    max_norm: float | None = None
    decay_factor: float = 1.0
    decay_epochs: float = 50.0
    seed: int = 999
    epochs: int = 1000
    patience: int = 20
    batch_size: int = 2048
    evaluate: str = "fresh"
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.training not in TRAININGS:
            raise UserError(f"unknown training '{self.training}'; choose one of {', '.join(TRAININGS)}.")
        if self.evaluate not in ("fresh", "stale"):
            raise UserError(f"unknown evaluation '{self.evaluate}'; choose fresh or stale.")
        for name in ("learning_rate", "decay_factor", "decay_epochs"):
            _check_number(name, getattr(self, name), positive=True)
        _check_number("weight_decay", self.weight_decay, positive=False)
        if self.max_norm is not None:
            _check_number("max_norm", self.max_norm, positive=True)
        models.make_config(self.model, dict(self.hyper_parameters))
        self.transformation()

    def transformation(self) -> optax.GradientTransformation:
        """The Optax chain of the run."""
        optimizer = make_optimizer(
            self.optimizer, self.learning_rate, weight_decay=self.weight_decay, **self.optimizer_args
        )
        try:
            if self.training == "mirror":
                first = mirror_gradient(self.alpha1, self.alpha2, self.interval, max_norm=self.max_norm)
            elif self.training == "replay":
                first = replay(self.interval, max_norm=self.max_norm)
            else:
                return optax.chain(clip_by_torch_norm(self.max_norm), optimizer) if self.max_norm else optimizer
        except ValueError as error:
            raise UserError(str(error)) from None
        return optax.chain(first, optimizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as `config.yaml` holds them."""
        plain = dataclasses.asdict(self)
        return {**plain, "optimizer_args": dict(self.optimizer_args), "hyper_parameters": dict(self.hyper_parameters)}


def _check_number(name: str, value: float, *, positive: bool) -> None:
    if not (0 < value < float("inf") if positive else 0 <= value < float("inf")):
        raise UserError(f"{name} is {value}; it must be a finite number {'above' if positive else 'of at least'} 0.")


def train_run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    on_start: Callable[[Interactions, Recommender], None] | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> dict[str, Any]:
    """Train and keep everything about it in a directory.

    The directory holds `config.yaml`, `history.csv` (one row an epoch), `checkpoint/` (latest and best), `result.json` and
    `curves.png`. A run that was stopped, however, loses at most the epoch under way.

    Args:
        config: what to train.
        out: the run directory; it must be new unless `resume`.
        resume: go on from the latest checkpoint, to the numbers of an unbroken run.
        on_start: called with data and model before training.
        on_epoch: called after every epoch.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: bad input, an unwritable or used directory, or a resume with other settings.
    """
    directory = Path(out)
    _open_directory(directory, config, resume)
    data = load_interactions(config.data)
    model = models.create(config.model, data, seed=config.seed, **config.hyper_parameters)
    if on_start is not None:
        on_start(data, model)
    checkpoints = Checkpoints(directory / "checkpoint")
    history = _History(directory / "history.csv", checkpoints.latest_epoch() or 0)

    def report(epoch: EpochReport) -> None:
        history.add(epoch)
        if on_epoch is not None:
            on_epoch(epoch)

    try:
        result = fit(
            model,
            data,
            config.transformation(),
            epochs=config.epochs,
            patience=config.patience,
            seed=config.seed,
            batch_size=config.batch_size,
            learning_rate_decay=(config.decay_factor, config.decay_epochs),
            evaluate="stale" if config.evaluate == "stale" else "fresh",
            checkpoints=checkpoints,
            resume=resume,
            on_epoch=report,
        )
    finally:
        checkpoints.close()
    summary = _summary(config, data, result)
    _write_atomically(directory / "result.json", json.dumps(summary, indent=2) + "\n")
    plot_curves(directory)
    return summary


def _open_directory(directory: Path, config: RunConfig, resume: bool) -> None:
    """Make a new run directory, or check that an existing one belongs to this configuration."""
    file = directory / "config.yaml"
    if resume:
        if not file.exists():
            raise UserError(f"{file} does not exist, so there is no run to resume; train without --resume.")
        stored, wanted = read_config(directory).to_dict(), config.to_dict()
        differing = [key for key in wanted if key not in _MAY_CHANGE and stored[key] != wanted[key]]
        if differing:
            changes = ", ".join(f"{key}: {stored[key]} there, {wanted[key]} now" for key in differing)
            raise UserError(f"{directory} was started with other settings ({changes}); resume with the same ones.")
    elif file.exists():
        raise UserError(f"{directory} already holds a run; go on with --resume or choose another --out.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_atomically(file, yaml.safe_dump(config.to_dict(), sort_keys=False))
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); choose another --out.") from None


def read_config(directory: str | Path) -> RunConfig:
    """The configuration of a run directory; a missing or altered one is a `UserError`."""
    file = Path(directory) / "config.yaml"
    try:
        return RunConfig(**yaml.safe_load(file.read_text()))
    except OSError:
        raise UserError(f"{file} cannot be read; give a directory that `mgrad-jax train` wrote.") from None
    except (yaml.YAMLError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} is not a run's configuration ({reason}); restore it or train anew.") from None


def load_run(directory: str | Path) -> tuple[RunConfig, Interactions, Recommender]:
    """A run's configuration, its data, and the model with the parameters of its best epoch."""
    config = read_config(directory)
    data = load_interactions(config.data)
    model = models.create(config.model, data, seed=config.seed, **config.hyper_parameters)
    checkpoints = Checkpoints(Path(directory) / "checkpoint")
    try:
        restore_best(model, config.transformation(), checkpoints, stale=config.evaluate == "stale")
    finally:
        checkpoints.close()
    return config, data, model


class _History:
    """`history.csv`, one row an epoch, written as the epochs end."""

    def __init__(self, file: Path, epochs: int) -> None:
        """Keep the rows of the first `epochs` epochs: a killed run may have written one more than its checkpoint."""
        self.file = file
        self.columns: list[str] | None = None
        if epochs and file.exists():
            lines = file.read_text().splitlines()
            _write_atomically(file, "\n".join(lines[: epochs + 1]) + "\n")
            self.columns = lines[0].split(",")
        else:
            file.unlink(missing_ok=True)

    def add(self, epoch: EpochReport) -> None:
        row = {
            "epoch": epoch.epoch,
            "loss": repr(epoch.loss),
            **{f"loss_{name}": repr(value) for name, value in epoch.parts.items()},
            **{f"valid_{name}": repr(value) for name, value in epoch.valid.items()},
            **{f"test_{name}": repr(value) for name, value in epoch.test.items()},
            "seconds_train": f"{epoch.seconds_train:.4f}",
            "seconds_evaluate": f"{epoch.seconds_evaluate:.4f}",
        }
        with self.file.open("a", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            if self.columns is None:
                self.columns = list(row)
                writer.writerow(self.columns)
            writer.writerow([row[column] for column in self.columns])


def _summary(config: RunConfig, data: Interactions, result: FitResult) -> dict[str, Any]:
    mirror = {"alpha1": config.alpha1, "alpha2": config.alpha2, "interval": config.interval}
    defaults = models.make_config(config.model, dict(config.hyper_parameters))
    device = jax.devices()[0]
    return {
        "model": config.model,
        "data": {
            "name": data.name,
            "users": data.n_users,
            "items": data.n_items,
            "interactions": sum(len(part) for part in (data.train, data.valid, data.test)),
        },
        "seed": config.seed,
        "training": config.training,
        "mirror": mirror if config.training == "mirror" else None,
        "optimizer": {
            "name": config.optimizer,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            **config.optimizer_args,
        },
        "hyper_parameters": dataclasses.asdict(defaults),
        "batch_size": config.batch_size,
        "epochs_run": result.epochs_run,
        "best_epoch": result.best_epoch,
        "valid": result.valid,
        "test": result.test,
        "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
        "device": f"{device.platform}: {device.device_kind}",
        "versions": {name: version(name) for name in ("mgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")},
    }


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, file)


def plot_curves(directory: Path) -> None:
    """Draw `curves.png` from `history.csv`: the loss, and Recall@5 and @20 on validation and test."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd

    history = pd.read_csv(directory / "history.csv")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(history["epoch"], history["loss"])
    left.set(xlabel="epoch", ylabel="training loss (sum over batches)")
    for split, style in (("valid", "-"), ("test", "--")):
        for k, colour in ((5, "C0"), (20, "C1")):
            right.plot(
                history["epoch"], history[f"{split}_recall@{k}"], style, color=colour, label=f"{split} Recall@{k}"
            )
    right.set(xlabel="epoch")
    right.legend()
    figure.savefig(directory / "curves.png", dpi=110)
    plt.close(figure)
