"""What is measured of which models for `theory`: models trained here for a few epochs, or finished runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mgrad_jax import models
from mgrad_jax.analysis import theory
from mgrad_jax.analysis.inputs import InputNumbers, measure_inputs, open_inputs, worst_case_metrics
from mgrad_jax.analysis.landscape import Fixed, ModelLoss, objective, parameters, sample_batch
from mgrad_jax.analysis.settings import TheorySettings
from mgrad_jax.ascent import check_own_ascent
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.evaluation.ranking import make_eval_split
from mgrad_jax.mirror import pass_schedule
from mgrad_jax.models import Recommender, Variables
from mgrad_jax.models.adversarial import adversarial
from mgrad_jax.optimizers import make_optimizer
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.epoch import EpochPlan, TrainState, run_epoch, split_model, training_data
from mgrad_jax.training.numerics import as_configured
from mgrad_jax.training.run import load_run

# Along a run at most so many of its kept epochs are measured.
MOST_PLACES = 12
_Evaluate: TypeAlias = Callable[[Variables, Fixed], tuple[jax.Array, Variables]]
WORST_CASE = (0.0, 0.01, 0.05, 0.1)


class Place(NamedTuple):
    """A model somewhere along its training, after an epoch; `best` at the run's best, or the last that was trained."""

    epoch: int
    model: Recommender
    best: bool


@dataclass(frozen=True)
class Subject:
    """One model to measure.

    Attributes:
        name: the model's.
        method: how it was trained, as `group_runs` names it.
        config: its configuration.
        data: its dataset.
        places: its parameters along the training; the best comes last.
    """

    name: str
    method: str
    config: RunConfig
    data: Interactions
    places: Callable[[], Iterator[Place]]


class Weight(NamedTuple):
    """The weight of the penalty beside the loss of a batch, after an epoch: with P = 1, and with Adam's."""

    epoch: int
    loss: float
    gradient_descent: float | None
    adam: float | None


class Step(NamedTuple):
    """The half-steps of an optimizer: who takes the second, and whether its state is zero or running."""

    optimizer: str
    second: str
    state: str
    steps: theory.HalfSteps


@dataclass(frozen=True)
class Findings:
    """What the theorem's numbers are for one subject."""

    subject: Subject
    learning_rate: float
    residual: theory.Residual
    weights: list[Weight]
    steps: list[Step]


@dataclass(frozen=True)
class InputFindings:
    """A subject's inputs along its training, and the metrics under worst-case changes of them (none if not scored).

    Attributes:
        trained: whether the inputs are tables that were trained themselves.
        places: (epoch, numbers), the best last.
        worst: the metrics at each of `WORST_CASE`.
    """

    subject: Subject
    trained: bool
    places: list[tuple[int, InputNumbers]]
    worst: list[dict[str, float]]


def fresh_subject(config: RunConfig, epochs: int) -> Subject:
    """A model trained here, in memory, as its configuration says."""
    data = load_interactions(config.data)
    model = config.create_model(data)
    return Subject(config.model, config.training, config, data, partial(_train, config, data, model, epochs))


def run_subjects(
    groups: Mapping[str, Mapping[str, Mapping[int, Path]]], data: str | None = None
) -> Iterator[tuple[Path, Subject]]:
    """Finished runs, from `mgrad_jax.analysis.runs.group_runs`, each read where it is needed."""
    for name, trainings in groups.items():
        for method, by_seed in trainings.items():
            for directory in by_seed.values():
                run = load_run(directory, data)
                places = partial(_along, run)
                yield directory, Subject(name, method, run.config, run.data, places)


