"""One training run and its directory: what was asked for, what happened, where it stands, what came out.

| file | holds |
|---|---|
| `config.yaml` | the whole configuration, defaults included, and a digest of the data |
| `history.csv` | one row an epoch: loss and its parts, validation and test metrics, seconds |
| `checkpoint/` | the latest and the best state |
| `result.json` | the best epoch's metrics and everything needed to compare runs; written when training ends |
| `curves.png` | loss and recall over the epochs |
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import yaml
from flax import nnx

from mgrad_jax import models
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.metrics import METRICS
from mgrad_jax.mirror import mirror_gradient, replay
from mgrad_jax.models import Recommender
from mgrad_jax.optimizers import make_optimizer
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.epoch import TrainState, split_model
from mgrad_jax.training.fit import EpochReport, FitResult, Progress, TrainingDiverged, fit

TRAININGS = ("mirror", "plain", "replay")
# What a resumed run may change: where it lies, and how far to go.
_FREE = ("out", "epochs")


class RunInterrupted(KeyboardInterrupt):
    """The user stopped a run; `epoch` is the last one on disk (0 where there is none), `directory` the run's."""

    def __init__(self, directory: Path, epoch: int) -> None:
        super().__init__(f"{directory}: stopped after epoch {epoch}")
        self.directory = directory
        self.epoch = epoch


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
        model, hyper_parameters: the model and its hyper-parameters by published name; the rest keep their defaults.
        data: a directory in MMRec format, or "demo".
        training: "mirror", "plain" (the optimizer alone) or "replay" (the control with equally many updates).
        alpha1, alpha2, interval: of Mirror Gradient; replay uses the interval, plain none of them.
        optimizer, learning_rate, weight_decay, optimizer_args: see `mgrad_jax.optimizers.make_optimizer`.
        learning_rate_decay: (g, s): epoch e, from 0, trains at learning_rate * g ** (e / s).
        max_norm: clip gradients by global norm before a batch's last update; None: never.
        seed: of the initial parameters and of everything drawn in training.
        epochs, patience, batch_size, metric, ks, evaluate: see `mgrad_jax.training.fit`.
        out: the run's directory; None: `runs/<model>-<data>-<training>-s<seed>`.

    Raises:
        UserError: a name that does not exist or a value out of range.
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
    learning_rate_decay: tuple[float, float] = (1.0, 50.0)
    max_norm: float | None = None
    seed: int = 999
    epochs: int = 1000
    patience: int = 20
    batch_size: int = 2048
    metric: str = "recall@5"
    ks: tuple[int, ...] = (5, 10, 20, 50)
    evaluate: str = "fresh"
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    out: str | None = None

    def __post_init__(self) -> None:
        models.make_config(self.model, dict(self.hyper_parameters))
        self._check_choices()
        self._check_numbers()
        if self.training != "plain":
            _positive("alpha1", self.alpha1)
            _positive("alpha2", self.alpha2)
            _at_least("interval", self.interval, 1)
        try:
            # Optax looks at most arguments only when it updates.
            transformation = self.transformation()
            params = jax.ShapeDtypeStruct((2, 2), jnp.float32)
            jax.eval_shape(lambda p: transformation.update(p, transformation.init(p), p), params)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"the {self.optimizer} optimizer does not take {dict(self.optimizer_args)} ({reason}); "
                "correct its arguments."
            ) from None

    def _check_choices(self) -> None:
        for what, value, choices in (
            ("training", self.training, TRAININGS),
            ("evaluate", self.evaluate, ("fresh", "stale")),
            ("metric", self.metric, self.metric_names),
        ):
            if value not in choices:
                raise UserError(f"unknown {what} '{value}'; choose one of {', '.join(choices)}.")

    def _check_numbers(self) -> None:
        _positive("learning_rate", self.learning_rate)
        for number in self.learning_rate_decay:
            _positive("learning_rate_decay", number)
        if self.max_norm is not None:
            _positive("max_norm", self.max_norm)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"weight_decay is {self.weight_decay}; it must be finite and not negative.")
        for name, least in (("seed", 0), ("epochs", 1), ("patience", 0), ("batch_size", 1)):
            _at_least(name, getattr(self, name), least)
        for k in self.ks:
            _at_least("ks", k, 1)
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}; it must be below 2**32.")

    @property
    def directory(self) -> Path:
        """The run's directory."""
        name = Path(self.data).resolve().name if self.data != "demo" else "demo"
        return Path(self.out or f"runs/{self.model}-{name}-{self.training}-s{self.seed}")

    @property
    def metric_names(self) -> list[str]:
        """All metrics, e.g. "recall@5", in the order of files and tables."""
        return [f"{name}@{k}" for name in METRICS for k in self.ks]

    @property
    def mirror(self) -> dict[str, Any] | None:
        """The factors and interval of Mirror Gradient, None in other trainings."""
        if self.training != "mirror":
            return None
        return {"alpha1": self.alpha1, "alpha2": self.alpha2, "interval": self.interval}

    @property
    def summary(self) -> str:
        """The settings of training in words, for messages."""
        details = {
            "mirror": f"mirror gradient (alpha1 {self.alpha1:g}, alpha2 {self.alpha2:g}, interval {self.interval})",
            "replay": f"replay (interval {self.interval})",
            "plain": "plain training",
        }
        return f"{self.model} with {details[self.training]}, {self.optimizer}, learning rate {self.learning_rate:g}"

    def transformation(self) -> optax.GradientTransformation:
        """The Optax chain of the run."""
        optimizer = make_optimizer(
            self.optimizer, self.learning_rate, weight_decay=self.weight_decay, **self.optimizer_args
        )
        if self.training == "mirror":
            return optax.chain(
                mirror_gradient(self.alpha1, self.alpha2, self.interval, max_norm=self.max_norm), optimizer
            )
        if self.training == "replay":
            return optax.chain(replay(self.interval, max_norm=self.max_norm), optimizer)
        return optimizer if self.max_norm is None else optax.chain(clip(self.max_norm), optimizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, the model's defaults filled in."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["data"] = self.data if self.data == "demo" else str(Path(self.data).absolute())
        values["out"] = str(self.directory)
        values["hyper_parameters"] = dataclasses.asdict(models.make_config(self.model, dict(self.hyper_parameters)))
        values["optimizer_args"] = dict(self.optimizer_args)
        values["learning_rate_decay"] = list(self.learning_rate_decay)
        values["ks"] = list(self.ks)
        return values


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} is {value}; it must be a positive number.")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value}; it must be a whole number of at least {least}.")


