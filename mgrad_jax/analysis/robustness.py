"""How a trained model answers to changes at inference, user by user: what is measured of one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from mgrad_jax.analysis.perturb import (
    FeatureChange,
    NoiseCase,
    ShareCase,
    TableNoise,
    choose,
    item_tables,
)
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import EvalSplit, by_user, make_eval_split, per_user_metrics, user_metrics_and_lists
from mgrad_jax.models import Recommender
from mgrad_jax.training.epoch import split_model
from mgrad_jax.training.run import LoadedRun


@dataclass(frozen=True)
class Response:
    """What one run's metrics become.

    Attributes:
        clean: each user's metrics without a change, `{"recall@5": (users,), ...}`; those `evaluate` gives, to the bit.
        values: the same at every place of the curve and draw, (places, draws, users); at place 0 the clean ones.
        references: (draws, users) of "zero table" and "noise only", by name and metric; empty for features.
        parts: means at every place and draw, (places, draws), of metrics that are no user's; empty for noise.
    """

    clean: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    references: dict[str, dict[str, np.ndarray]]
    parts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What is measured: metrics by name ("recall@5"), of which split, how many draws of which seed."""

    metrics: tuple[str, ...]
    split: Literal["valid", "test"] = "test"
    draws: int = 20
    seed: int = 0

    @property
    def ks(self) -> tuple[int, ...]:
        """Their cut-offs; `overlap@k` is told at each."""
        return tuple(sorted({int(name.partition("@")[2]) for name in self.metrics}))

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics, and the share of the clean list that stays at every cut-off."""
        return *self.metrics, *(f"overlap@{k}" for k in self.ks)

    def keys(self) -> Key[Array, " draws"]:
        """A key a draw: the same in every run."""
        return jax.vmap(partial(jax.random.fold_in, jax.random.key(self.seed)))(jnp.arange(self.draws))


def table_noise(
    run: LoadedRun, scales: Sequence[float], what: Measured, *, per: str, at: str, tables: Sequence[str] = ()
) -> Response:
    """Noise of several scales in a model's item tables.

    Args:
        run: from `load_run`.
        scales: ascending, the first 0.
        what: metrics and draws.
        per, at, tables: what the scale is in units of ("table", "row" or "none"), whether noise enters the "table" or
            the scored "vectors", and which tables, if not those the scores are made of.

    Raises:
        UserError: the model has no such table.
    """
    change = TableNoise(item_tables(run.model, tables) if at == "table" else (), per)
    ones = np.ones(what.draws)
    rows = [(1.0, scale) for scale in scales[1:]] + [(0.0, 1.0), (0.0, 0.0)]
    gains, sizes = (np.concatenate([row[i] * ones for row in rows]).astype(np.float32) for i in (0, 1))
    # Without table and noise all draws are the same: one is enough.
    keep = len(gains) - what.draws + 1
    keys = jnp.tile(what.keys(), len(rows))[:keep]
    inputs = _Inputs.of(run, what)
    found = _measure(change, run.model, inputs, {}, NoiseCase(gains[:keep], sizes[:keep], keys))[0]
    n_cases = (len(scales) - 1) * what.draws
    values = {name: _curve(inputs.clean[name], value[:n_cases], what.draws) for name, value in found.items()}
    references = {
        "zero table": {name: value[-1:] for name, value in found.items()},
        "noise only": {name: value[n_cases:-1] for name, value in found.items()},
    }
    return Response(inputs.clean, values, references, {})


def changed_features(
    run: LoadedRun,
    shares: Sequence[float],
    what: Measured,
    change: FeatureChange,
    other: Mapping[str, np.ndarray] | None = None,
    *,
    rebuild: bool = False,
) -> Response:
    """Other features of several shares of the items.

    Args:
        run: from `load_run`.
        shares: ascending, the first 0.
        what: metrics and draws.
        change: what the features become.
        other: features by modality for the kind "given".
        rebuild: make the item graphs anew from the changed features, one model a case.

    Raises:
        UserError: the model's scores read no features, or there is no graph to rebuild.
    """
    known = check_features(run, change, rebuild)
    change = dataclasses.replace(change, modalities=tuple(m for m in change.modalities if m in known))
    model, features = run.model, run.data.features
    given: dict[str, dict[str, Any]] = {"own": {m: jnp.asarray(features[m], model.dtype) for m in known}}
    given["other"] = {m: jnp.asarray(table, model.dtype) for m, table in (other or {}).items() if m in known}
    counts = np.repeat([round(share * run.data.n_items) for share in shares[1:]], what.draws).astype(np.int32)
    cases = ShareCase(counts, jnp.tile(what.keys(), len(shares) - 1))
    inputs = _Inputs.of(run, what)
    if rebuild:
        found, marks = _measure_rebuilt(change, run, inputs, given, cases)
    else:
        model = nnx.clone(model)  # the run's own stays as `evaluate` scores it
        model.expose_features()
        found, marks = _measure(change, model, inputs, given, cases)
    values = {name: _curve(inputs.clean[name], value, what.draws) for name, value in found.items()}
    return Response(inputs.clean, values, {}, _parts(inputs.clean, values, marks, what))


def check_features(run: LoadedRun, change: FeatureChange, rebuild: bool) -> list[str]:
    """The modalities a model reads; a `UserError` where its scores would not notice a change of features."""
    model = run.model
    if rebuild and not model.feature_graphs:
        raise UserError(f"{model.name} has no item graph made of features; leave --rebuild-graphs out.")
    if not rebuild and not model.features_in_scores:
        remedy = "add --rebuild-graphs, for its item graph is made of them" if model.feature_graphs else "use --noise"
        raise UserError(
            f"the scores of {model.name} read no features, so that a change of them does nothing; {remedy}."
        )
    known = [modality for modality in model.needs if modality in run.data.features]
    if not any(modality in known for modality in change.modalities):
        asked = " or ".join(change.modalities)
        raise UserError(f"{run.data.source} has no {asked} features for {model.name}; it has {', '.join(known)}.")
    return known


@dataclass(frozen=True)
class _Inputs:
    """What every case of a run is measured against."""

    eval_split: EvalSplit
    lists: Int[Array, "blocks block length"]  # the clean recommendations
    ks: tuple[int, ...]
    names: tuple[str, ...]
    clean: dict[str, np.ndarray]

    @classmethod
    def of(cls, run: LoadedRun, what: Measured) -> _Inputs:
        eval_split = make_eval_split(run.data, what.split, what.ks)
        # As `evaluate` makes them, so that no change is exactly what it reports.
        vectors = run.vectors()
        users, metrics = per_user_metrics(eval_split, *vectors)
        length = min(max(what.ks), run.data.n_items)
        lists = jax.jit(user_metrics_and_lists, static_argnums=3)(eval_split, *vectors, length)[1]
        clean = {name: metrics[name] for name in what.metrics}
        clean.update({f"overlap@{k}": np.ones(len(users), np.float32) for k in what.ks})
        return cls(eval_split, lists, what.ks, what.names, clean)


_Found = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def _measure(change: TableNoise | FeatureChange, model: Recommender, inputs: _Inputs, given: Any, cases: Any) -> _Found:
    """Metrics (cases, users) by name, and marks of the users and lists that a change of features reaches."""
    fixed = (inputs.ks, inputs.names)
    found, marks = jax.device_get(_cases(change, fixed, model, inputs.eval_split, inputs.lists, given, cases))
    return by_user(inputs.eval_split, found)[1], by_user(inputs.eval_split, marks)[1]


@partial(jax.jit, static_argnums=(0, 1))
def _cases(
    change: TableNoise | FeatureChange,
    fixed: tuple[tuple[int, ...], tuple[str, ...]],
    model: Recommender,
    eval_split: EvalSplit,
    lists: Int[Array, "blocks block length"],
    given: Any,
    cases: Any,
) -> tuple[dict[str, Float[Array, "cases blocks block"]], dict[str, Shaped[Array, "cases blocks block"]]]:
    """One case after the other: the memory is that of one draw's vectors."""

    def case(values: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        # A copy made in here: variables of the outer program cannot be changed in the loop's.
        users, items = change.embed(jax.tree.map(lambda x: x, model), given, values)
        found, new_lists = _metrics(fixed, eval_split, lists, users, items)
        if isinstance(values, NoiseCase):
            return found, {}
        return found, _marks(fixed[0], eval_split, choose(values, len(items))[0], new_lists)

    results: tuple[dict[str, Array], dict[str, Array]] = jax.lax.map(case, cases)
    return results


def _metrics(
    fixed: tuple[tuple[int, ...], tuple[str, ...]],
    eval_split: EvalSplit,
    lists: Int[Array, "blocks block length"],
    users: Float[Array, "users dim"],
    items: Float[Array, "items dim"],
) -> tuple[dict[str, Float[Array, "blocks block"]], Int[Array, "blocks block length"]]:
    """The metrics asked for, overlaps included, and the new lists."""
    ks, names = fixed
    metrics, new_lists = user_metrics_and_lists(eval_split, users, items, lists.shape[-1])
    for k in ks:
        stays = (lists[..., :k, None] == new_lists[..., None, :k]).any(axis=-1)
        metrics[f"overlap@{k}"] = jnp.mean(stays.astype(jnp.float32), axis=-1)
    return {name: metrics[name] for name in names}, new_lists


def _marks(
    ks: tuple[int, ...], eval_split: EvalSplit, chosen: Bool[Array, " items"], lists: Int[Array, "blocks block length"]
) -> dict[str, Shaped[Array, "blocks block"]]:
    """Whether a user has a changed positive, and the share of changed items in the user's lists."""
    rows, items = eval_split.positives
    blocks = jnp.arange(rows.shape[0])[:, None]
    reached = jnp.zeros(eval_split.users.shape, bool).at[blocks, rows].max(chosen[items], mode="drop")
    slots = chosen[lists]
    return {"reached": reached, **{f"changed items@{k}": jnp.mean(slots[..., :k], axis=-1) for k in ks}}


def _measure_rebuilt(change: FeatureChange, run: LoadedRun, inputs: _Inputs, given: Any, cases: ShareCase) -> _Found:
    """The same, with a new model a case, whose item graphs are made of the changed features."""
    trained = split_model(run.model)
    everything = []
    for number in range(len(cases.count)):
        case = ShareCase(cases.count[number], cases.key[number])
        features = jax.device_get(change.features(given, case))
        model = run.config.create_model(dataclasses.replace(run.data, features={**run.data.features, **features}))
        nnx.update(model, trained.params, trained.epoch_state)
        found, lists = _ranked((inputs.ks, inputs.names), inputs.eval_split, inputs.lists, *model.embed())
        marks = _marks(inputs.ks, inputs.eval_split, choose(case, run.data.n_items)[0], lists)
        everything.append(jax.device_get((found, marks)))
    found, marks = jax.tree.map(lambda *values: np.stack(values), *everything)
    return by_user(inputs.eval_split, found)[1], by_user(inputs.eval_split, marks)[1]


_ranked = jax.jit(_metrics, static_argnums=0)


def _curve(clean: np.ndarray, values: np.ndarray, draws: int) -> np.ndarray:
    """(places, draws, users) with the clean metrics at place 0."""
    rows = values.reshape(-1, draws, values.shape[-1])
    return np.concatenate([np.broadcast_to(clean, (1, draws, len(clean))), rows])


def _parts(
    clean: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], marks: Mapping[str, np.ndarray], what: Measured
) -> dict[str, np.ndarray]:
    """Metrics of the users whose positives changed and of the others, and the changed items' share of all slots.

    Means at every place and draw (places, draws); NaN where there is no such user.
    """
    reached = _curve(np.zeros(len(next(iter(clean.values()))), bool), marks["reached"], what.draws)
    parts = {}
    for name in what.metrics:
        for group, users in (("changed users", reached), ("other users", ~reached)):
            counts = users.sum(axis=-1)
            sums = np.where(users, values[name], 0.0).sum(axis=-1, dtype=np.float64)
            parts[f"{name} {group}"] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    for k in what.ks:
        name = f"changed items@{k}"
        slots = _curve(np.zeros(reached.shape[-1], np.float32), marks[name], what.draws)
        parts[name] = slots.mean(axis=-1, dtype=np.float64)
    return parts
