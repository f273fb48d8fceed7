"""What a training takes of each of several devices: its programs are compiled, and nothing is allocated or run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mgrad_jax.data import Interactions
from mgrad_jax.data.sampling import UserHistory
from mgrad_jax.devices import BLOCKS, Layout
from mgrad_jax.evaluation.ranking import BlockedPairs, EvalSplit, blocks_of, users_at_a_time
from mgrad_jax.graph.items import knn_bytes
from mgrad_jax.graph.sparse import shapes_only
from mgrad_jax.models import Recommender
from mgrad_jax.training.engine import Engine, Inputs
from mgrad_jax.training.epoch import SplitModel, TrainingData, TrainState, split_model
from mgrad_jax.training.fit import layout_of
from mgrad_jax.training.settings import FitSettings
from mgrad_jax.training.traffic import ProgramText, Traffic

# Of the machine code, which is never run; what is sent and held is decided before. A third of the time.
_UNOPTIMISED: Any = {"xla_backend_optimization_level": 0}
_MAX_DEGREE = 1 << 12  # of a user's history: how often a search is halved, and no array's size


class Sizes(Interactions):
    """A dataset by its sizes alone, without the interactions.

    Args:
        name: of the dataset.
        n_users, n_items: their numbers.
        splits: interactions in training, validation and test.
        widths: columns of the features, by modality.
    """

    def __init__(
        self, name: str, n_users: int, n_items: int, splits: tuple[int, int, int], widths: Mapping[str, int]
    ) -> None:
        # Every number is the same one: nothing is as large as it looks.
        train, valid, test = (np.broadcast_to(np.zeros(2, np.int32), (n, 2)) for n in splits)
        features = {modality: np.broadcast_to(np.float32(1), (n_items, width)) for modality, width in widths.items()}
        super().__init__(name, n_users, n_items, train, valid, test, features)

    def __post_init__(self) -> None:
        """Sizes need no check."""


class Memory(NamedTuple):
    """Bytes of a program on each device, as XLA counts them: what it is given, and what it needs meanwhile."""

    arguments: int
    temporaries: int


class Programs(NamedTuple):
    """The programs of a training, lowered for shapes.

    Attributes:
        train, evaluate: of an epoch and of its evaluation.
        passes: of an epoch; with stale evaluation the last of them is no turn of the loop.
        turns: of its loop.
        best_bytes, neighbour_bytes: see `Plan`.
    """

    train: jax.stages.Lowered
    evaluate: jax.stages.Lowered
    passes: int
    turns: int
    best_bytes: int
    neighbour_bytes: int


class Plan(NamedTuple):
    """What a training takes of each device.

    Attributes:
        training, evaluation: memory of an epoch and of its evaluation.
        best_bytes: of the best epoch's parameters, which stay beside them.
        neighbour_bytes: about what there is before, while nearest items are found; 0 where the model has none.
        per_pass, per_epoch, per_evaluation: what each device sends: in a pass over a batch, besides in an epoch, and in
            an evaluation on validation and test.
    """

    training: Memory
    evaluation: Memory
    best_bytes: int
    neighbour_bytes: int
    per_pass: Traffic
    per_epoch: Traffic
    per_evaluation: Traffic


def make_plan(
    create: Callable[[], Recommender],
    data: Interactions,
    tx: optax.GradientTransformation,
    settings: FitSettings,
    mesh: Mesh,
) -> Plan:
    """What `fit` with the same arguments takes.

    Sizes that only the data tell are taken at most: repeated pairs count each time, and an item's neighbours by image
    are others than those by text. The last, partial batch is left out.

    Args:
        create: makes the model; called with shapes only.
        data: for its sizes; `Sizes` will do.
        tx, settings, mesh: as for `mgrad_jax.training.fit`.

    Raises:
        UserError: the model cannot be made, or not split over so many devices.
    """
    programs = lower(create, data, tx, settings, mesh)
    train, evaluation = (p.compile(_UNOPTIMISED) for p in (programs.train, programs.evaluate))
    text, of_evaluation = (ProgramText(p.as_text() or "", mesh.size) for p in (train, evaluation))
    total = text.traffic()
    # A loop of one turn is none.
    per_pass = text.of_loop(programs.turns) if programs.turns > 1 else total.shared_by(programs.passes)
    return Plan(
        _memory(train),
        _memory(evaluation),
        programs.best_bytes,
        programs.neighbour_bytes,
        per_pass,
        total.without(per_pass.times(programs.passes)),
        of_evaluation.traffic(),
    )


def lower(
    create: Callable[[], Recommender],
    data: Interactions,
    tx: optax.GradientTransformation,
    settings: FitSettings,
    mesh: Mesh,
) -> Programs:
    """The programs of `fit` with these arguments, for shapes; see `make_plan`."""
    with shapes_only(True):
        model = nnx.eval_shape(create)
    parts, layout = split_model(model), layout_of(model, mesh)
    state = _first_state(parts, tx)
    engine = Engine(parts, state, _inputs(data, settings, layout), lambda _: tx, settings, layout=layout)
    state = engine.placed(jax.eval_shape(lambda: state))
    train, evaluation = engine.lower((state, engine.own(parts, 0, {})), 1)
    best_bytes = sum(_bytes_of(x) for x in jax.tree.leaves(state.params))
    passes = len(engine.plan.schedule)
    turns = passes - int(engine.plan.keep_stale)
    neighbour_bytes = 0
    if model.compares_items:
        width = max(data.features[modality].shape[1] for modality in model.modalities)
        neighbour_bytes = knn_bytes(data.n_items, width, model.dtype, mesh.size)
    return Programs(train, evaluation, passes, turns, best_bytes, neighbour_bytes)


def _first_state(parts: SplitModel, tx: optax.GradientTransformation) -> TrainState:
    """Shapes of the first state, and the numbers in it: of them follows the order of passes."""
    shapes = jax.eval_shape(tx.init, parts.params)
    small = tx.init(jax.tree.map(lambda x: jnp.zeros((1,) * x.ndim, x.dtype), parts.params))
    opt_state = jax.tree.map(lambda shape, number: shape if shape.ndim else number, shapes, small)
    return TrainState(parts.params, opt_state, parts.epoch_state)


def _inputs(data: Interactions, settings: FitSettings, layout: Layout | None) -> Inputs:
    """Shapes of what `inputs_of` would make of the data, without the last, partial batch."""
    n_train = len(data.train)
    n_train -= n_train % settings.batch_size if n_train > settings.batch_size else 0
    history = UserHistory(_ids(data.n_users + 1), _ids(n_train), _ids(data.n_items), _MAX_DEGREE)
    train = TrainingData(_ids(n_train), _ids(n_train), history)
    eval_splits = [_eval_split(data, len(pairs), settings.ks, layout) for pairs in (data.valid, data.test)]
    return Inputs(train if layout is None else layout.place(train), eval_splits)


def _eval_split(data: Interactions, n_pairs: int, ks: Sequence[int], layout: Layout | None) -> EvalSplit:
    """Shapes of a split's evaluation, every pair of another user."""
    n_blocks, size = blocks_of(min(n_pairs, data.n_users), users_at_a_time(data.n_items))
    shared = n_blocks if layout is None else n_blocks + -n_blocks % layout.mesh.size
    where = None if layout is None else NamedSharding(layout.mesh, BLOCKS)

    def blocks(width: int) -> Any:
        return _ids(shared, width, sharding=where)

    def pairs(n: int) -> BlockedPairs:
        width = max(1, -(-n // n_blocks))
        return BlockedPairs(blocks(width), blocks(width))

    return EvalSplit(blocks(size), blocks(size), pairs(n_pairs), pairs(len(data.train)), tuple(ks), n_blocks)


def _ids(*shape: int, sharding: NamedSharding | None = None) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def _memory(program: jax.stages.Compiled) -> Memory:
    sizes: Any = program.memory_analysis()
    return Memory(int(sizes.argument_size_in_bytes), int(sizes.temp_size_in_bytes))


def _bytes_of(x: jax.ShapeDtypeStruct) -> int:
    """Of an array on each device."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return int(np.prod(shape) * x.dtype.itemsize)
