"""A grid of settings trained as one program per group: members side by side under `jax.vmap`.

The paper names the search for alpha1 and alpha2 as MG's limitation (section 7). Here what a member varies in numbers
(alpha1, alpha2, learning rate, weight decay, loss weights, seed) is a traced value, so that one compiled program trains
all members; what changes shapes or structure (layers, k, interval, optimizer, FREEDOM's dropout) forms a group of its
own. A group larger than the number of slots runs through its slots: a member that stops early frees its slot for the
next one, without recompilation. Once nothing waits any more and half of the slots are idle, the others are gathered in
a program of half the width: at most log2(slots) more compilations, and no more than half of the work is ever wasted.

Over several devices the lanes of a group are spread, equally many on each, and nothing is sent between them. A member
that does not fit into one device's memory is split over all of them instead, one member after another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.devices import Layout
from mgrad_jax.errors import UserError
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.early_stopping import EarlyStopping
from mgrad_jax.training.engine import Engine, Lanes, Own, Programs, Scores, check_splits, first_state
from mgrad_jax.training.epoch import EpochLog, SplitModel, TrainState, split_model
from mgrad_jax.training.fit import layout_of
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


class _Group:
    """The members that share one program, and how each enters a lane of it."""

    def __init__(self, members: Sequence[RunConfig], data: Interactions, mesh: Mesh | None) -> None:
        self.members, self.data, self._mesh = members, data, mesh
        parts = self._split(members[0])
        self._is_own = self._find_own(parts)
        self._begin(parts, mesh=_at_most(len(members), mesh))

    def _begin(self, parts: SplitModel, *, mesh: Mesh | None = None, layout: Layout | None = None) -> None:
        """Have an engine made with the first member's model."""
        first = self.members[0]
        state = self._first_state(first, parts)
        self.engine = Engine(
            parts,
            state,
            self.data,
            partial(self._transformation, first),
            first,
            is_own=self._is_own,
            select_by=first.metric,
            layout=layout,
            mesh=mesh,
        )
        self._loaded = {0: (self.engine.placed(state), self._own(first, parts))}
        self._shapes = jax.eval_shape(lambda: self._loaded[0])

    def load(self, index: int) -> tuple[TrainState, Own]:
        """A member before its first epoch."""
        if index in self._loaded:
            return self._loaded.pop(index)
        member = self.members[index]
        parts = self._split(member)
        return self.engine.placed(self._first_state(member, parts)), self._own(member, parts)

    def compile(self, width: int) -> Programs:
        """Compile for as many members side by side, at the precision that they share."""
        with as_configured(self.members[0]):
            return self.engine.compile(self._shapes, width)

    def compile_what_fits(self, slots: int) -> Programs:
        """Compile for as many of all members, at most `slots` on a device, as fit into its memory; by halving."""
        limit, n_devices = 0.9 * available_bytes(), self.engine.n_devices
        if jax.default_backend() == "cpu":
            limit /= n_devices  # which share it
        each = min(slots, -(-len(self.members) // n_devices))
        while True:
            programs = self.compile(each * n_devices)
            if programs.size <= limit or (each == 1 and self._mesh is None):
                return programs
            if each == 1:
                break
            each //= 2
        del programs, self.engine, self._loaded  # which hold arrays on every device
        return self._compile_split()

    def _compile_split(self) -> Programs:
        """Compile for one member after another, each split over all devices."""
        model = self.members[0].create_model(self.data)
        try:
            layout = layout_of(model, self._mesh)
        except UserError as error:
            raise UserError(f"a member does not fit into the memory of one device, and {error}") from None
        self._begin(split_model(model), layout=layout)
        with as_configured(self.members[0]):
            return self.engine.compile(self._loaded[0], 1)

    def _split(self, member: RunConfig) -> SplitModel:
        return split_model(member.create_model(self.data))

    def _find_own(self, first: SplitModel) -> list[bool]:
        """Which constants differ between members: loss weights, and what is drawn at random. Others are kept once."""
        variables = jax.tree.leaves(first.constants, is_leaf=lambda x: isinstance(x, nnx.Variable))
        own = [isinstance(v, models.TracedHyperParameter) for v in variables for _ in jax.tree.leaves(v)]
        other = next((m for m in self.members if m.seed != self.members[0].seed), None)
        if other is None:
            return own
        pairs = zip(own, jax.tree.leaves(first.constants), jax.tree.leaves(self._split(other).constants), strict=True)
        return [is_own or not np.array_equal(a, b) for is_own, a, b in pairs]

    def _first_state(self, member: RunConfig, parts: SplitModel) -> TrainState:
        return first_state(parts, self._transformation(member, _numbers(member)))

    def _own(self, member: RunConfig, parts: SplitModel) -> Own:
        return self.engine.own(parts, member.seed, _numbers(member))

    def _transformation(self, member: RunConfig, numbers: Mapping[str, Any]) -> optax.GradientTransformation:
        with no_advice():
            return member.transformation(self.data, numbers)


def _numbers(member: RunConfig) -> dict[str, jax.Array]:
    """What of a member's transformation its program takes as arguments."""
    numbers = {name: jnp.asarray(getattr(member, name), jnp.float32) for name in TRACED if getattr(member, name)}
    if member.rate_factors is not None:
        numbers["rate_factors"] = jnp.asarray(member.rate_factors)
    return numbers


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
    mesh: Mesh | None = None,
    on_result: Callable[[int, MemberResult], None] | None = None,
    on_epoch: Callable[[SweepReport], None] | None = None,
) -> list[MemberResult]:
    """Train every member to its own best validation epoch; each equals the single run with its configuration.

    Args:
        data: the interactions all members train on; the `data` and `out` of their configurations are not looked at.
        members: what to train, e.g. from `mgrad_jax.training.grid.expand_grid`.
        slots: the most members side by side on a device, fewer where its memory holds no more; the default is
            `default_slots()`.
        mesh: of several devices, from `mgrad_jax.devices.mesh`, over which the members that share a program are spread;
            by default one device trains them all.
        on_result: called with a member's index and result as soon as it stops.
        on_epoch: called after every epoch of a group.

    Returns:
        One result a member, in the members' order. A member whose loss or scores became NaN or infinite ends there and
        keeps its best epoch so far; the others go on.

    Raises:
        UserError: no members, a setting that does not fit the data, an empty split, or a member that fits into no
            device's memory and cannot be split over so many.
    """
    check_sweep(data, members, slots)
    mesh = None if mesh is None or mesh.size == 1 else mesh
    results: dict[int, MemberResult] = {}
    groups = group_members(members)
    for number, indices in enumerate(groups, start=1):
        run = _GroupRun(_Group([members[i] for i in indices], data, mesh), slots or default_slots())
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
    check_splits(data)


def _at_most(n: int, mesh: Mesh | None) -> Mesh | None:
    """The first n of a mesh's devices, or all; None where that is one."""
    if mesh is None or n == 1:
        return None
    return Mesh(mesh.devices[:n], mesh.axis_names, axis_types=mesh.axis_types)


def default_slots() -> int:
    """Members side by side on a device: a GPU has room for many, on a CPU one after another is fastest (measured)."""
    return 1 if jax.default_backend() == "cpu" else 16


@dataclass
class _Slot:
    """What a lane of the program trains now: the member's index in its group and how far it is."""

    index: int
    progress: EarlyStopping = field(default_factory=EarlyStopping)
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("compile", "train", "evaluate"), 0.0))