def clip(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)), PyTorch's rule for clipping by global norm.

    >>> clip(1.0).update(jnp.array([3.0, 4.0]), optax.EmptyState())[0].round(3)
    Array([0.6, 0.8], dtype=float32)
    """

    def update(updates: Any, params: Any) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)

    return optax.stateless(update)


class LoadedRun(NamedTuple):
    """A run read back: its configuration, its data, its model with the best parameters, and their epoch."""

    config: RunConfig
    data: Interactions
    model: Recommender
    epoch: int


def train_run(
    config: RunConfig, *, resume: bool = False, progress: Callable[[EpochReport], None] | None = None
) -> dict[str, Any]:
    """Train as configured and keep the run's directory.

    Args:
        config: what to train, and where the directory is.
        resume: go on with the run that is there; the numbers equal those of an unbroken run.
        progress: called after every epoch.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: bad input, a run already there, another configuration than the one to be resumed, a damaged
            checkpoint, an output that cannot be written.
        RunInterrupted: Ctrl-C; everything up to the last finished epoch is on disk.
    """
    directory = config.directory
    checkpoints = Checkpoints(directory / "checkpoint")
    if not resume and ((directory / "config.yaml").exists() or checkpoints.latest_epoch() is not None):
        raise UserError(f"{directory} already holds a run; add --resume to go on with it, or choose another --out.")
    data = load_interactions(config.data)
    settings = {**config.to_dict(), "data_digest": data_digest(data)}
    model = _create(config, data)
    if resume:
        _check_same(directory, settings)
        finished = _read_result(directory)
        if finished is not None and finished["epochs_run"] <= config.epochs and _reached_end(finished, config):
            return finished
    _write(directory, "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    history = History(directory / "history.csv", config.metric_names)
    history.rewind(checkpoints)

    def on_epoch(report: EpochReport) -> None:
        # A row tells that the epoch before it is safe. Nothing is lost by waiting: the next save would wait as well.
        checkpoints.wait()
        history.append(report)
        if progress is not None:
            progress(report)

    outcome = _fit(config, data, model, checkpoints, on_epoch)
    result = _result(config, data, model, outcome, history)
    _write(directory, "result.json", json.dumps(result, indent=2) + "\n")
    draw_curves(directory / "history.csv", directory / "curves.png", config)
    return result


def _create(config: RunConfig, data: Interactions) -> Recommender:
    return models.create(config.model, data, seed=config.seed, **config.hyper_parameters)


def _fit(
    config: RunConfig,
    data: Interactions,
    model: Recommender,
    checkpoints: Checkpoints,
    on_epoch: Callable[[EpochReport], None],
) -> FitResult:
    """Train; whatever ends it, the checkpoints are complete afterwards."""
    try:
        return fit(
            model,
            data,
            config.transformation(),
            epochs=config.epochs,
            patience=config.patience,
            seed=config.seed,
            batch_size=config.batch_size,
            metric=config.metric,
            ks=config.ks,
            learning_rate_decay=config.learning_rate_decay,
            evaluate=config.evaluate,  # type: ignore[arg-type]  # checked by the configuration
            checkpoints=checkpoints,
            resume=True,
            on_epoch=on_epoch,
        )
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{config.summary}: {error}") from None
    except KeyboardInterrupt:
        checkpoints.close()
        raise RunInterrupted(config.directory, checkpoints.latest_epoch() or 0) from None
    finally:
        checkpoints.close()


def load_run(directory: str | Path, data: str | None = None) -> LoadedRun:
    """Read a run back with its best parameters.

    Args:
        directory: of the run.
        data: where its data lie now, if not where the run found them.

    Raises:
        UserError: no run there, its checkpoint is damaged, or the data have changed since.
    """
    directory = Path(directory)
    settings = _read_settings(directory)
    digest = settings.pop("data_digest", None)
    try:
        values = {**settings, "ks": tuple(settings["ks"]), "out": str(directory)}
        values["learning_rate_decay"] = tuple(settings["learning_rate_decay"])
        config = RunConfig(**{**values, "data": data or settings["data"]})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{directory / 'config.yaml'} is not a run's configuration ({error}); train the run anew."
        ) from None
    interactions = load_interactions(config.data)
    if data_digest(interactions) != digest:
        raise UserError(f"{config.data} is not the data of {directory}; give the ones it was trained on with --data.")
    model = _create(config, interactions)
    parts = split_model(model)
    stale = parts.params if config.evaluate == "stale" else None
    metrics = dict.fromkeys(config.metric_names, 0.0)
    like = {
        "state": TrainState(parts.params, config.transformation().init(parts.params), parts.epoch_state, stale),
        "progress": Progress(valid=metrics, test=metrics).to_arrays(),
    }
    epoch, best = Checkpoints(directory / "checkpoint").restore(like, "best")
    state = best["state"]
    nnx.update(model, state.params if state.stale_params is None else state.stale_params, state.epoch_state)
    return LoadedRun(config, interactions, model, epoch)


def data_digest(data: Interactions) -> str:
    """A checksum over interactions and features: a run goes on with the data it began with, not with their name."""
    value = zlib.crc32(f"{data.n_users} {data.n_items}".encode())
    for split in ("train", "valid", "test"):
        value = zlib.crc32(getattr(data, split).tobytes(), value)
    for name in sorted(data.features):
        value = zlib.crc32(data.features[name].data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _read_settings(directory: Path) -> dict[str, Any]:
    """The content of `config.yaml`."""
    path = directory / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} holds no run (there is no config.yaml); give the directory of one.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); restore it or train the run anew.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a run's configuration; restore it or train the run anew.")
    return settings


def _check_same(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume under another configuration, naming what differs."""
    before = _read_settings(directory)
    if before.get("data_digest") != settings["data_digest"]:
        raise UserError(
            f"data {settings['data']} is not what {directory} was begun with ({before.get('data')}); resume with that, "
            "or choose another --out."
        )
    unused = {"plain": ("alpha1", "alpha2", "interval"), "replay": ("alpha1", "alpha2")}.get(settings["training"], ())
    # The data may lie elsewhere now: their digest is what counts.
    keys = [key for key in {**before, **settings} if key not in (*_FREE, *unused, "data", "hyper_parameters")]
    differing = [key for key in keys if before.get(key) != settings.get(key)]
    old, new = before.get("hyper_parameters") or {}, settings["hyper_parameters"]
    differing += [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if differing:
        changes = ", ".join(f"{k} was {_look(before, k)!r} and is {_look(settings, k)!r}" for k in differing)
        raise UserError(
            f"{directory} was begun with other settings ({changes}); resume with those, or choose another --out."
        )


def _look(settings: dict[str, Any], key: str) -> Any:
    return settings.get(key, (settings.get("hyper_parameters") or {}).get(key))


def _read_result(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _reached_end(result: dict[str, Any], config: RunConfig) -> bool:
    """Whether a finished run has nothing left to do under these settings."""
    stopped_early = result["epochs_run"] - result["best_epoch"] > config.patience
    return stopped_early or result["epochs_run"] == config.epochs


def _write(directory: Path, name: str, text: str) -> None:
    """Write a file in one step: it is there as a whole or not at all."""
    temporary = directory / f".{name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / name)
    except OSError as error:
        raise UserError(f"{directory / name} cannot be written ({error.strerror}); choose another --out.") from None


class History:
    """`history.csv`, one row an epoch, on disk as soon as the epoch is over.

    Args:
        path: of the file.
        metrics: names of the metrics in the order of their columns; only `append` needs them.
    """

    def __init__(self, path: Path, metrics: Sequence[str] = ()) -> None:
        self.path = path
        self.metrics = metrics

    def append(self, report: EpochReport) -> None:
        """Add the row of an epoch, and the header before the first."""
        metrics = {"valid": report.valid, "test": report.test}
        row = {
            "epoch": report.epoch,
            "loss": report.loss,
            **{f"loss_{name}": value for name, value in report.parts.items()},
            **{f"{split}_{name}": values[name] for split, values in metrics.items() for name in self.metrics},
            "seconds_train": round(report.seconds_train, 6),
            "seconds_evaluate": round(report.seconds_evaluate, 6),
        }
        try:
            with self.path.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, row.keys(), lineterminator="\n")
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); free space and resume.") from None

    def rows(self) -> list[dict[str, float]]:
        """All complete rows in order."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            table = list(csv.DictReader(stream))
        # A kill may leave a last row cut short.
        complete = [row for row in table if None not in row.values() and None not in row]
        return [{name: float(value) for name, value in row.items()} for row in complete]

    def rewind(self, checkpoints: Checkpoints) -> None:
        """Bring rows and checkpoints to the same epoch, the latest that both have."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        recorded = len(self.rows())
        while (checkpoints.latest_epoch() or 0) > recorded:
            # The process died between the checkpoint and its row.
            checkpoints.discard_latest()
        kept = checkpoints.latest_epoch() or 0
        text = "\n".join(lines[: kept + 1]) + "\n" if kept else ""
        _write(self.path.parent, self.path.name, text)
        (self.path.parent / "result.json").unlink(missing_ok=True)