def _along(run: Any) -> Iterator[Place]:
    """The kept epochs of a run, spread evenly where there are many, and the best one."""
    kept = run.kept.epochs()
    step = -(-len(kept) // MOST_PLACES) if kept else 1
    for epoch in kept[::-1][::step][::-1]:
        model = nnx.clone(run.model)
        run.kept.load(epoch, model)
        yield Place(epoch, model, best=False)
    yield Place(run.epoch, run.model, best=True)


def _train(config: RunConfig, data: Interactions, model: Recommender, epochs: int) -> Iterator[Place]:
    """A model before training and after each of some epochs, as `fit` trains it."""
    parts, tx = split_model(model), config.transformation(data)
    state = TrainState(parts.params, tx.init(parts.params), parts.epoch_state)
    schedule = pass_schedule(state.opt_state, -(-len(data.train) // config.batch_size))
    plan = EpochPlan(config.batch_size, tuple(int(i) for i in schedule))
    train = training_data(data)

    @jax.jit
    def one(state: TrainState, key: jax.Array) -> TrainState:
        return run_epoch(parts.graphdef, tx, plan, state, parts.constants, train, key)[0]

    yield Place(0, model, best=epochs == 0)
    for epoch in range(epochs):
        with as_configured(config):
            state = one(state, jax.random.fold_in(jax.random.key(config.seed), epoch))
        copy = nnx.clone(model)
        nnx.update(copy, state.params, state.epoch_state)
        yield Place(epoch + 1, copy, best=epoch == epochs - 1)


def examine(subject: Subject, settings: TheorySettings) -> Findings:
    """The theorem's numbers: the penalty's weight at every place, residual and half-steps at the best.

    Raises:
        UserError: a run or its data that cannot be read.
    """
    config, data = subject.config, subject.data
    eta = config.learning_rate if settings.learning_rate is None else settings.learning_rate
    size = config.batch_size if settings.batch_size is None else settings.batch_size
    weights: list[Weight] = []
    with as_configured(config):
        evaluate = None
        for place in subject.places():
            loss, fixed = objective(place.model, data, size, jax.random.key(settings.seed))
            evaluate = evaluate or jax.jit(jax.value_and_grad(loss))
            params, batches = parameters(place.model), _batches(place.model, data, size, fixed, settings)
            weights.append(_weight(place.epoch, evaluate, params, batches, eta, settings))
        assert evaluate is not None
        residual = _residual(loss, fixed, params, config, data, settings)
        steps = _half_steps(evaluate, params, batches, eta, settings)
    return Findings(subject, eta, residual, weights, steps)


def _batches(model: Recommender, data: Interactions, size: int, fixed: Fixed, settings: TheorySettings) -> list[Fixed]:
    """What the loss reads for some batches to warm up with, and for the measured one, which comes last."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), 1), settings.warm_up)
    drawn = [sample_batch(data, size, key, negatives=model.uses_negatives) for key in keys]
    return [*(fixed._replace(batch=batch) for batch in drawn), fixed]


def _weight(
    epoch: int, evaluate: _Evaluate, params: Variables, batches: Sequence[Fixed], eta: float, settings: TheorySettings
) -> Weight:
    loss, g = evaluate(params, batches[-1])
    v = theory.second_moment(evaluate(params, batch)[1] for batch in batches)
    scales = jax.tree.map(jnp.ones_like, g), jax.tree.map(lambda x: 1 / (jnp.sqrt(x) + 1e-8), v)
    found = (theory.penalty_weight(loss, g, p, eta, settings.alpha1, settings.alpha2) for p in scales)
    return Weight(epoch, float(loss), *found)


def _residual(
    loss: ModelLoss,
    fixed: Fixed,
    params: Variables,
    config: RunConfig,
    data: Interactions,
    settings: TheorySettings,
) -> theory.Residual:
    """In float64, which holds for what is computed in here and nowhere else."""
    narrow = nnx.merge(loss.graphdef, params, fixed.epoch_state, fixed.constants)
    with jax.enable_x64(True):
        parts = split_model(_in_float64(narrow, config, data))
        gradient = jax.jit(jax.grad(ModelLoss(loss.name, parts.graphdef)))
        wide = Fixed(parts.epoch_state, parts.constants, fixed.batch, fixed.key)
        return theory.theorem_residual(lambda p: gradient(p, wide), parts.params, settings.alpha1, settings.alpha2)


def _in_float64(model: Recommender, config: RunConfig, data: Interactions) -> Recommender:
    """The same model in float64; to be called under `jax.enable_x64(True)`."""
    twin = models.create(config.model, data, seed=config.seed, dtype=jnp.float64, **config.hyper_parameters)
    if config.adversarial is not None:
        twin = adversarial(twin, **config.adversarial)
    nnx.update(twin, jax.tree.map(lambda new, old: jnp.asarray(old, new.dtype), nnx.state(twin), nnx.state(model)))
    return twin


def _half_steps(
    evaluate: _Evaluate, params: Variables, batches: Sequence[Fixed], eta: float, settings: TheorySettings
) -> list[Step]:
    """Of every optimizer, with the second half-step its own or the ascent, from zero and from running state."""
    *earlier, last = batches
    alphas = settings.alpha1, settings.alpha2

    def of_batch(params: Variables, batch: Fixed) -> Variables:
        return evaluate(params, batch)[1]

    def gradient(params: Variables) -> Variables:
        return of_batch(params, last)

    found = []
    for name in settings.optimizers:
        optimizer = _compiled(make_optimizer(name, eta))
        for second in ("own", "ascent") if _has_ascent(optimizer, params) else ("own",):
            ascent = second == "ascent"
            zero = theory.half_steps(optimizer, gradient, params, optimizer.init(params), *alphas, ascent=ascent)
            found.append(Step(name, second, "zero", zero))
            there, state = theory.warmed_up(optimizer, of_batch, params, earlier, *alphas, ascent=ascent)
            running = theory.half_steps(optimizer, gradient, there, state, *alphas, ascent=ascent)
            found.append(Step(name, second, "running", running))
    return found


def _compiled(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    update = jax.jit(optimizer.update)
    return optax.GradientTransformation(optimizer.init, lambda g, state, params=None: update(g, state, params))


def _has_ascent(optimizer: optax.GradientTransformation, params: Variables) -> bool:
    """Whether an optimizer has an ascent of its own that is not just what it does anyway."""
    try:
        check_own_ascent(optimizer, params)
    except ValueError:
        return False
    return any(leaf.ndim > 0 for leaf in jax.tree.leaves(optimizer.init(params)))


def examine_inputs(subject: Subject, settings: TheorySettings, metrics: Sequence[str]) -> InputFindings:
    """A model's inputs at every place, and its test metrics under worst-case changes at the best.

    Raises:
        UserError: a model that reads no features.
    """
    places: list[tuple[int, InputNumbers]] = []
    worst: list[dict[str, float]] = []
    trained = False
    with as_configured(subject.config):
        for place in subject.places():
            loss, fixed = objective(place.model, subject.data, settings.pairs, jax.random.key(settings.seed))
            drawn = nnx.merge(loss.graphdef, parameters(place.model), fixed.epoch_state, fixed.constants)
            model, tables = open_inputs(drawn)
            examples = settings.examples if place.best else 0
            places.append((place.epoch, measure_inputs(model, tables, fixed.batch, fixed.key, examples)))
            paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
            trained = not paths.isdisjoint(tables)
            if place.best and model.features_in_scores:
                ks = sorted({int(name.partition("@")[2]) for name in metrics})
                eval_split = make_eval_split(subject.data, "test", ks)
                worst = worst_case_metrics(model, tables, fixed.batch, fixed.key, WORST_CASE, eval_split)
    return InputFindings(subject, trained, places, [{name: row[name] for name in metrics} for row in worst])
