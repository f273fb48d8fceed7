"""A grid of settings trained as one program per group: members side by side under `jax.vmap`.

The paper names the search for alpha1 and alpha2 as MG's limitation (section 7). Here what a member varies in numbers
(alpha1, alpha2, learning rate, weight decay, loss weights, seed) is a traced value, so that one compiled program trains
all members; what changes shapes or structure (layers, k, interval, optimizer, FREEDOM's dropout) forms a group of its
own. A group larger than the number of slots runs through its slots: a member that stops early frees its slot for the
next one, without recompilation. Once nothing waits any more and half of the slots are idle, the others are gathered in
a program of half the width: at most log2(slots) more compilations, and no more than half of the work is ever wasted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import full_sort_metrics, make_eval_split
from mgrad_jax.iterates import evaluation_params
from mgrad_jax.mirror import check_loop, pass_schedule
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.epoch import EpochPlan, SplitModel, TrainState, run_epoch, split_model, training_data
from mgrad_jax.training.fit import Progress
from mgrad_jax.training.grid import TRACED, group_members, no_advice
from mgrad_jax.training.memory import available_bytes
from mgrad_jax.training.numerics import as_configured


@dataclass(frozen=True)
class MemberResult:
    """What came of one member.

    Attributes:
        config: its settings.
        epochs_run: epochs trained; where it diverged, the last finite one.
        best_epoch: the epoch with the best selection metric on validation, 0 where it diverged in the first epoch;
            `valid` and `test` are its metrics.
        losses: the training loss of every epoch, summed over the first passes as in `EpochReport`.
        diverged: whether a loss or score became NaN or infinite, which ended the member.
        seconds: its share of the program's "compile", "train" and "evaluate".
    """

    config: RunConfig
    epochs_run: int
    best_epoch: int
    valid: dict[str, float]
    test: dict[str, float]
    losses: tuple[float, ...]
    diverged: bool
    seconds: dict[str, float]


def _transformation(config: RunConfig, numbers: Mapping[str, Any], data: Interactions) -> optax.GradientTransformation:
    with no_advice():
        return config.transformation(data, numbers)


class _Own(NamedTuple):
    """What a member keeps through its training: constants no other member has, its numbers, its key."""

    constants: list[jax.Array]
    numbers: dict[str, jax.Array]
    key: jax.Array


class _Standing(NamedTuple):
    """How far a member is: its epoch, from 0, and its best selection metric so far."""

    epoch: Any
    best: Any


class _Outcome(NamedTuple):
    """What the host needs to know of an epoch."""

    loss: jax.Array
    finite: jax.Array


class _Scores(NamedTuple):
    """Metrics on validation; on test, zeros where validation is not the best so far; whether the scores are finite."""

    valid: dict[str, jax.Array]
    test: dict[str, jax.Array]
    finite: jax.Array


class _Group:
    """The program of one group and what its members share."""

    def __init__(self, members: Sequence[RunConfig], data: Interactions) -> None:
        self.members = members
        self.data = data
        first = members[0]
        parts = self._split(first)
        self.graphdef = parts.graphdef
        constants, self.structure = jax.tree.flatten(parts.constants)
        self.is_own = self._find_own(parts)
        self.shared = [None if own else x for own, x in zip(self.is_own, constants, strict=True)]
        self._loaded: dict[int, tuple[TrainState, _Own]] = {0: self._load(parts, first)}
        state, _ = self._loaded[0]
        self.shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._loaded[0])
        check_loop(state.opt_state)
        schedule = pass_schedule(state.opt_state, -(-len(data.train) // first.batch_size))
        self.plan = EpochPlan(first.batch_size, tuple(int(i) for i in schedule), first.evaluate == "stale")
        self.train_data = training_data(data)
        self.eval_splits = (make_eval_split(data, "valid", first.ks), make_eval_split(data, "test", first.ks))

    def _split(self, member: RunConfig) -> SplitModel:
        return split_model(member.create_model(self.data))

    def _find_own(self, first: SplitModel) -> list[bool]:
        """Which constants differ between members: loss weights, and what is drawn at random. The others are kept once."""
        variables = jax.tree.leaves(first.constants, is_leaf=lambda x: isinstance(x, nnx.Variable))
        own = [isinstance(v, models.TracedHyperParameter) for v in variables for _ in jax.tree.leaves(v)]
        other = next((m for m in self.members if m.seed != self.members[0].seed), None)
        if other is None:
            return own
        pairs = zip(own, jax.tree.leaves(first.constants), jax.tree.leaves(self._split(other).constants), strict=True)
        return [is_own or not np.array_equal(a, b) for is_own, a, b in pairs]

    def load(self, index: int) -> tuple[TrainState, _Own]:
        """A member before its first epoch."""
        if index in self._loaded:
            return self._loaded.pop(index)
        return self._load(self._split(self.members[index]), self.members[index])

    def _load(self, parts: SplitModel, member: RunConfig) -> tuple[TrainState, _Own]:
        numbers = {name: jnp.asarray(getattr(member, name), jnp.float32) for name in TRACED if getattr(member, name)}
        if member.rate_factors is not None:
            numbers["rate_factors"] = jnp.asarray(member.rate_factors)
        tx = _transformation(member, numbers, self.data)
        # A copy, for the state is donated and must share no buffer with the constants.
        state = jax.tree.map(jnp.copy, TrainState(parts.params, tx.init(parts.params), parts.epoch_state))
        constants = [x for own, x in zip(self.is_own, jax.tree.leaves(parts.constants), strict=True) if own]
        return state, _Own(constants, numbers, jax.random.key(member.seed))

    def _constants(self, own: _Own, shared: list[jax.Array | None]) -> nnx.State:
        mine = iter(own.constants)
        return jax.tree.unflatten(self.structure, [next(mine) if x is None else x for x in shared])

    def train(
        self, state: TrainState, own: _Own, standing: _Standing, shared: list[Any], train: Any
    ) -> tuple[TrainState, nnx.State | None, _Outcome]:
        """One epoch of one member: the new state, the parameters to evaluate where they are others, the outcome."""
        tx = _transformation(self.members[0], own.numbers, self.data)
        key = jax.random.fold_in(own.key, standing.epoch)
        constants = self._constants(own, shared)
        state, log = run_epoch(self.graphdef, tx, self.plan, state, constants, train, key)
        outcome = _Outcome(jnp.sum(log.losses[self.plan.first_passes]), jnp.all(jnp.isfinite(log.losses)))
        evaluated = state.stale_params
        if evaluated is None and (found := evaluation_params(state.opt_state, state.params)) is not state.params:
            evaluated = found
        return state._replace(stale_params=None), evaluated, outcome

    def evaluate(
        self,
        params: nnx.State,
        epoch_state: nnx.State,
        own: _Own,
        standing: _Standing,
        shared: list[Any],
        eval_splits: Any,
    ) -> _Scores:
        """Metrics of one member; test waits for a better selection metric than its best so far."""
        users, items = nnx.merge(self.graphdef, params, epoch_state, self._constants(own, shared)).embed()
        valid = full_sort_metrics(eval_splits[0], users, items)
        test = jax.lax.cond(
            valid[self.members[0].metric] > standing.best,
            lambda: full_sort_metrics(eval_splits[1], users, items),
            lambda: jax.tree.map(jnp.zeros_like, valid),
        )
        return _Scores(valid, test, jnp.isfinite(users.sum() + items.sum()))


class _Programs(NamedTuple):
    """The group's two programs for some number of members side by side, and the seconds their compilation took."""

    train: Any
    evaluate: Any
    seconds: float


