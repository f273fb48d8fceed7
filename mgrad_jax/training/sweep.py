"""A grid of settings trained as one program per group: members side by side under `jax.vmap`.

The paper names the search for alpha1 and alpha2 as MG's limitation (section 7). Here what a member varies in numbers
(alpha1, alpha2, learning rate, loss weights, seed) is a traced value, so that one compiled program trains all members;
what changes shapes or structure (layers, k, interval, optimizer, FREEDOM's dropout) forms a group of its own. A group
larger than `slots` runs through its slots: a member that stops early frees its slot for the next one, without
recompilation.
"""

from __future__ import annotations

import dataclasses
import itertools
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
from mgrad_jax.evaluation.ranking import make_ranker, rank_metrics
from mgrad_jax.mirror import mirror_gradient, pass_schedule, replay
from mgrad_jax.optimizers import make_optimizer
from mgrad_jax.training.epoch import EpochPlan, TrainState, run_epoch, split_model, training_data
from mgrad_jax.training.fit import Progress

_TRACED = ("alpha1", "alpha2", "learning_rate", "weight_decay")
_STRUCTURAL = ("optimizer", "interval", "training", "batch_size")
TRAININGS = ("mirror", "plain", "replay")


@dataclass(frozen=True)
class Member:
    """One point of the grid.

    Attributes:
        model: name of the model.
        hyper_parameters: the model's, by published name.
        training: "mirror", "plain" or "replay".
        alpha1, alpha2, interval: of Mirror Gradient; unused by "plain".
        optimizer, learning_rate, weight_decay: the base optimizer.
        batch_size: interactions a batch.
        seed: of the initial parameters and of everything drawn in training.
    """

    model: str
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    training: str = "mirror"
    alpha1: float = 1.0
    alpha2: float = 0.2
    interval: int = 3
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 2048
    seed: int = 999

    def __post_init__(self) -> None:
        if self.training not in TRAININGS:
            raise UserError(f"unknown training '{self.training}'; choose one of {', '.join(TRAININGS)}.")
        models.make_config(self.model, dict(self.hyper_parameters))

    @property
    def setting(self) -> dict[str, Any]:
        """Everything but the seed: members of one setting are averaged over their seeds."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "seed"}
        return {**values, "hyper_parameters": dict(sorted(self.hyper_parameters.items()))}


@dataclass(frozen=True)
class MemberResult:
    """What came of one member: `valid` and `test` are the metrics of its best validation epoch."""

    member: Member
    epochs_run: int
    best_epoch: int
    valid: dict[str, float]
    test: dict[str, float]


def expand_grid(base: Member, grid: Mapping[str, Sequence[Any]]) -> list[Member]:
    """All combinations of the grid's values over a base member.

    Args:
        base: what the grid does not name.
        grid: lists of values by name: a field of `Member` (alpha1, alpha2, learning_rate, seed, interval, ...) or a
            hyper-parameter of the model.

    Raises:
        UserError: an unknown name, an empty list, or a value that does not fit.

    >>> [m.alpha2 for m in expand_grid(Member("vbpr"), {"alpha2": [0.1, 0.2]})]
    [0.1, 0.2]
    """
    own = {f.name for f in dataclasses.fields(Member)} - {"model", "hyper_parameters"}
    hyper = {f.name for f in dataclasses.fields(models.model_class(base.model).config_class)}
    for name, values in grid.items():
        if name not in own | hyper:
            raise UserError(f"the grid has no axis '{name}'; choose among {', '.join(sorted(own | hyper))}.")
        if not len(values):
            raise UserError(f"the grid's axis '{name}' has no values; give at least one.")
    members = []
    for point in itertools.product(*grid.values()):
        chosen = dict(zip(grid, point, strict=True))
        hyper_parameters = {**base.hyper_parameters, **{k: v for k, v in chosen.items() if k in hyper}}
        fields = {k: v for k, v in chosen.items() if k in own}
        members.append(dataclasses.replace(base, hyper_parameters=hyper_parameters, **fields))
    return members


def group_members(members: Sequence[Member]) -> list[list[int]]:
    """Indices of the members that share one compiled program, group by group, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for index, member in enumerate(members):
        groups.setdefault(_structure(member), []).append(index)
    return list(groups.values())


def _structure(member: Member) -> tuple[Any, ...]:
    """What must be equal for two members to share a program."""
    config = models.make_config(member.model, dict(member.hyper_parameters))
    static = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if not f.metadata.get("traced")]
    # Weight decay is an extra transformation, so whether there is any is structure; how much is a traced number.
    return (member.model, *static, *(getattr(member, name) for name in _STRUCTURAL), member.weight_decay > 0)


