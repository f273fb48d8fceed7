"""One training run in its directory, which `mgrad_jax.training.run_directory` describes; and a run read back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.devices import Layout, hold_of, in_force, mesh_or_none
from mgrad_jax.errors import Interrupted, ProcessLost, UserError
from mgrad_jax.models import Recommender
from mgrad_jax.processes import check_same, lost, several, together
from mgrad_jax.signals import held_back
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.directories import held
from mgrad_jax.training.engine import first_state
from mgrad_jax.training.epoch import split_model
from mgrad_jax.training.fit import EpochReport, TrainingDiverged, fit, layout_of, restore_best
from mgrad_jax.training.identity import differences, identity, is_digest_of, run_settings
from mgrad_jax.training.kept import KeptParams
from mgrad_jax.training.numerics import as_configured
from mgrad_jax.training.record import versions
from mgrad_jax.training.run_directory import RunDirectory, is_begun, latest_epoch, read_settings
from mgrad_jax.training.start import start_from


class RunInterrupted(Interrupted):
    """The user stopped a run; `epoch` is the last one on disk (0 where there is none), `directory` the run's."""

    def __init__(self, directory: Path, epoch: int) -> None:
        done = f"stopped after epoch {epoch}" if epoch else "stopped before the first epoch was finished"
        super().__init__(directory, done)
        self.epoch = epoch


class LoadedRun(NamedTuple):
    """A run read back.

    Attributes:
        config, data: the run, and what it was trained on.
        model: with the parameters of its best epoch.
        epoch: which one that is.
        layout: how the model is split over several devices; None on one.
    """

    config: RunConfig
    data: Interactions
    model: Recommender
    epoch: int
    layout: Layout | None = None

    @property
    def kept(self) -> KeptParams:
        """The parameters that the run kept of some of its epochs."""
        settings = run_settings(self.config, self.data)
        return KeptParams(self.config.directory, self.config.keep_every, identity(settings))

    def vectors(self) -> tuple[jax.Array, jax.Array]:
        """Users (n_users, dim) and items (n_items, dim), whose products are the scores, at the run's precision.

        Over several devices their columns may stand in another order, those of both alike.
        """
        hold = hold_of(self.layout)
        with as_configured(self.config), in_force(self.layout):
            vectors: tuple[jax.Array, jax.Array] = jax.jit(lambda model: hold(model).embed())(self.model)
            return vectors


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
    with _ends_told(config.directory):
        check_same(
            lambda: {**config.values, "resume": resume, "devices": devices, **versions(), "out": None, "data": None}
        )
        over = mesh_or_none(devices, by_itself=not several())
        with held(config.directory, "run", is_begun, resume) as check:
            data = together(lambda: load_interactions(config.data))
            files = together(lambda: RunDirectory(config, data, check, 1 if over is None else over.size))
            check_same(lambda: {"data with the digest": files.settings["data_digest"]})
            return files.take_up() or _train(config, data, files, over, progress)


@contextlib.contextmanager
def _ends_told(directory: Path) -> Iterator[None]:
    """Tell a run that is stopped, and one that another process has left, with the epoch that is on disk."""
    try:
        yield
    except KeyboardInterrupt:
        raise RunInterrupted(directory, latest_epoch(directory) or 0) from None
    except (jax.errors.JaxRuntimeError, ProcessLost) as error:
        if not several() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        epoch = latest_epoch(directory)
        kept = f"epoch {epoch} is on disk" if epoch else "no epoch is on disk"
        again = "start all processes again" + (" with --resume" if epoch else "")
        raise ProcessLost(f"{directory}: {lost(error)}; {kept}, {again}.") from error


def _train(
    config: RunConfig,
    data: Interactions,
    files: RunDirectory,
    over: Mesh | None,
    progress: Callable[[EpochReport], None] | None,
) -> dict[str, Any]:
    """Bring a run to its end from wherever it stands; whatever ends it, the checkpoints are complete afterwards."""
    model, tx = config.create_model(data, mesh=over), config.transformation(data)
    if files.needs_start():
        start = str(config.start_from)
        start_from(model, load_run(start, config.data, over).model, start)

    def on_epoch(report: EpochReport) -> None:
        files.add(report)
        if progress is not None:
            progress(report)

    with held_back(deliver=False):
        files.begin(jax.eval_shape(lambda: first_state(split_model(model), tx)))
        keep: dict[str, Any] = {"checkpoints": files.checkpoints, "kept": files.kept, "resume": True}
        try:
            outcome = as_configured(config)(fit)(model, data, tx, config, **keep, on_epoch=on_epoch, mesh=over)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{config.summary}: {error}{config.suspicion}") from None
        finally:
            files.checkpoints.close()
        return files.conclude(outcome)


def load_run(directory: str | Path, data: str | None = None, mesh: Mesh | None = None) -> LoadedRun:
    """Read a run back with its best parameters; it may be under way.

    Args:
        directory: of the run.
        data: where its data lie now, if not where the run found them.
        mesh: of several devices, from `mgrad_jax.devices.mesh`, over which the model is split; by default it is on one,
            on however many it was trained. What is computed with it then stands under `in_force(loaded.layout)`
            (`mgrad_jax.devices`). Where the devices are those of several processes, all of these make this call.

    Raises:
        UserError: no run there, its checkpoint is damaged or another run's, the data have changed since, or the model
            cannot be split over so many devices.
    """
    config, interactions, checkpoints = together(lambda: _read_back(Path(directory), data))
    model = config.create_model(interactions, training=False, mesh=mesh)
    if (layout := layout_of(model, mesh)) is not None:
        nnx.update(model, layout.place(nnx.state(model)))
    epoch = restore_best(model, config.transformation(interactions), checkpoints, config, layout)
    return LoadedRun(config, interactions, model, epoch, layout)


def _read_back(directory: Path, data: str | None) -> tuple[RunConfig, Interactions, Checkpoints]:
    """What there is of a run but its parameters, checked."""
    settings = read_settings(directory)
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