class _Lanes:
    """Members side by side on the device.

    One member alone has no leading axis and passes through no `vmap`.
    """

    def __init__(self, group: _Group, members: list[tuple[TrainState, _Own]], programs: _Programs) -> None:
        self.group = group
        self.width = len(members)
        stacked: tuple[TrainState, _Own] = _stack(members) if self.width > 1 else members[0]
        self.state, self.own = stacked
        self.programs = programs

    def epoch(self, standing: _Standing) -> tuple[_Outcome, _Scores, float, float]:
        """Train and evaluate all lanes for one epoch: outcome and scores with a leading axis, and both times."""
        group = self.group
        if self.width == 1:
            standing = _lane(standing, 0)
        started = time.perf_counter()
        self.state, evaluated, outcome = self.programs.train(
            self.state, self.own, standing, group.shared, group.train_data
        )
        outcome = jax.device_get(outcome)
        trained = time.perf_counter()
        params = self.state.params if evaluated is None else evaluated
        scores = jax.device_get(
            self.programs.evaluate(params, self.state.epoch_state, self.own, standing, group.shared, group.eval_splits)
        )
        ended = time.perf_counter()
        if self.width == 1:
            outcome, scores = jax.tree.map(np.atleast_1d, (outcome, scores))
        return outcome, scores, trained - started, ended - trained

    def put(self, lane: int, member: tuple[TrainState, _Own]) -> None:
        """Replace a lane's member."""
        if self.width == 1:
            self.state, self.own = member
        else:
            self.state, self.own = _put((self.state, self.own), member, lane)

    def keep(self, lanes: Sequence[int]) -> None:
        """Go on with these lanes only, in a program of their number."""
        index = np.asarray(lanes) if len(lanes) > 1 else lanes[0]
        self.state, self.own = jax.tree.map(lambda x: x[index], (self.state, self.own))
        self.width = len(lanes)
        self.programs = _compile(self.group, self.width)


