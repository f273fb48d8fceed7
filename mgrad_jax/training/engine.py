"""The compiled programs of training, an epoch and its evaluation, for one lane or for several side by side.

A lane is one training: its state, and what is its own besides. `fit` is one lane with checkpoints, a sweep sends its
members through several. Lanes run under one `jax.vmap`; one lane alone has no leading axis and passes through none.
Lanes may be spread over several devices, or one lane be split over them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mgrad_jax.data import Interactions
from mgrad_jax.devices import BLOCKS, WHOLE, Layout, hold_of, in_force
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import EvalSplit, full_sort_metrics, make_eval_split, split_over_devices
from mgrad_jax.iterates import evaluation_params
from mgrad_jax.mirror import check_loop, pass_schedule
from mgrad_jax.models import Variables
from mgrad_jax.training.epoch import EpochLog, EpochPlan, SplitModel, TrainingData, TrainState, run_epoch, training_data
from mgrad_jax.training.settings import FitSettings
from mgrad_jax.training.side_by_side import by_device, put, spread, stack, take

_Tree = TypeVar("_Tree")


class Own(NamedTuple):
    """What a lane keeps through its training: constants no other lane has, its traced numbers, its random key."""

    constants: list[jax.Array]
    numbers: Mapping[str, jax.Array]
    key: jax.Array


class Inputs(NamedTuple):
    """What an epoch and its two evaluations read of a dataset, where they read it; or its shapes."""

    train: TrainingData
    eval_splits: list[EvalSplit]


class Scoring(NamedTuple):
    """The variables evaluation reads."""

    params: Variables
    epoch_state: Variables


class Scores(NamedTuple):
    """Metrics on validation and on test, and whether the scores are finite.

    Where a lane evaluates test only for what improves on its best, it has zeros there otherwise.
    """

    valid: dict[str, Any]
    test: dict[str, Any]
    finite: Any


class Programs(NamedTuple):
    """Both compiled for `width` lanes, the seconds that took, and the bytes that the larger one needs on a device."""

    train: Callable[[TrainState, Own, jax.Array], tuple[TrainState, EpochLog]]
    evaluate: Callable[[Scoring, Own, Any], Scores]
    seconds: float
    size: int
    width: int


def check_splits(data: Interactions) -> None:
    """Raise a `UserError` where data have nothing to select the best epoch by, or to report."""
    for split in ("valid", "test"):
        if not len(getattr(data, split)):
            raise UserError(f"{data.source}: the {split} split is empty; early stopping and the result need it.")


def inputs_of(data: Interactions, ks: Sequence[int], layout: Layout | None) -> Inputs:
    """A dataset put on the device, or split over several."""
    train, eval_splits = training_data(data), [make_eval_split(data, split, ks) for split in ("valid", "test")]
    if layout is None:
        return Inputs(train, eval_splits)
    return Inputs(layout.place(train), [split_over_devices(split, layout.mesh) for split in eval_splits])


def first_state(parts: SplitModel, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first epoch.

    A copy: it is donated to each epoch, and must take neither the model's own arrays nor the constants' with it.
    """
    state: TrainState = jax.tree.map(jnp.copy, TrainState(parts.params, tx.init(parts.params), parts.epoch_state))
    return state


def scoring(state: TrainState) -> Scoring:
    """What evaluation scores with: as of the end of the epoch, or before its last update where that is kept."""
    stale = state.stale_params
    return Scoring(evaluation_params(state.opt_state, state.params) if stale is None else stale, state.epoch_state)


