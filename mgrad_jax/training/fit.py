"""Train a model to its best validation epoch: epochs, evaluation, early stopping, checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mgrad_jax.data import Interactions
from mgrad_jax.devices import Layout
from mgrad_jax.errors import UserError
from mgrad_jax.models import Recommender
from mgrad_jax.processes import any_of, by_first, several, together
from mgrad_jax.signals import held_back, is_waiting, let_through
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.checkpoint_directory import CheckpointLost
from mgrad_jax.training.decay import with_decay
from mgrad_jax.training.diagnosis import Diagnosis
from mgrad_jax.training.early_stopping import EarlyStopping
from mgrad_jax.training.engine import Engine, Lanes, Own, Scoring, check_splits, first_state, scoring
from mgrad_jax.training.epoch import TrainState, split_model
from mgrad_jax.training.kept import KeptParams
from mgrad_jax.training.settings import FitSettings


class TrainingDiverged(UserError):
    """The loss or the scores became NaN or infinite; the message says when, why, and which checkpoints there are."""


class EpochReport(NamedTuple):
    """One epoch in numbers.

    Attributes:
        epoch: counts from 1.
        loss: sum over the epoch's batches of the first pass's loss (published rule).
        parts: the same for each part of the loss.
        valid, test: metrics, e.g. `{"recall@5": 0.03}`.
        best_epoch: the best epoch so far by the selection metric on validation.
        is_best: whether this one is it.
        seconds_train, seconds_evaluate: wall-clock time.
    """

    epoch: int
    loss: float
    parts: dict[str, float]
    valid: dict[str, float]
    test: dict[str, float]
    best_epoch: int
    is_best: bool
    seconds_train: float
    seconds_evaluate: float


@dataclass
class FitResult:
    """What came of a training run; the model holds the best epoch's parameters.

    Attributes:
        epochs_run: epochs trained, those before a resume included.
        best_epoch: the epoch with the best selection metric on validation; `valid` and `test` are its metrics.
        history: reports of the epochs run in this process.
        seconds: "compile", "train" and "evaluate", in this process.
    """

    epochs_run: int
    best_epoch: int
    valid: dict[str, float]
    test: dict[str, float]
    history: list[EpochReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def fit(
    model: Recommender,
    data: Interactions,
    tx: optax.GradientTransformation,
    settings: FitSettings | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    kept: KeptParams | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochReport], None] | None = None,
    mesh: Mesh | None = None,
    **named: Any,
) -> FitResult:
    """Train `model` on `data` with the Optax chain `tx` until validation stops improving.

    The interval of `mirror_gradient` starts anew with every epoch, as published. On return the model holds the
    parameters of the best validation epoch.

    Args:
        model: from `mgrad_jax.models.create`.
        data: from `mgrad_jax.data.load_interactions`; the dataset the model was created with.
        tx: e.g. `optax.chain(mirror_gradient(), optax.adam(1e-3))`; opaque forms and line searches work too. Where an
            optimizer means other parameters than the trained ones for evaluation (`mgrad_jax.evaluation_params`), those
            are evaluated and kept.
        settings: what else is asked for, such as a `RunConfig`; by default a `FitSettings`, which tells of each.
        checkpoints: where the latest and the best state are kept; both are complete on return.
        kept: where the parameters of some epochs are kept, those that evaluation reads.
        resume: go on from the latest checkpoint; the numbers equal those of an unbroken run. A best checkpoint that is
            lost is trained again.
        on_epoch: called after every epoch, before its checkpoint is written; signals wait for both.
        mesh: of several devices, from `mgrad_jax.devices.mesh`; the run is the same but for the order of sums, that is
            for last digits. The model then holds arrays that are split over them. Where the devices are those of
            several processes (`mgrad_jax.processes`), all of them make this call.
        **named: settings by name, in place of those in `settings`, such as `epochs=3`. A learning rate decay also
            reaches into opaque forms; a `tx` that brings the same decay along stays as it is.

    Raises:
        UserError: an option out of range, data without validation or test interactions, a learning rate that the decay
            cannot reach.
        ValueError: an optimizer that no loop of two passes can drive (`mgrad_jax.mirror.check_loop`).
        TrainingDiverged: a loss or score became NaN or infinite.
    """
    settings = settings or FitSettings()
    settings = dataclasses.replace(settings, **named) if named else settings
    check_splits(data)
    tx = with_decay(tx, settings.learning_rate_decay, nnx.state(model, nnx.Param))
    with _interruptible():
        run = _start(model, data, tx, settings, layout_of(model, mesh))
    run.diagnosis.checkpoints = None if checkpoints is None else checkpoints.directory
    best_is_lost = False
    if resume and checkpoints is not None and by_first(checkpoints.latest_epoch) is not None:
        best_is_lost = not run.restore(checkpoints)
    history: list[EpochReport] = []
    while not run.is_over:
        with _interruptible():
            report = run.epoch()
        with held_back():  # an epoch that is finished is written down
            history.append(report)
            if on_epoch is not None:
                together(functools.partial(on_epoch, report))
            if kept is not None:
                kept.save(report.epoch, scoring(run.lanes.state).params)
            if checkpoints is not None:
                checkpoints.save(report.epoch, run.checkpoint(), report.is_best)
        best_is_lost &= not report.is_best
        if several() and any_of(is_waiting()) and not run.is_over:
            raise KeyboardInterrupt
    if best_is_lost and checkpoints is not None:
        with _interruptible():
            again = run.best_again(model, tx)
        checkpoints.save(again.progress.epoch, again.checkpoint(), is_best=True)
        run.best = again.best
    if checkpoints is not None:
        checkpoints.wait()  # whoever resumes next finds the last one
    nnx.update(model, *run.best)
    progress = run.progress
    seconds = {
        "compile": run.seconds,
        "train": sum(report.seconds_train for report in history),
        "evaluate": sum(report.seconds_evaluate for report in history),
    }
    return FitResult(progress.epoch, progress.best_epoch, progress.valid, progress.test, history, seconds)


def _interruptible() -> AbstractContextManager[None]:
    """Signals take effect at any time; those to one of several processes after the epoch, in all of them."""
    return nullcontext() if several() else let_through()


@dataclass
class _Run:
    """A training run under way: its settings, what it begins with here, and how far it is.

    Attributes:
        engine, lane: its programs, and the state that they begin with; neither is needed where no epoch is left.
        best: what to evaluate with as of the best epoch so far.
        seconds: of compiling, in this process.
    """

    settings: FitSettings
    engine: Engine
    lane: tuple[TrainState, Own]
    best: Scoring
    diagnosis: Diagnosis
    progress: EarlyStopping = field(default_factory=EarlyStopping)
    seconds: float = 0.0

    @functools.cached_property
    def lanes(self) -> Lanes:
        """Its one lane, under programs that are compiled here."""
        programs = self.engine.compile(self.lane, 1)
        self.seconds = programs.seconds
        return Lanes(self.engine, [self.lane], programs)

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left."""
        return self.progress.is_over(self.settings.epochs, self.settings.patience)

    def epoch(self) -> EpochReport:
        """Train and evaluate one epoch; a value that is not finite ends the run before anything is overwritten."""
        lanes = self.lanes
        started = time.perf_counter()
        (log,) = lanes.train([self.progress.epoch])
        trained = time.perf_counter()
        if len(bad := np.flatnonzero(~np.isfinite(log.losses))):
            raise TrainingDiverged(self._diverged("the loss", bad[0]))
        (scores,) = lanes.evaluate()
        if not scores.finite:
            raise TrainingDiverged(self._diverged("the scores", -1))
        evaluated = time.perf_counter()
        is_best = self.progress.update(self.settings.metric, scores.valid, scores.test)
        if is_best:
            self.best = jax.tree.map(jnp.copy, scoring(lanes.state))
        loss = self.engine.plan.epoch_loss
        return EpochReport(
            epoch=self.progress.epoch,
            loss=loss(log.losses),
            parts={name: loss(part) for name, part in log.parts.items()},
            valid=scores.valid,
            test=scores.test,
            best_epoch=self.progress.best_epoch,
            is_best=is_best,
            seconds_train=trained - started,
            seconds_evaluate=evaluated - trained,
        )

    def checkpoint(self) -> dict[str, Any]:
        """What a later process needs to go on exactly from here."""
        return {"state": self.lanes.state, "progress": self.progress.to_arrays()}

    def restore(self, checkpoints: Checkpoints) -> bool:
        """Go on from the latest checkpoint; returns whether the best one is at hand as well."""
        state, own = self.lane
        like = _blank_checkpoint(state, self.settings)
        if self.engine.plan.layout is not None and not several():  # no whole table on one of the devices
            like = _on_host(like)
        _, latest = checkpoints.restore(like, "latest")
        self.lane = self.engine.placed(latest["state"]._replace(stale_params=None)), own
        self.progress = EarlyStopping.from_arrays(latest["progress"], self.settings.metric_names)
        try:
            _, best = checkpoints.restore(like, "best")
        except CheckpointLost:
            warnings.warn(
                f"{checkpoints.directory}: the checkpoint of the best epoch, {self.progress.best_epoch}, is lost; "
                "training goes on, and unless a later epoch is better, that one is trained again at the end.",
                UserWarning,
                stacklevel=2,
            )
            return False
        self.best = self.engine.placed(scoring(best["state"]))
        return True

    def best_again(self, model: Recommender, tx: optax.GradientTransformation) -> _Run:
        """The run as it was after its best epoch, trained from the beginning once more: its seed gives the same."""
        lane = self.engine.placed(first_state(split_model(model), tx)), self.lane[1]
        again = dataclasses.replace(self, lane=lane, progress=EarlyStopping())
        again.lanes = Lanes(self.engine, [lane], self.lanes.programs)
        while again.progress.epoch < self.progress.best_epoch:
            again.epoch()
        return again

    def _diverged(self, what: str, number: int) -> str:
        """What to say where a value is not finite after this pass of the epoch under way."""
        updated = number != 0 or self.progress.epoch > 0
        return (
            f"epoch {self.progress.epoch + 1}, batch {self.engine.plan.schedule[number]}: {what} became NaN or "
            f"infinite; {self.diagnosis.cause(updated)}. "
            f"{self.diagnosis.kept(self.progress.epoch, self.progress.best_epoch)}"
        )