def _stack(members: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def _lane(stacked: Any, lane: int) -> Any:
    return jax.tree.map(lambda x: x[lane], stacked)


@jax.jit
def _put(stacked: Any, member: Any, lane: int) -> Any:
    return jax.tree.map(lambda full, new: full.at[lane].set(new), stacked, member)


def _compile(group: _Group, width: int) -> _Programs:
    """Compile the group's programs for `width` members, at the precision that they share."""
    with as_configured(group.members[0]):
        return _compile_lanes(group, width)


def _compile_lanes(group: _Group, width: int) -> _Programs:
    started = time.perf_counter()

    def train(state: Any, own: Any, standing: Any, shared: Any, train_data: Any) -> Any:
        if width == 1:
            return group.train(state, own, standing, shared, train_data)
        return jax.vmap(lambda s, o, at: group.train(s, o, at, shared, train_data))(state, own, standing)

    def evaluate(params: Any, epoch_state: Any, own: Any, standing: Any, shared: Any, eval_splits: Any) -> Any:
        if width == 1:
            return group.evaluate(params, epoch_state, own, standing, shared, eval_splits)
        # One member after another: scores of all members at once would not fit, and gain nothing.
        members = (params, epoch_state, own, standing)
        return jax.lax.map(lambda m: group.evaluate(m[0], m[1], m[2], m[3], shared, eval_splits), members)

    state, own = (
        group.shapes
        if width == 1
        else jax.tree.map(lambda x: jax.ShapeDtypeStruct((width, *x.shape), x.dtype), group.shapes)
    )
    standing = _standing([0] * width, [0.0] * width)
    if width == 1:
        standing = _lane(standing, 0)
    trainer = jax.jit(train, donate_argnums=0).lower(state, own, standing, group.shared, group.train_data).compile()
    evaluator = (
        jax.jit(evaluate)
        .lower(state.params, state.epoch_state, own, standing, group.shared, group.eval_splits)
        .compile()
    )
    return _Programs(trainer, evaluator, time.perf_counter() - started)


def _standing(epochs: Sequence[int], best: Sequence[float]) -> _Standing:
    # The best value in JAX's own precision, that of the metrics it is compared with.
    return _Standing(np.asarray(epochs, np.int32), jnp.asarray(best, float))


def _compile_what_fits(group: _Group, wanted: int) -> tuple[int, _Programs]:
    """Compile for as many members, at most those wanted, as fit into the device's memory side by side; by halving."""
    limit = 0.9 * available_bytes()
    while True:
        programs = _compile(group, wanted)
        if wanted == 1 or max(_bytes(program) for program in programs[:2]) <= limit:
            return wanted, programs
        wanted //= 2


def _bytes(program: Any) -> int:
    """XLA's own account of a program's memory; the arguments twice, for loading a member into its lane copies them."""
    sizes = program.memory_analysis()
    if sizes is None:
        return 0
    return 2 * sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes


class SweepReport(NamedTuple):
    """How far a sweep is.

    Attributes:
        finished, members: members that have stopped, and all.
        group, groups: the group under way, from 1, and their number.
        running: the epoch of every member in training.
    """

    finished: int
    members: int
    group: int
    groups: int
    running: list[int]


def sweep(
    data: Interactions,
    members: Sequence[RunConfig],
    *,
    slots: int | None = None,
    on_result: Callable[[int, MemberResult], None] | None = None,
    on_epoch: Callable[[SweepReport], None] | None = None,
) -> list[MemberResult]:
    """Train every member to its own best validation epoch; each equals the single run with its configuration.

    Args:
        data: the interactions all members train on; the `data` and `out` of their configurations are not looked at.
        members: what to train, e.g. from `mgrad_jax.training.grid.expand_grid`.
        slots: the most members side by side in one program, fewer where the device's memory holds no more; the default
            is `default_slots()`.
        on_result: called with a member's index and result as soon as it stops.
        on_epoch: called after every epoch of a group.

    Returns:
        One result a member, in the members' order. A member whose loss or scores became NaN or infinite ends there and
        keeps its best epoch so far; the others go on.

    Raises:
        UserError: no members, a setting that does not fit the data, or an empty split.
    """
    check_sweep(data, members, slots)
    results: dict[int, MemberResult] = {}
    groups = group_members(members)
    for number, indices in enumerate(groups, start=1):
        run = _GroupRun(_Group([members[i] for i in indices], data), slots or default_slots())
        while run.active:
            for position, result in run.epoch():
                results[indices[position]] = result
                if on_result is not None:
                    on_result(indices[position], result)
            if on_epoch is not None:
                running = [slot.progress.epoch for slot in run.slots if slot is not None]
                on_epoch(SweepReport(len(results), len(members), number, len(groups), running))
    return [results[i] for i in range(len(members))]


def check_sweep(data: Interactions, members: Sequence[RunConfig], slots: int | None = None) -> None:
    """Raise the `UserError` of a sweep that cannot begin."""
    if not members:
        raise UserError("the sweep has no members; give each axis of the grid at least one value.")
    if slots is not None and slots < 1:
        raise UserError(f"slots is {slots}; it must be at least 1.")
    if any(member.start_from is not None for member in members):
        raise UserError("start_from is for single runs; leave it out of the sweep.")
    for split in ("valid", "test"):
        if not len(getattr(data, split)):
            raise UserError(f"{data.source}: the {split} split is empty; early stopping and the result need it.")


def default_slots() -> int:
    """Members trained side by side: a GPU has room for many, on a CPU one after another is fastest (measured)."""
    return 1 if jax.default_backend() == "cpu" else 16


@dataclass
class _Slot:
    """What a lane of the program trains now: the member's index in its group and how far it is."""

    index: int
    progress: Progress = field(default_factory=Progress)
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("compile", "train", "evaluate"), 0.0))