def _transformation(member: Member, values: Mapping[str, Any]) -> optax.GradientTransformation:
    """The member's Optax chain with its numbers, which may be traced, taken from `values`."""
    optimizer = make_optimizer(
        member.optimizer, values["learning_rate"], weight_decay=values["weight_decay"] if member.weight_decay else 0.0
    )
    if member.training == "mirror":
        return optax.chain(mirror_gradient(values["alpha1"], values["alpha2"], member.interval), optimizer)
    if member.training == "replay":
        return optax.chain(replay(member.interval), optimizer)
    return optimizer


class _Member(NamedTuple):
    """One member as arrays: its state, the constants that are its own, its numbers and its key."""

    state: TrainState
    own: list[jax.Array]
    values: dict[str, jax.Array]
    key: jax.Array


@dataclass
class _Group:
    """The program of one group and what its members share."""

    members: Sequence[Member]
    data: Interactions
    slots: int
    ks: Sequence[int]

    def __post_init__(self) -> None:
        first = self.members[0]
        self.example = first
        parts = split_model(self._create(first))
        self.graphdef = parts.graphdef
        self.constants, self.structure = jax.tree.flatten(parts.constants)
        self.is_own = self._find_own()
        self.shared = [None if own else x for own, x in zip(self.is_own, self.constants, strict=True)]
        schedule = pass_schedule(self.load(first).state.opt_state, -(-len(self.data.train) // first.batch_size))
        self.plan = EpochPlan(first.batch_size, tuple(int(i) for i in schedule))
        self.train_data = training_data(self.data)
        self.rankers = tuple(make_ranker(self.data, split, self.ks) for split in ("valid", "test"))
        self.train = jax.jit(self._train, donate_argnums=0)
        self.evaluate = jax.jit(self._evaluate)
        self.write = jax.jit(self._write, donate_argnums=0)

    def _create(self, member: Member) -> models.Recommender:
        return models.create(member.model, self.data, seed=member.seed, **member.hyper_parameters)

    def _find_own(self) -> list[bool]:
        """Which constants differ between members (loss weights, random tables); the others are stored once."""
        is_own = [False] * len(self.constants)
        for member in {(m.seed, tuple(sorted(m.hyper_parameters.items()))): m for m in self.members}.values():
            leaves = jax.tree.leaves(split_model(self._create(member)).constants)
            is_own = [own or not np.array_equal(a, b) for own, a, b in zip(is_own, leaves, self.constants, strict=True)]
        return is_own

    def load(self, member: Member) -> _Member:
        """A member before its first epoch."""
        parts = split_model(self._create(member))
        values = {name: jnp.asarray(getattr(member, name), jnp.float32) for name in _TRACED}
        tx = _transformation(member, values)
        state = TrainState(parts.params, tx.init(parts.params), parts.epoch_state)
        own = [x for own, x in zip(self.is_own, jax.tree.leaves(parts.constants), strict=True) if own]
        return _Member(state, own, values, jax.random.key(member.seed))

    def _merge(self, own: list[jax.Array], shared: list[jax.Array | None]) -> nnx.State:
        mine = iter(own)
        return jax.tree.unflatten(self.structure, [next(mine) if x is None else x for x in shared])

    def _train(self, stacked: _Member, shared: list[Any], train: Any, epochs: jax.Array) -> tuple[_Member, jax.Array]:
        def one(member: _Member, epoch: jax.Array) -> tuple[TrainState, jax.Array]:
            tx = _transformation(self.example, member.values)
            constants = self._merge(member.own, shared)
            key = jax.random.fold_in(member.key, epoch)
            state, log = run_epoch(self.graphdef, tx, self.plan, member.state, constants, train, key)
            return state, jnp.all(jnp.isfinite(log.losses))

        state, finite = jax.vmap(one)(stacked, epochs)
        return stacked._replace(state=state), finite

    def _evaluate(self, stacked: _Member, shared: list[Any], rankers: Any) -> list[dict[str, jax.Array]]:
        def one(member: _Member) -> list[dict[str, jax.Array]]:
            constants = self._merge(member.own, shared)
            users, items = nnx.merge(self.graphdef, member.state.params, member.state.epoch_state, constants).embed()
            return [rank_metrics(ranker, users, items) for ranker in rankers]

        # One member after another: scores of all members at once would not fit, and gain nothing.
        return jax.lax.map(one, stacked)

    def _write(self, stacked: _Member, member: _Member, slot: jax.Array) -> _Member:
        return jax.tree.map(lambda full, new: full.at[slot].set(new), stacked, member)


@dataclass
class _Slot:
    """What a slot of the program trains now: the member's index in its group and how far it is."""

    index: int
    progress: Progress = field(default_factory=Progress)


def sweep(
    data: Interactions,
    members: Sequence[Member],
    *,
    epochs: int = 1000,
    patience: int = 20,
    metric: str = "recall@5",
    ks: Sequence[int] = (5, 10, 20, 50),
    slots: int | None = None,
    on_result: Callable[[int, MemberResult], None] | None = None,
    on_epoch: Callable[[int, int], None] | None = None,
) -> list[MemberResult]:
    """Train every member to its own best validation epoch; each equals the single run with its settings.

    Args:
        data: the interactions all members train on.
        members: what to train, e.g. from `expand_grid`.
        epochs, patience, metric, ks: as in `mgrad_jax.training.fit`.
        slots: members side by side in one program; the default is `default_slots()`.
        on_result: called with a member's index and result as soon as it stops.
        on_epoch: called after every epoch of a group with the members finished and the members in all.

    Returns:
        One result a member, in the members' order. A member whose loss became NaN or infinite ends there and keeps
        its best epoch so far.

    Raises:
        UserError: no members, or a setting that does not fit the data.
    """
    if not members:
        raise UserError("the sweep has no members; give each axis of the grid at least one value.")
    results: dict[int, MemberResult] = {}
    for indices in group_members(members):
        group = _Group([members[i] for i in indices], data, min(slots or default_slots(), len(indices)), ks)
        run = _GroupRun(group, epochs, patience, metric)
        while run.active:
            for position, result in run.epoch():
                results[indices[position]] = result
                if on_result is not None:
                    on_result(indices[position], result)
            if on_epoch is not None:
                on_epoch(len(results), len(members))
    return [results[i] for i in range(len(members))]


def default_slots() -> int:
    """Members trained side by side: a GPU has room for many, on a CPU one after another is fastest (measured)."""
    return 1 if jax.default_backend() == "cpu" else 16


class _GroupRun:
    """The members of a group passing through the slots of its program."""

    def __init__(self, group: _Group, epochs: int, patience: int, metric: str) -> None:
        self.group, self.epochs, self.patience, self.metric = group, epochs, patience, metric
        self.waiting = list(range(len(group.members)))
        self.slots: list[_Slot | None] = [_Slot(self.waiting.pop(0)) for _ in range(group.slots)]
        loaded = [group.load(group.members[slot.index]) for slot in self.slots if slot is not None]
        self.stacked: _Member = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loaded)

    @property
    def active(self) -> bool:
        """Whether any slot still trains."""
        return any(slot is not None for slot in self.slots)

    def epoch(self) -> list[tuple[int, MemberResult]]:
        """One epoch of every slot; returns the members that stopped, with their results."""
        group = self.group
        numbers = jnp.asarray([slot.progress.epoch if slot else 0 for slot in self.slots], jnp.int32)
        self.stacked, finite = group.train(self.stacked, group.shared, group.train_data, numbers)
        valid, test = jax.device_get(group.evaluate(self.stacked, group.shared, group.rankers))
        stopped = []
        for position, (slot, good) in enumerate(zip(self.slots, np.asarray(finite), strict=True)):
            if slot is None:
                continue
            if good:
                pick = {
                    split: {k: float(v[position]) for k, v in m.items()} for split, m in (("v", valid), ("t", test))
                }
                slot.progress.update(self.metric, pick["v"], pick["t"])
            progress = slot.progress
            if not good or progress.epoch >= self.epochs or progress.bad_epochs > self.patience:
                stopped.append((slot.index, self._result(slot)))
                self._refill(position)
        return stopped

    def _refill(self, position: int) -> None:
        """Give a free slot to the next waiting member; without one the slot idles."""
        if not self.waiting:
            self.slots[position] = None
            return
        slot = _Slot(self.waiting.pop(0))
        self.slots[position] = slot
        self.stacked = self.group.write(self.stacked, self.group.load(self.group.members[slot.index]), position)

    def _result(self, slot: _Slot) -> MemberResult:
        progress = slot.progress
        member = self.group.members[slot.index]
        return MemberResult(member, progress.epoch, progress.best_epoch, progress.valid, progress.test)
