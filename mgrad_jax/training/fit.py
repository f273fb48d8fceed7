"""Train a model to its best validation epoch: epochs, evaluation, early stopping, checkpoints."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.metrics import METRICS
from mgrad_jax.evaluation.ranking import EvalSplit, full_sort_metrics, make_eval_split
from mgrad_jax.iterates import evaluation_params
from mgrad_jax.mirror import check_loop, pass_schedule
from mgrad_jax.models import Recommender
from mgrad_jax.signals import held_back, let_through
from mgrad_jax.training.checkpoint import CheckpointLost, Checkpoints
from mgrad_jax.training.decay import with_decay
from mgrad_jax.training.diagnosis import Diagnosis
from mgrad_jax.training.epoch import (
    EpochLog,
    EpochPlan,
    SplitModel,
    TrainingData,
    TrainState,
    run_epoch,
    split_model,
    training_data,
)
from mgrad_jax.training.kept import KeptParams


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


@dataclass
class Progress:
    """Early stopping: a strictly greater value of the metric is an improvement.

    Attributes:
        epoch, best_epoch, bad_epochs: epochs so far, the best of them, and epochs since without improvement.
        best_value: the selection metric at the best epoch.
        valid, test: all metrics at the best epoch.
    """

    epoch: int = 0
    best_epoch: int = 0
    bad_epochs: int = 0
    best_value: float = -1.0
    valid: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)

    def update(self, metric: str, valid: dict[str, float], test: dict[str, float]) -> bool:
        """Count one more epoch with these metrics; returns whether it is the best so far."""
        self.epoch += 1
        if valid[metric] > self.best_value:
            self.best_epoch, self.bad_epochs, self.best_value = self.epoch, 0, valid[metric]
            self.valid, self.test = valid, test
            return True
        self.bad_epochs += 1
        return False

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The same as arrays of fixed shapes, for a checkpoint; metrics in the order of their names."""
        names = sorted(self.valid)
        return {
            "counters": np.asarray([self.epoch, self.best_epoch, self.bad_epochs], np.int64),
            "best_value": np.asarray(self.best_value, np.float64),
            "valid": np.asarray([self.valid[name] for name in names], np.float64),
            "test": np.asarray([self.test[name] for name in names], np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], names: Sequence[str]) -> Progress:
        """The inverse of `to_arrays` for metrics of these names."""
        epoch, best_epoch, bad_epochs = (int(n) for n in arrays["counters"])
        return cls(
            epoch,
            best_epoch,
            bad_epochs,
            float(arrays["best_value"]),
            {name: float(x) for name, x in zip(sorted(names), arrays["valid"], strict=True)},
            {name: float(x) for name, x in zip(sorted(names), arrays["test"], strict=True)},
        )


class _Scoring(NamedTuple):
    """The variables evaluation reads."""

    params: nnx.State
    epoch_state: nnx.State


_Evaluation = tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]


class _Programs(NamedTuple):
    """The two compiled programs of a run and the seconds their compilation took."""

    train: Callable[[TrainState, jax.Array], tuple[TrainState, EpochLog]]
    evaluate: Callable[[_Scoring], _Evaluation]
    seconds: float