class _GroupRun:
    """The members of a group passing through the lanes of its program."""

    def __init__(self, group: _Group, slots: int) -> None:
        self.group = group
        self.waiting = list(range(len(group.members)))
        width, programs = _compile_what_fits(group, min(slots, len(self.waiting)))
        self.slots: list[_Slot | None] = [_Slot(self.waiting.pop(0)) for _ in range(width)]
        self.lanes = _Lanes(group, [group.load(i) for i in range(width)], programs)
        self.share_of_compilation = programs.seconds / len(group.members)

    @property
    def active(self) -> bool:
        """Whether any lane still trains."""
        return any(slot is not None for slot in self.slots)

    def epoch(self) -> list[tuple[int, MemberResult]]:
        """One epoch of every lane; returns the members that stopped, with their results."""
        outcome, scores, *seconds = self.lanes.epoch(self._standing())
        busy = sum(slot is not None for slot in self.slots)
        stopped = []
        for lane, slot in enumerate(self.slots):
            if slot is None:
                continue
            for name, value in zip(("train", "evaluate"), seconds, strict=True):
                slot.seconds[name] += value / busy
            if self._record(slot, _lane(outcome, lane), _lane(scores, lane)):
                stopped.append((slot.index, self._result(slot, diverged=not _finite(outcome, scores, lane))))
                self._refill(lane)
        self._shrink()
        return stopped

    def _standing(self) -> _Standing:
        """How far every lane is; no metric is better than the best of an idle one."""
        n_lanes = len(self.slots)
        epochs, best = [0] * n_lanes, [math.inf] * n_lanes
        for lane, slot in enumerate(self.slots):
            if slot is not None:
                epochs[lane], best[lane] = slot.progress.epoch, slot.progress.best_value
        return _standing(epochs, best)

    def _record(self, slot: _Slot, outcome: _Outcome, scores: _Scores) -> bool:
        """Count the epoch of one member; returns whether it was its last one."""
        if not (outcome.finite and scores.finite):
            return True
        member, progress = self.group.members[slot.index], slot.progress
        slot.losses.append(float(outcome.loss))
        valid, test = ({k: float(v) for k, v in metrics.items()} for metrics in (scores.valid, scores.test))
        progress.update(member.metric, valid, test)
        return progress.epoch >= member.epochs or progress.bad_epochs > member.patience

    def _refill(self, lane: int) -> None:
        """Give a free lane to the next waiting member; without one it idles."""
        if not self.waiting:
            self.slots[lane] = None
            return
        slot = _Slot(self.waiting.pop(0))
        self.slots[lane] = slot
        self.lanes.put(lane, self.group.load(slot.index))

    def _shrink(self) -> None:
        """Leave idle lanes behind once they are half of all."""
        busy = [lane for lane, slot in enumerate(self.slots) if slot is not None]
        if busy and 2 * len(busy) <= len(self.slots):
            self.lanes.keep(busy)
            self.slots = [self.slots[lane] for lane in busy]

    def _result(self, slot: _Slot, diverged: bool) -> MemberResult:
        progress = slot.progress
        return MemberResult(
            config=self.group.members[slot.index],
            epochs_run=progress.epoch,
            best_epoch=progress.best_epoch,
            valid=progress.valid,
            test=progress.test,
            losses=tuple(slot.losses),
            diverged=diverged,
            seconds={**slot.seconds, "compile": self.share_of_compilation},
        )


def _finite(outcome: _Outcome, scores: _Scores, lane: int) -> bool:
    return bool(outcome.finite[lane] and scores.finite[lane])
