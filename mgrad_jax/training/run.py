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

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from flax import nnx

from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.models import Recommender
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.epoch import TrainState, split_model
from mgrad_jax.training.fit import EpochReport, FitResult, Progress, TrainingDiverged, fit
from mgrad_jax.training.history import History, draw_curves
from mgrad_jax.training.record import result_record, write_text

# What a resumed run may change: where it lies, and how far to go.
_FREE = ("out", "epochs")


class RunInterrupted(KeyboardInterrupt):
    """The user stopped a run; `epoch` is the last one on disk (0 where there is none), `directory` the run's."""

    def __init__(self, directory: Path, epoch: int) -> None:
        super().__init__(f"{directory}: stopped after epoch {epoch}")
        self.directory = directory
        self.epoch = epoch


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
    model = config.create_model(data)
    if resume:
        _check_same(directory, settings)
        finished = _read_result(directory)
        if finished is not None and finished["epochs_run"] <= config.epochs and _reached_end(finished, config):
            return finished
    write_text(directory, "config.yaml", yaml.safe_dump(settings, sort_keys=False))
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
    write_text(directory, "result.json", json.dumps(result, indent=2) + "\n")
    draw_curves(directory / "history.csv", directory / "curves.png", config)
    return result


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
            config.transformation(data),
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
        raise TrainingDiverged(f"{config.summary}: {error}{config.suspicion}") from None
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
    model = config.create_model(interactions, training=False)
    parts = split_model(model)
    stale = parts.params if config.evaluate == "stale" else None
    metrics = dict.fromkeys(config.metric_names, 0.0)
    like = {
        "state": TrainState(
            parts.params, config.transformation(interactions).init(parts.params), parts.epoch_state, stale
        ),
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


def _result(
    config: RunConfig, data: Interactions, model: Recommender, outcome: FitResult, history: History
) -> dict[str, Any]:
    """The content of `result.json`."""
    rows = history.rows()
    return result_record(
        config,
        data,
        epochs_run=outcome.epochs_run,
        best_epoch=outcome.best_epoch,
        valid=outcome.valid,
        test=outcome.test,
        # The whole run's, also where it was resumed; compilation is this process's.
        seconds={
            "compile": outcome.seconds["compile"],
            "train": math.fsum(row["seconds_train"] for row in rows),
            "evaluate": math.fsum(row["seconds_evaluate"] for row in rows),
        },
    )