def _result(
    config: RunConfig, data: Interactions, model: Recommender, outcome: FitResult, history: History
) -> dict[str, Any]:
    """The content of `result.json`."""
    rows = history.rows()
    names = config.metric_names
    device = jax.devices()[0]
    packages = ("mgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")
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
        "replay": {"interval": config.interval} if config.training == "replay" else None,
        "optimizer": {
            "name": config.optimizer,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "max_norm": config.max_norm,
            **config.optimizer_args,
        },
        "batch_size": config.batch_size,
        "hyper_parameters": dataclasses.asdict(model.config),
        "epochs_run": outcome.epochs_run,
        "best_epoch": outcome.best_epoch,
        "metric": config.metric,
        "valid": {name: outcome.valid[name] for name in names},
        "test": {name: outcome.test[name] for name in names},
        # The whole run's, also where it was resumed; compilation is this process's.
        "seconds": {
            "compile": outcome.seconds["compile"],
            "train": math.fsum(row["seconds_train"] for row in rows),
            "evaluate": math.fsum(row["seconds_evaluate"] for row in rows),
        },
        "device": f"{device.platform} ({device.device_kind})",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def draw_curves(history: Path, path: Path, config: RunConfig) -> None:
    """Draw loss and recall over the epochs of a `history.csv`; the best epoch is marked."""
    from matplotlib.figure import Figure

    rows = History(history).rows()
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, metric = figure.subplots(1, 2)
    loss.plot(epochs, [row["loss"] for row in rows], color="tab:gray")
    loss.set(xlabel="epoch", ylabel="training loss, summed over batches")
    recalls = {f"recall@{k}" for k in config.ks if k in (5, 20)} | {config.metric}
    for color, name in zip(("tab:blue", "tab:orange", "tab:green"), sorted(recalls), strict=False):
        metric.plot(epochs, [row[f"valid_{name}"] for row in rows], color=color, label=f"validation {name}")
        metric.plot(epochs, [row[f"test_{name}"] for row in rows], color=color, linestyle="--", label=f"test {name}")
    best = max(rows, key=lambda row: row[f"valid_{config.metric}"])["epoch"]
    metric.axvline(best, color="black", linewidth=0.8, linestyle=":", label=f"best epoch {best:.0f}")
    metric.set(xlabel="epoch", ylabel="metric")
    metric.legend(fontsize="small")
    figure.suptitle(f"{config.summary}, seed {config.seed}", fontsize="medium")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); free space or choose another --out.") from None