class _GroupRun:
    """The members of a group passing through the lanes of its program."""

    def __init__(self, group: _Group, slots: int) -> None:
        self.group, n = group, len(group.members)
        programs = group.compile_what_fits(slots)
        self.waiting = list(range(programs.width, n))
        self.slots = [_Slot(index) if index < n else None for index in range(programs.width)]
        self.lanes = Lanes(group.engine, self._first_members(), programs)
        self.share_of_compilation = programs.seconds / n

    def _first_members(self) -> Iterator[tuple[TrainState, Own]]:
        """What the lanes begin with; the last ones idle where members are fewer, with the last member once more."""
        for slot in self.slots:
            if slot is not None:
                member = self.group.load(slot.index)
            yield member

    @property
    def active(self) -> bool:
        """Whether any lane still trains."""
        return any(slot is not None for slot in self.slots)

    def epoch(self) -> list[tuple[int, MemberResult]]:
        """One epoch of every lane; returns the members that stopped, with their results."""
        started = time.perf_counter()
        logs = self.lanes.train([0 if slot is None else slot.progress.epoch for slot in self.slots])
        trained = time.perf_counter()
        # No metric is better than the best of an idle lane.
        scores = self.lanes.evaluate([math.inf if slot is None else slot.progress.best_value for slot in self.slots])
        seconds = {"train": trained - started, "evaluate": time.perf_counter() - trained}
        busy = sum(slot is not None for slot in self.slots)
        stopped = []
        for lane, slot in enumerate(self.slots):
            if slot is None:
                continue
            for name, value in seconds.items():
                slot.seconds[name] += value / busy
            diverged = not (np.isfinite(logs[lane].losses).all() and scores[lane].finite)
            if diverged or self._record(slot, logs[lane], scores[lane]):
                stopped.append((slot.index, self._result(slot, diverged)))
                self._refill(lane)
        self._shrink()
        return stopped

    def _record(self, slot: _Slot, log: EpochLog, scores: Scores) -> bool:
        """Count the epoch of one member; returns whether it was its last one."""
        member = self.group.members[slot.index]
        slot.losses.append(self.group.engine.plan.epoch_loss(log.losses))
        slot.progress.update(member.metric, scores.valid, scores.test)
        return slot.progress.is_over(member.epochs, member.patience)

    def _refill(self, lane: int) -> None:
        """Give a free lane to the next waiting member; without one it idles."""
        if not self.waiting:
            self.slots[lane] = None
            return
        slot = _Slot(self.waiting.pop(0))
        self.slots[lane] = slot
        self.lanes.put(lane, self.group.load(slot.index))

    def _shrink(self) -> None:
        """Leave idle lanes behind once they are half of all; of several devices each keeps equally many."""
        busy = [lane for lane, slot in enumerate(self.slots) if slot is not None]
        idle = [lane for lane, slot in enumerate(self.slots) if slot is None]
        n_devices = self.group.engine.n_devices
        width = -(-len(busy) // n_devices) * n_devices
        if busy and 2 * width <= len(self.slots):
            kept = [*busy, *idle][:width]
            self.lanes.keep(kept, self.group.compile(width))
            self.slots = [self.slots[lane] for lane in kept]

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