def fit(
    model: Recommender,
    data: Interactions,
    tx: optax.GradientTransformation,
    *,
    epochs: int = 1000,
    patience: int = 20,
    seed: int = 999,
    batch_size: int = 2048,
    metric: str = "recall@5",
    ks: Sequence[int] = (5, 10, 20, 50),
    learning_rate_decay: tuple[float, float] = (1.0, 50.0),
    evaluate: Literal["fresh", "stale"] = "fresh",
    checkpoints: Checkpoints | None = None,
    kept: KeptParams | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochReport], None] | None = None,
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
        epochs: the most epochs to run.
        patience: stop when more than this many epochs in a row bring no improvement.
        seed: of shuffling, negatives, dropout and resampling.
        batch_size: interactions a batch; the last, partial batch is kept.
        metric: what selects the best epoch, on validation only.
        ks: cut-offs of the metrics.
        learning_rate_decay: (g, s): the learning rate of epoch e, from 0, is multiplied by g ** (e / s), also inside
            opaque forms. A `tx` that brings the same decay along stays as it is.
        evaluate: "fresh" scores with the epoch's final parameters; "stale" with those before its last update, as the
            published MMGCN, GRCN, DualGNN and SLMRec do.
        checkpoints: where the latest and the best state are kept.
        kept: where the parameters of some epochs are kept, those that evaluation reads.
        resume: go on from the latest checkpoint; the numbers equal those of an unbroken run. A best checkpoint that is
            lost is trained again.
        on_epoch: called after every epoch, before its checkpoint is written; signals wait for both.

    Raises:
        UserError: an option out of range, data without validation or test interactions, a learning rate that the decay
            cannot reach.
        ValueError: an optimizer that no loop of two passes can drive (`mgrad_jax.mirror.check_loop`).
        TrainingDiverged: a loss or score became NaN or infinite.
    """
    _check_options(data, epochs, patience, batch_size, metric, ks)
    tx = with_decay(tx, learning_rate_decay, nnx.state(model, nnx.Param))
    with let_through():
        run = _start(model, data, tx, batch_size, seed, ks, evaluate)
    run.diagnosis.checkpoints = None if checkpoints is None else checkpoints.directory
    best_is_lost = False
    if resume and checkpoints is not None and checkpoints.latest_epoch() is not None:
        best_is_lost = not run.restore(checkpoints, ks)
    history: list[EpochReport] = []
    while run.progress.epoch < epochs and run.progress.bad_epochs <= patience:
        with let_through():
            report = run.epoch(metric)
        with held_back():  # an epoch that is finished is written down
            history.append(report)
            if on_epoch is not None:
                on_epoch(report)
            if kept is not None:
                kept.save(report.epoch, _scoring(run.state).params)
            if checkpoints is not None:
                checkpoints.save(report.epoch, run.checkpoint(), report.is_best)
        best_is_lost &= not report.is_best
    if best_is_lost and checkpoints is not None:
        with let_through():
            again = run.best_again(model, tx, metric)
        checkpoints.save(again.progress.epoch, again.checkpoint(), is_best=True)
        run.best = again.best
    nnx.update(model, run.best.params, run.best.epoch_state)
    progress = run.progress
    seconds = {
        "compile": run.programs.seconds,
        "train": sum(report.seconds_train for report in history),
        "evaluate": sum(report.seconds_evaluate for report in history),
    }
    return FitResult(progress.epoch, progress.best_epoch, progress.valid, progress.test, history, seconds)


@dataclass
class _Run:
    """A training run under way: its programs, its state and its best epoch so far."""

    programs: _Programs
    plan: EpochPlan
    state: TrainState
    best: _Scoring
    key: jax.Array
    diagnosis: Diagnosis
    progress: Progress = field(default_factory=Progress)

    def epoch(self, metric: str) -> EpochReport:
        """Train and evaluate one epoch; a value that is not finite ends the run before anything is overwritten."""
        number = self.progress.epoch
        started = time.perf_counter()
        key = jax.random.fold_in(self.key, number)
        self.state, log = self.programs.train(self.state._replace(stale_params=None), key)
        log = jax.device_get(log)
        trained = time.perf_counter()
        self._check_losses(log.losses)
        scoring = _scoring(self.state)
        valid, test, finite = jax.device_get(self.programs.evaluate(scoring))
        if not finite:
            raise TrainingDiverged(self._diverged("the scores", len(self.plan.schedule) - 1))
        evaluated = time.perf_counter()
        first = self.plan.first_passes
        valid, test = _floats(valid), _floats(test)
        is_best = self.progress.update(metric, valid, test)
        if is_best:
            self.best = jax.tree.map(jnp.copy, scoring)
        return EpochReport(
            epoch=self.progress.epoch,
            loss=float(log.losses[first].sum(dtype=np.float64)),
            parts={name: float(part[first].sum(dtype=np.float64)) for name, part in log.parts.items()},
            valid=valid,
            test=test,
            best_epoch=self.progress.best_epoch,
            is_best=is_best,
            seconds_train=trained - started,
            seconds_evaluate=evaluated - trained,
        )

    def checkpoint(self) -> dict[str, Any]:
        """What a later process needs to go on exactly from here."""
        return {"state": self.state, "progress": self.progress.to_arrays()}

    def restore(self, checkpoints: Checkpoints, ks: Sequence[int]) -> bool:
        """Go on from the latest checkpoint; returns whether the best one is at hand as well."""
        stale = self.state.params if self.plan.keep_stale else None
        like = _blank_checkpoint(self.state._replace(stale_params=stale), ks)
        _, latest = checkpoints.restore(like, "latest")
        self.state = latest["state"]
        self.progress = Progress.from_arrays(latest["progress"], _metric_names(ks))
        try:
            _, best = checkpoints.restore(like, "best")
        except CheckpointLost:
            warnings.warn(
                f"{checkpoints.directory}: the checkpoint of the best epoch, {self.progress.best_epoch}, is lost; training "
                "goes on, and unless a later epoch is better, that one is trained again at the end.",
                UserWarning,
                stacklevel=2,
            )
            return False
        self.best = _scoring(best["state"])
        return True

    def best_again(self, model: Recommender, tx: optax.GradientTransformation, metric: str) -> _Run:
        """The run as it was after its best epoch, trained from the beginning once more: its seed gives the same."""
        parts = split_model(model)
        state = jax.tree.map(jnp.copy, TrainState(parts.params, tx.init(parts.params), parts.epoch_state))
        again = dataclasses.replace(self, state=state, progress=Progress())
        while again.progress.epoch < self.progress.best_epoch:
            again.epoch(metric)
        return again

    def _check_losses(self, losses: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise TrainingDiverged(self._diverged("the loss", bad[0]))

    def _diverged(self, what: str, number: int) -> str:
        """What to say where a value is not finite after this pass of the epoch under way."""
        updated = what == "the scores" or number > 0 or self.progress.epoch > 0
        return (
            f"epoch {self.progress.epoch + 1}, batch {self.plan.schedule[number]}: {what} became NaN or infinite; "
            f"{self.diagnosis.cause(updated)}. {self.diagnosis.kept(self.progress.epoch, self.progress.best_epoch)}"
        )


def restore_best(
    model: Recommender,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints,
    *,
    stale: bool = False,
    ks: Sequence[int] = (5, 10, 20, 50),
) -> int:
    """Give the model the parameters of a run's best epoch, which is returned.

    Args:
        model: created as in the run.
        tx: the run's transformation, for the shape of its state.
        checkpoints: the run's.
        stale: whether the run evaluated with stale parameters.
        ks: the run's cut-offs.
    """
    parts = split_model(model)
    state = TrainState(parts.params, tx.init(parts.params), parts.epoch_state, parts.params if stale else None)
    epoch, best = checkpoints.restore(_blank_checkpoint(state, ks), "best")
    scoring = _scoring(best["state"])
    nnx.update(model, scoring.params, scoring.epoch_state)
    return epoch


def _start(
    model: Recommender,
    data: Interactions,
    tx: optax.GradientTransformation,
    batch_size: int,
    seed: int,
    ks: Sequence[int],
    evaluate: str,
) -> _Run:
    """Put model and data on the device and compile the two programs."""
    parts = split_model(model)
    # The state is donated to each epoch; without a copy the first one would take the model's own arrays with it.
    state = jax.tree.map(jnp.copy, TrainState(parts.params, tx.init(parts.params), parts.epoch_state))
    _check_optimizer(state.opt_state)
    schedule = pass_schedule(state.opt_state, -(-len(data.train) // batch_size))
    plan = EpochPlan(batch_size, tuple(int(i) for i in schedule), evaluate == "stale")
    programs = _compile(parts, tx, plan, state, data, ks)
    best = jax.tree.map(jnp.copy, _scoring(state))
    return _Run(programs, plan, state, best, jax.random.key(seed), Diagnosis.of(model, data))


def _compile(
    parts: SplitModel,
    tx: optax.GradientTransformation,
    plan: EpochPlan,
    state: TrainState,
    data: Interactions,
    ks: Sequence[int],
) -> _Programs:
    """Compile the epoch and the evaluation ahead of time, so that compilation is timed apart."""
    started = time.perf_counter()
    train = training_data(data)
    eval_splits = (make_eval_split(data, "valid", ks), make_eval_split(data, "test", ks))

    @partial(jax.jit, donate_argnums=0)
    def train_epoch(
        state: TrainState, constants: nnx.State, train: TrainingData, key: jax.Array
    ) -> tuple[TrainState, EpochLog]:
        return run_epoch(parts.graphdef, tx, plan, state, constants, train, key)

    @jax.jit
    def evaluate(scoring: _Scoring, constants: nnx.State, eval_splits: tuple[EvalSplit, EvalSplit]) -> _Evaluation:
        users, items = nnx.merge(parts.graphdef, scoring.params, scoring.epoch_state, constants).embed()
        valid, test = (full_sort_metrics(eval_split, users, items) for eval_split in eval_splits)
        return valid, test, jnp.isfinite(users.sum() + items.sum())

    trainer = train_epoch.lower(state, parts.constants, train, jax.random.key(0)).compile()
    evaluator = evaluate.lower(_scoring(state), parts.constants, eval_splits).compile()
    return _Programs(
        lambda state, key: trainer(state, parts.constants, train, key),
        lambda scoring: evaluator(scoring, parts.constants, eval_splits),
        time.perf_counter() - started,
    )


def _scoring(state: TrainState) -> _Scoring:
    """What evaluation scores with: as of the end of the epoch, or before its last update where that is kept."""
    stale = state.stale_params
    return _Scoring(evaluation_params(state.opt_state, state.params) if stale is None else stale, state.epoch_state)


def _metric_names(ks: Sequence[int]) -> list[str]:
    return [f"{name}@{k}" for name in METRICS for k in ks]


def _blank_checkpoint(state: TrainState, ks: Sequence[int]) -> dict[str, Any]:
    """The structure of `_Run.checkpoint`, for reading one."""
    metrics = dict.fromkeys(_metric_names(ks), 0.0)
    return {"state": state, "progress": Progress(valid=metrics, test=metrics).to_arrays()}


def _floats(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _check_optimizer(opt_state: Any) -> None:
    """Refuse what the loop cannot drive, or has no parameters to evaluate with."""
    check_loop(opt_state)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.LookaheadState))
    if any(isinstance(node, optax.LookaheadState) for node in nodes):
        raise UserError(
            "optax.lookahead trains a pair of parameters, and fit the model's own; leave it out, or average otherwise, "
            "as optax.contrib.schedule_free does."
        )


def _check_options(
    data: Interactions, epochs: int, patience: int, batch_size: int, metric: str, ks: Sequence[int]
) -> None:
    for name, value, least in (("epochs", epochs, 1), ("patience", patience, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}.")
    known = _metric_names(ks)
    if metric not in known:
        raise UserError(f"unknown metric '{metric}'; choose one of {', '.join(known)}.")
    for split in ("valid", "test"):
        if not len(getattr(data, split)):
            raise UserError(f"{data.source}: the {split} split is empty; early stopping and the result need it.")