def layout_of(model: Recommender, mesh: Mesh | None) -> Layout | None:
    """How a model is split over a mesh; None where there is none, or one device.

    Raises:
        UserError: it cannot be split over so many devices.
    """
    if mesh is None or mesh.size == 1:
        return None
    rows = model.n_users, model.n_items, model.n_users + model.n_items
    tables = nnx.state(model)
    layout = Layout.of(mesh, rows, tables, model.tables_in_pass)
    if whole := layout.whole_tables(tables):
        warnings.warn(
            f"tables of width {', '.join(map(str, whole))} are kept whole on each of {mesh.size} devices, whose number "
            "does not divide that.",
            UserWarning,
            stacklevel=3,
        )
    return layout


def restore_best(
    model: Recommender,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints,
    settings: FitSettings,
    layout: Layout | None = None,
) -> int:
    """Give the model the parameters of a run's best epoch, which is returned.

    Of a checkpoint only these come to the devices, each part to its own. All arguments are the run's; `layout` says how
    the model is split over several devices.
    """
    parts = split_model(model)
    like = _blank_checkpoint(jax.eval_shape(lambda: first_state(parts, tx)), settings)
    epoch, best = together(lambda: checkpoints.restore(_on_host(like), "best"))
    found = scoring(best["state"])
    nnx.update(model, *(jax.tree.map(jnp.asarray, found) if layout is None else layout.place(found)))
    return epoch


def _on_host(like: Any) -> Any:
    """The structure of a checkpoint as arrays of the host, which are not as large as they look."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), like)


def _start(
    model: Recommender,
    data: Interactions,
    tx: optax.GradientTransformation,
    settings: FitSettings,
    layout: Layout | None,
) -> _Run:
    """Put model and data on the devices."""
    parts = split_model(model)
    state = first_state(parts, tx)
    engine = Engine(parts, state, data, lambda _: tx, settings, layout=layout)
    state = engine.placed(state)
    lane = state, engine.own(parts, settings.seed, {})
    return _Run(settings, engine, lane, jax.tree.map(jnp.copy, scoring(state)), Diagnosis.of(model, data))


def _blank_checkpoint(state: TrainState, settings: FitSettings) -> dict[str, Any]:
    """The structure of `_Run.checkpoint`, for reading one."""
    metrics = dict.fromkeys(settings.metric_names, 0.0)
    state = state._replace(stale_params=state.params if settings.evaluate == "stale" else None)
    return {"state": state, "progress": EarlyStopping(valid=metrics, test=metrics).to_arrays()}