class Engine:
    """What the lanes of one structure share, and their programs.

    Args:
        parts: the model of any lane.
        state: its state before the first epoch.
        data: the interactions, or what `inputs_of` makes of them.
        make_tx: a lane's transformation, of its traced numbers.
        settings: what the lanes have in common.
        is_own: which of the model's constants differ between lanes; by default none.
        select_by: the metric by whose improvement on validation test is evaluated; None: it always is.
        layout: how the arrays of its one lane are split over several devices; None on one.
        mesh: over whose devices several lanes are spread, without a layout; None on one.

    Raises:
        ValueError, UserError: an optimizer that the loop cannot drive.
    """

    def __init__(
        self,
        parts: SplitModel,
        state: TrainState,
        data: Interactions | Inputs,
        make_tx: Callable[[Mapping[str, jax.Array]], optax.GradientTransformation],
        settings: FitSettings,
        *,
        is_own: Sequence[bool] | None = None,
        select_by: str | None = None,
        layout: Layout | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        _check_optimizer(state.opt_state)
        inputs = inputs_of(data, settings.ks, layout) if isinstance(data, Interactions) else data
        self._train_data, self._eval_splits = inputs
        schedule = pass_schedule(state.opt_state, -(-inputs.train.users.shape[0] // settings.batch_size))
        self.plan = EpochPlan(
            settings.batch_size, tuple(int(i) for i in schedule), settings.evaluate == "stale", layout
        )
        self._make_tx, self._select_by, self.mesh = make_tx, select_by, mesh
        self._graphdef = parts.graphdef
        constants, self._structure = jax.tree.flatten(parts.constants)
        self._is_own = [False] * len(constants) if is_own is None else is_own
        self._shared = [None if own else x for own, x in zip(self._is_own, constants, strict=True)]
        if layout is not None:
            self._shared = layout.place(self._shared)
        if mesh is not None:
            shared = self._shared, self._train_data, self._eval_splits
            self._shared, self._train_data, self._eval_splits = jax.device_put(shared, NamedSharding(mesh, WHOLE))

    @property
    def n_devices(self) -> int:
        """Over how many devices lanes are spread."""
        return 1 if self.mesh is None else self.mesh.size

    def placed(self, tree: _Tree) -> _Tree:
        """A lane's arrays, where they belong."""
        return tree if self.plan.layout is None else self.plan.layout.place(tree)

    def own(self, parts: SplitModel, seed: int, numbers: Mapping[str, jax.Array]) -> Own:
        """What a lane with this model, seed and numbers keeps."""
        constants = [x for own, x in zip(self._is_own, jax.tree.leaves(parts.constants), strict=True) if own]
        return self.placed(Own(constants, numbers, jax.random.key(seed)))

    def compile(self, lane: tuple[TrainState, Own], width: int) -> Programs:
        """Compile both programs ahead of time, so that compilation is timed apart; arguments as for `lower`."""
        started = time.perf_counter()
        shared, data, eval_splits = self._shared, self._train_data, self._eval_splits
        trainer, evaluator = (lowered.compile() for lowered in self.lower(lane, width))
        return Programs(
            lambda state, own, key: trainer(state, own, key, shared, data),
            lambda scoring, own, best: evaluator(scoring, own, best, shared, eval_splits),
            time.perf_counter() - started,
            max(_bytes(trainer), _bytes(evaluator)),
            width,
        )

    def lower(self, lane: tuple[TrainState, Own], width: int) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Both programs, not compiled yet: of an epoch, and of its evaluation.

        Args:
            lane: state and own of any, or their shapes.
            width: how many lanes there are, on several devices equally many on each.
        """
        goal = None if self._select_by is None else jax.ShapeDtypeStruct((), jnp.zeros((), float).dtype)
        arguments = (*lane, lane[1].key, goal)
        if width > 1:
            place = None if self.mesh is None else NamedSharding(self.mesh, BLOCKS)
            arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((width, *x.shape), x.dtype, sharding=place), arguments
            )
        state, own, key, best = arguments
        each = width // self.n_devices
        shared, data, eval_splits = self._shared, self._train_data, self._eval_splits

        def train(state: TrainState, own: Own, key: jax.Array, shared: Any, data: Any) -> tuple[TrainState, EpochLog]:
            if each == 1:
                return self._train(state, own, key, shared, data)
            return jax.vmap(lambda s, o, k: self._train(s, o, k, shared, data))(state, own, key)

        def evaluate(scoring: Scoring, own: Own, best: Any, shared: Any, eval_splits: Any) -> Scores:
            if each == 1:
                return self._evaluate(scoring, own, best, shared, eval_splits)
            # One lane after another: scores of all lanes at once would not fit, and gain nothing.
            lanes = scoring, own, best
            scores: Scores = jax.lax.map(lambda x: self._evaluate(x[0], x[1], x[2], shared, eval_splits), lanes)
            return scores

        def over_lanes(program: Callable[..., Any]) -> Callable[..., Any]:
            return program if self.mesh is None else by_device(program, self.mesh, each)

        scored = Scoring(state.params, state.epoch_state)
        after, everywhere = self._results(state)
        with in_force(self.plan.layout):
            training = jax.jit(over_lanes(train), donate_argnums=0, **after)
            evaluation = jax.jit(over_lanes(evaluate), **everywhere)
            return (
                training.lower(state, own, key, shared, data),
                evaluation.lower(scored, own, best, shared, eval_splits),
            )

    def _results(self, state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where an epoch's and an evaluation's results belong, for `jax.jit`.

        The state is where it came from; all else is on every device, so that every process can read it.
        """
        if self.mesh is not None:
            return {"out_shardings": NamedSharding(self.mesh, BLOCKS)}, {}
        if (layout := self.plan.layout) is None:
            return {}, {}
        after = state._replace(stale_params=state.params if self.plan.keep_stale else None)
        everywhere = NamedSharding(layout.mesh, WHOLE)
        return {"out_shardings": (layout.shardings(after), everywhere)}, {"out_shardings": everywhere}

    def _train(
        self, state: TrainState, own: Own, key: jax.Array, shared: Any, data: Any
    ) -> tuple[TrainState, EpochLog]:
        """One epoch of one lane."""
        tx = self._make_tx(own.numbers)
        return run_epoch(self._graphdef, tx, self.plan, state, self._constants(own, shared), data, key)

    def _evaluate(self, scoring: Scoring, own: Own, best: Any, shared: Any, eval_splits: Any) -> Scores:
        """Metrics of one lane."""
        constants = self._constants(own, shared)
        scoring, constants = hold_of(self.plan.layout)((scoring, constants))
        users, items = nnx.merge(self._graphdef, scoring.params, scoring.epoch_state, constants).embed()
        valid = full_sort_metrics(eval_splits[0], users, items)
        if self._select_by is None:
            test = full_sort_metrics(eval_splits[1], users, items)
        else:
            test = jax.lax.cond(
                valid[self._select_by] > best,
                lambda: full_sort_metrics(eval_splits[1], users, items),
                lambda: jax.tree.map(jnp.zeros_like, valid),
            )
        return Scores(valid, test, jnp.isfinite(users.sum() + items.sum()))

    def _constants(self, own: Own, shared: Sequence[jax.Array | None]) -> Variables:
        mine = iter(own.constants)
        constants: Variables = jax.tree.unflatten(self._structure, [next(mine) if x is None else x for x in shared])
        return constants


class Lanes:
    """Trainings side by side on the device, or spread over several: the members, each with its state and its own.

    Attributes:
        state, own: of all lanes, with a leading axis where there is more than one.
        width: how many there are.
    """

    def __init__(self, engine: Engine, members: Iterable[tuple[TrainState, Own]], programs: Programs) -> None:
        self.engine, self.programs, self.width = engine, programs, programs.width
        self.state, self.own = stack(members, self.width, engine.mesh)

    def train(self, epochs: Sequence[int]) -> list[EpochLog]:
        """Train every lane for an epoch, of these numbers from 0; returns what was logged, on the host."""
        key = _epoch_key(self.own.key, epochs[0]) if self.width == 1 else _epoch_keys(self.own.key, np.asarray(epochs))
        key = spread(key, self.engine.mesh)
        self.state, log = self.programs.train(self.state._replace(stale_params=None), self.own, key)
        return self._apart(jax.device_get(log))

    def evaluate(self, best: Sequence[float] | None = None) -> list[Scores]:
        """Metrics of every lane on the host; `best` are the selection metrics to improve on."""
        # In JAX's own precision, that of the metrics they are compared with.
        goals = None if best is None else jnp.asarray(best[0] if self.width == 1 else best, float)
        scored, goals = spread((scoring(self.state), goals), self.engine.mesh)
        scores = self._apart(jax.device_get(self.programs.evaluate(scored, self.own, goals)))
        numbers: list[Scores] = jax.tree.map(float, scores)
        return numbers

    def put(self, lane: int, member: tuple[TrainState, Own]) -> None:
        """Replace what a lane trains."""
        if self.width == 1:
            self.state, self.own = member
        else:
            self.state, self.own = put(self._now(), member, lane, self.engine.mesh)

    def keep(self, lanes: Sequence[int], programs: Programs) -> None:
        """Go on with these lanes only, in programs of their number."""
        self.state, self.own = take(self._now(), lanes, self.engine.mesh)
        self.width, self.programs = programs.width, programs

    def _now(self) -> tuple[TrainState, Own]:
        """What the next epoch begins with."""
        return self.state._replace(stale_params=None), self.own

    def _apart(self, results: Any) -> list[Any]:
        """What a program returned, lane by lane."""
        if self.width == 1:
            return [results]
        leaves, structure = jax.tree.flatten(results)
        return [jax.tree.unflatten(structure, [x[lane] for x in leaves]) for lane in range(self.width)]


_epoch_key = jax.random.fold_in
_epoch_keys = jax.jit(jax.vmap(jax.random.fold_in))


def _bytes(program: Any) -> int:
    """XLA's own account of memory on a device; the arguments twice, for loading a member into its lane copies them."""
    sizes = program.memory_analysis()
    if sizes is None:
        return 0
    return int(2 * sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes)


def _check_optimizer(opt_state: Any) -> None:
    """Refuse what the loop cannot drive, or has no parameters to evaluate with."""
    check_loop(opt_state)
    if optax.tree_utils.tree_get_all_with_path(opt_state, optax.LookaheadState.__name__):
        raise UserError(
            "optax.lookahead trains a pair of parameters, and fit the model's own; leave it out, or average otherwise, "
            "as optax.contrib.schedule_free does."
        )
