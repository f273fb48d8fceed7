"""One training run and its directory: what was asked for, what happened, where it stands, what came out.

| file | holds |
|---|---|
| `config.yaml` | the whole configuration, defaults included, and a digest of the data |
| `checkpoint/` | the latest and the best state; each with the configuration and the history up to its epoch |
| `kept/` | the parameters of every N-th epoch, where they are asked for (`mgrad_jax.training.kept`) |
| `history.csv` | one row per epoch: loss and its parts, validation and test metrics, seconds |
| `result.json` | the best epoch's metrics and everything needed to compare runs; written when training ends |
| `curves.png` | loss and recall over the epochs |
| `.lock` | the process that writes, while it does |

The checkpoints are what is precious. Everything else is made again from them where it is missing or damaged.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import yaml
from jax.sharding import Mesh

from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.devices import mesh
from mgrad_jax.errors import ProcessLost, UserError
from mgrad_jax.files import Damaged, Lock, locked, read_mapping, write_whole
from mgrad_jax.models import Recommender
from mgrad_jax.processes import by_first, check_same, check_shared, is_first, lost, several, together
from mgrad_jax.signals import held_back
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.checkpoint_directory import CheckpointLost
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.epoch import split_model
from mgrad_jax.training.fit import EpochReport, FitResult, TrainingDiverged, fit, restore_best
from mgrad_jax.training.history import History, draw_curves, read_rows
from mgrad_jax.training.identity import (
    check_data,
    differences,
    differing_machine,
    identity,
    is_digest_of,
    machine,
    run_settings,
    spread,
)
from mgrad_jax.training.kept import KeptParams
from mgrad_jax.training.numerics import as_configured
from mgrad_jax.training.record import nothing_left, read_record, result_record, versions
from mgrad_jax.training.start import start_from


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

    @property
    def kept(self) -> KeptParams:
        """The parameters that the run kept of some of its epochs."""
        return _kept(self.config, run_settings(self.config, self.data))

    def vectors(self) -> tuple[jax.Array, jax.Array]:
        """Users (n_users, dim) and items (n_items, dim), whose products are the scores, at the run's precision."""
        with as_configured(self.config):
            return jax.jit(lambda model: model.embed())(self.model)


def train_run(
    config: RunConfig,
    *,
    resume: bool = False,
    progress: Callable[[EpochReport], None] | None = None,
    devices: int | Literal["all"] = 1,
) -> dict[str, Any]:
    """Train as configured and keep the run's directory, which no other process may write to meanwhile.

    Args:
        config: what to train, and where the directory is.
        resume: go on with the run that is there, to more epochs or with more patience if asked for; the numbers equal
            those of an unbroken run. Files that are missing or damaged are made again from the checkpoints.
        progress: called after every epoch.
        devices: how many the run is split over (`mgrad_jax.devices`), of all processes together; no setting of the
            run, which may be resumed on another number.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: bad input, a directory that another process holds, a run already there, another configuration than
            the one to be resumed, a damaged checkpoint, an output that cannot be written.
        RunInterrupted: Ctrl-C; everything up to the last finished epoch is on disk. After the last epoch it is too
            late to stop, and the run is completed.
        ProcessLost: another of several processes that make this call is gone.
    """
    try:
        check_same(
            lambda: {**config.values, "resume": resume, "devices": devices, **versions(), "out": None, "data": None}
        )
        return _train_run(config, resume, progress, devices)
    except (jax.errors.JaxRuntimeError, ProcessLost) as error:
        if not several() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        epoch = Checkpoints(config.directory / "checkpoint").latest_epoch()
        kept = f"epoch {epoch} is on disk" if epoch else "no epoch is on disk"
        again = "start all processes again" + (" with --resume" if epoch else "")
        raise ProcessLost(f"{config.directory}: {lost(error)}; {kept}, {again}.") from error


def _train_run(
    config: RunConfig, resume: bool, progress: Callable[[EpochReport], None] | None, devices: int | Literal["all"]
) -> dict[str, Any]:
    by_first(lambda: _check_there(config.directory) if resume else None)
    over = None if devices == 1 and not several() else mesh(devices)
    with _held(config.directory) as lock:
        check_shared(config.directory)
        run = _Run(config, lock, over)
        by_first(lambda: run.check_begun(resume))
        try:
            return run.train(progress)
        except KeyboardInterrupt:
            raise RunInterrupted(config.directory, run.checkpoints.latest_epoch() or 0) from None


def _kept(config: RunConfig, settings: Mapping[str, Any]) -> KeptParams:
    return KeptParams(config.directory, config.keep_every, identity(settings))


def _check_there(directory: Path) -> None:
    if not directory.is_dir():
        raise _no_run(directory)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[Lock | None]:
    """Hold a directory for this process; of several, the first one does."""
    with contextlib.ExitStack() as stack:
        yield together(lambda: stack.enter_context(locked(directory)) if is_first() else None)


class _Run:
    """A run in a directory that this process holds, or the first of several.

    Attributes:
        config, data: the run, and what it trains on.
        settings: what its files say of it (`run_settings`).
        kept: the parameters of some of its epochs.
    """

    def __init__(self, config: RunConfig, lock: Lock | None, mesh: Mesh | None) -> None:
        self.config, self.lock, self.path, self.mesh = config, lock, config.directory, mesh
        self.n_devices = 1 if mesh is None else mesh.size
        self.history = History(config.metric_names)
        self.checkpoints = Checkpoints(self.path / "checkpoint", self._write_history)

    def check_begun(self, resume: bool) -> None:
        """Raise a `UserError` where there is a run and none is to be resumed, or the other way round."""
        if not resume and self.is_begun():
            raise UserError(f"{self.path} already holds a run; add --resume to go on with it, or choose another --out.")
        if resume and not self.is_begun() and not (self.path / "config.yaml").exists():
            raise _no_run(self.path)

    @functools.cached_property
    def data(self) -> Interactions:
        return load_interactions(self.config.data)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return run_settings(self.config, self.data)

    @functools.cached_property
    def kept(self) -> KeptParams:
        return _kept(self.config, self.settings)

    def is_begun(self) -> bool:
        """Whether there is anything that took an epoch to compute."""
        history, result = self.path / "history.csv", self.path / "result.json"
        rows = history.exists() and history.stat().st_size > 0
        return rows or result.exists() or self.checkpoints.latest_epoch() is not None

    def train(self, progress: Callable[[EpochReport], None] | None) -> dict[str, Any]:
        """Bring the run to its end from wherever it stands; returns what `result.json` holds."""
        digest = together(lambda: self.settings)["data_digest"]
        check_same(lambda: {"data with the digest": digest})
        model = self.config.create_model(self.data, mesh=self.mesh)
        if by_first(self.is_begun):
            by_first(self._take_up)
            finished = by_first(self._finished)
            if finished is not None:
                return finished
        if by_first(self._begins_elsewhere):
            self._start(model)
        with held_back(deliver=False):
            by_first(lambda: self._prepare(model))
            outcome = self._fit(model, progress)
            return by_first(lambda: self._conclude(outcome))

    def _begins_elsewhere(self) -> bool:
        """Whether the run begins with the parameters of another.

        A resumed one does without it, unless a best epoch that was lost has to be trained again.
        """
        start = self.config.start_from
        return start is not None and (self.checkpoints.latest_epoch() is None or Path(start).exists())

    def _start(self, model: Recommender) -> None:
        start = str(self.config.start_from)
        start_from(model, load_run(start, self.config.data, self.mesh).model, start)

    def _take_up(self) -> None:
        """Check that the run that is there is this one, and read its history.

        Raises:
            UserError: it is another, or it cannot be read.
        """
        epoch = self.checkpoints.latest_epoch()
        place, notes = (self.path, {}) if epoch is None else self.checkpoints.read_notes("latest")
        before = notes["run"] if notes else _read_settings(self.path)
        self._check_same(place, before)
        with contextlib.suppress(CheckpointLost):  # the latest is enough to go on
            place, best = self.checkpoints.read_notes("best") if notes else (place, {})
            self._check_same(place, best.get("run", before))
        self.history.text = notes["history"] if notes else read_rows(self.path / "history.csv")
        self.history.rewind(epoch or 0)
        if notes and (changes := differing_machine(notes["machine"], self.n_devices)):
            _warn(f"{self.path} was trained elsewhere ({changes}); the last bits of its numbers may differ here.")

    def _finished(self) -> dict[str, Any] | None:
        """The result of a run in which nothing is left to do, what else it lacks made again; None otherwise."""
        try:
            result = read_record(self.path / "result.json", self.settings)
        except (FileNotFoundError, Damaged):
            return None
        epoch = self.checkpoints.latest_epoch()
        if not nothing_left(result, self.config) or epoch not in (None, result["epochs_run"]):
            return None
        if epoch is not None:  # whoever removed the checkpoints of a finished run wanted no more of it
            if not self.checkpoints.are_intact():
                return None
            with held_back():
                self.checkpoints.tidy()
                self._make_whole()
        if result["epochs_run"] > self.config.epochs:
            _warn(f"{self.path} has {result['epochs_run']} epochs, more than were asked for; it stays as it is.")
        return result

    def _prepare(self, model: Recommender) -> None:
        """Write down what is going to be trained; from here on the run can be resumed."""
        epoch = self.checkpoints.latest_epoch()
        if epoch is None and self.is_begun():
            _warn(f"{self.path} has no checkpoints any more; it is trained from the beginning.")
        if len(self.history.rows()) < (epoch or 0):
            _warn(f"{self.path / 'history.csv'} lacks epochs, of which checkpoints of earlier versions hold no copy.")
        self._write_settings()
        if self.history.text:
            self.history.restore(self.path / "history.csv")
        (self.path / "result.json").unlink(missing_ok=True)  # it tells of fewer epochs
        params = split_model(model).params
        state = jax.eval_shape(lambda: (params, self.config.transformation(self.data).init(params)))
        n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        best = self.checkpoints.best_epoch() or 0
        self.checkpoints.check_space(n_bytes, self.kept.least_bytes(self.config, params, epoch or 0, best))

    def _fit(self, model: Recommender, progress: Callable[[EpochReport], None] | None) -> FitResult:
        """Train; whatever ends it, the checkpoints are complete afterwards."""
        config, notes = self.config, {"run": self.settings, "machine": {**machine(), **spread(self.n_devices)}}
        self.checkpoints.notes = {**notes, "history": self.history.text}

        def on_epoch(report: EpochReport) -> None:
            self._check_lock()
            self.history.append(report)
            self.checkpoints.notes = {**notes, "history": self.history.text}
            if progress is not None:
                progress(report)

        try:
            return as_configured(config)(fit)(
                model,
                self.data,
                config.transformation(self.data),
                config,
                checkpoints=self.checkpoints,
                kept=self.kept,
                resume=True,
                on_epoch=on_epoch,
                mesh=self.mesh,
            )
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{config.summary}: {error}{config.suspicion}") from None
        finally:
            self.checkpoints.close()

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _write_history(self, notes: Mapping[str, Any]) -> None:
        # Made again from the checkpoint, should it not survive a power loss.
        write_whole(self.path / "history.csv", notes["history"], durable=False)

    def _write_settings(self) -> None:
        write_whole(self.path / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False))

    def _conclude(self, outcome: FitResult) -> dict[str, Any]:
        """Write what a finished run has besides, once its checkpoints are known to be there."""
        self._check_lock()
        self.checkpoints.tidy()
        if self.checkpoints.latest_epoch() != outcome.epochs_run:
            raise UserError(f"{self.path} lost its checkpoint of epoch {outcome.epochs_run}; repeat with --resume.")
        self.checkpoints.read_notes("best")
        rows = self.history.rows()
        result = result_record(
            self.config,
            self.data,
            self.settings,
            outcome,
            # The whole run's, also where it was resumed; compilation is this process's.
            {
                "compile": outcome.seconds["compile"],
                "train": math.fsum(row["seconds_train"] for row in rows),
                "evaluate": math.fsum(row["seconds_evaluate"] for row in rows),
            },
            devices=self.n_devices,
        )
        write_whole(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        (self.path / "curves.png").unlink(missing_ok=True)  # those of fewer epochs
        self._make_whole()
        return result

    def _make_whole(self) -> None:
        """Make the files again that are missing or damaged, of those that follow from the history and the settings."""
        try:
            before = read_mapping(self.path / "config.yaml", yaml.safe_load)
            is_this = before.get("data_digest") == self.settings["data_digest"] and not differences(
                before, self.settings
            )
        except (FileNotFoundError, Damaged):
            is_this = False
        if not is_this:
            self._write_settings()
        if self.history.text:
            self.history.restore(self.path / "history.csv")
            if not _is_png(self.path / "curves.png"):
                draw_curves(self.history, self.path / "curves.png", self.config)

    def _check_same(self, place: Path, before: Mapping[str, Any]) -> None:
        """Refuse what was made on other data or with other settings, naming what differs."""
        check_data(place, before, self.settings, self.data)
        if changes := differences(before, self.settings):
            raise UserError(
                f"{place} was begun with other settings ({changes}); resume with those, or choose another --out."
            )


def _is_png(path: Path) -> bool:
    """Whether a file is an image that was written to its end."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content.startswith(b"\x89PNG") and b"IEND" in content[-12:]


def load_run(directory: str | Path, data: str | None = None, mesh: Mesh | None = None) -> LoadedRun:
    """Read a run back with its best parameters; it may be under way.

    Args:
        directory: of the run.
        data: where its data lie now, if not where the run found them.
        mesh: of several devices that are to share the model; where they are those of several processes, all of these
            make this call.

    Raises:
        UserError: no run there, its checkpoint is damaged or another run's, or the data have changed since.
    """
    config, interactions, checkpoints = together(lambda: _read_back(Path(directory), data))
    model = config.create_model(interactions, training=False, mesh=mesh)
    epoch = restore_best(model, config.transformation(interactions), checkpoints, config)
    return LoadedRun(config, interactions, model, epoch)


def _read_back(directory: Path, data: str | None) -> tuple[RunConfig, Interactions, Checkpoints]:
    """What there is of a run but its parameters, checked."""
    settings = _read_settings(directory)
    config = _configuration(directory, settings, data)
    interactions = load_interactions(config.data)
    if not is_digest_of(settings.get("data_digest"), interactions):
        raise UserError(f"{config.data} is not the data of {directory}; give the ones it was trained on with --data.")
    checkpoints = Checkpoints(directory / "checkpoint")
    place, notes = checkpoints.read_notes("best")
    if notes:
        changes = differences(notes["run"], settings)
        if not changes and not is_digest_of(notes["run"]["data_digest"], interactions):
            changes = "on other data"
        if changes:
            raise UserError(f"{place} belongs to another run than {directory / 'config.yaml'} ({changes}); restore it.")
    return config, interactions, checkpoints


def _no_run(directory: Path) -> UserError:
    return UserError(f"{directory} holds no run (there is no config.yaml); give the directory of one.")


def _read_settings(directory: Path) -> dict[str, Any]:
    """The content of `config.yaml`."""
    path = directory / "config.yaml"
    try:
        return read_mapping(path, yaml.safe_load)
    except FileNotFoundError:
        if Checkpoints(directory / "checkpoint").latest_epoch() is None:
            raise _no_run(directory) from None
        reason = "is missing"
    except Damaged as damage:
        reason = f"is damaged ({damage})"
    raise UserError(f"{path} {reason}; repeat the command that trained the run with --resume, which writes it again.")


def _configuration(directory: Path, settings: Mapping[str, Any], data: str | None) -> RunConfig:
    """The configuration that `config.yaml` holds, checked like any other."""
    values = {name: value for name, value in settings.items() if name != "data_digest"}
    try:
        return RunConfig.of({**values, "data": data or settings["data"], "out": str(directory)})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"{directory / 'config.yaml'} is not a run's configuration ({reason.rstrip('.')}); repeat the command that "
            "trained the run with --resume, which writes it again."
        ) from None


def _warn(sentence: str) -> None:
    warnings.warn(sentence, UserWarning, stacklevel=4)
