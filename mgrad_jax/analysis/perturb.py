"""Changes of a trained model at inference: noise in its learned item tables, other features of some items.

A change makes the scored vectors of one case of it, inside a compiled program; how much is changed, and by which draw,
is an argument of that program, so that a whole curve takes one compilation.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mgrad_jax.errors import UserError
from mgrad_jax.models import Recommender

ADJUSTMENTS = ("swap", "mix", "noise", "mean", "given")
Vectors: TypeAlias = tuple[Float[Array, "users dim"], Float[Array, "items dim"]]


class NoiseCase(NamedTuple):
    """E' = gain E + scale sigma Z, with Z from the key."""

    gain: Any
    scale: Any
    key: Any


class ShareCase(NamedTuple):
    """How many items are changed, and the key that says which and how."""

    count: Any
    key: Any


@dataclass(frozen=True)
class TableNoise:
    """Gaussian noise in item tables, or in the scored item vectors.

    Attributes:
        tables: paths of the tables; none for the scored vectors.
        per: sigma is the root mean square of the whole "table", of each "row", or 1 ("none").
    """

    tables: tuple[str, ...]
    per: str = "table"

    def embed(self, model: Recommender, given: Any, case: NoiseCase) -> Vectors:
        """The scored vectors of one case; `given` is not used."""
        del given
        for path in self.tables:
            variable = variable_at(model, path)
            table = variable.get_value()
            users, items = jnp.split(table, [len(table) - model.n_items])
            variable.set_value(jnp.concatenate([users, self._noisy(items, path, case)]))
        user_vectors, item_vectors = model.embed()
        return (user_vectors, item_vectors) if self.tables else (user_vectors, self._noisy(item_vectors, "", case))

    def _noisy(self, table: Float[Array, "items dim"], name: str, case: NoiseCase) -> Float[Array, "items dim"]:
        # The name's checksum: another table gets other noise, the same one the same in every training.
        noise = jax.random.normal(jax.random.fold_in(case.key, zlib.crc32(name.encode())), table.shape, table.dtype)
        overall = jnp.sqrt(jnp.mean(table**2))
        row = jnp.sqrt(jnp.mean(table**2, axis=1, keepdims=True))
        sigma = {"table": overall, "row": row, "none": jnp.ones_like(overall)}[self.per]
        # Noise alone, without the table, always has the table's size.
        sigma = jnp.where(case.gain == 0, overall, sigma)
        noisy: Array = case.gain * table + case.scale * sigma * noise
        return noisy.astype(table.dtype)


@dataclass(frozen=True)
class FeatureChange:
    """Other features of some items.

    With S the chosen items, x their features, and pi a cyclic shift within S:

        swap: x_pi(i)    mix: (1 - t) x_i + t x_pi(i)    noise: x_i + s rms(columns) z_i
        mean: mean of all x    given: the row of features that are given

    Attributes:
        kind: one of `ADJUSTMENTS`.
        modalities: whose features are changed.
        share: t.
        scale: s.
    """

    kind: str
    modalities: tuple[str, ...]
    share: float = 0.5
    scale: float = 1.0

    def embed(self, model: Recommender, given: Mapping[str, Mapping[str, Array]], case: ShareCase) -> Vectors:
        """The scored vectors of one case; for `given` see `features`."""
        for path, table in model.feature_tables(self.features(given, case)).items():
            variable = variable_at(model, path)
            variable.set_value(table.astype(variable.get_value().dtype))
        return model.embed()

    def features(
        self, given: Mapping[str, Mapping[str, Array]], case: ShareCase
    ) -> dict[str, Float[Array, "items dim"]]:
        """Every modality's features as one case has them.

        Args:
            given: "own": the features (n_items, dim) by modality; "other": those of the kind "given".
            case: how many items are changed, and which.
        """
        features = dict(given["own"])
        n_items = len(next(iter(features.values())))
        chosen, partner = choose(case, n_items)
        for modality in self.modalities:
            x = features[modality]
            key = jax.random.fold_in(case.key, zlib.crc32(modality.encode()))
            other = self._other(x, partner, given.get("other", {}).get(modality), key)
            features[modality] = jnp.where(chosen[:, None], other, x)
        return features

    def _other(self, x: Array, partner: Array, other: Array | None, key: Array) -> Array:
        if self.kind == "swap":
            return x[partner]
        if self.kind == "mix":
            return (1 - self.share) * x + self.share * x[partner]
        if self.kind == "noise":
            return x + self.scale * jnp.sqrt(jnp.mean(x**2, axis=0, keepdims=True)) * jax.random.normal(
                key, x.shape, x.dtype
            )
        if self.kind == "mean":
            return jnp.broadcast_to(jnp.mean(x, axis=0), x.shape)
        assert other is not None
        return other


def choose(case: ShareCase, n_items: int) -> tuple[Bool[Array, " items"], Int[Array, " items"]]:
    """Which items are changed, and the item each takes its features from: itself where it is not changed."""
    order = jax.random.permutation(case.key, n_items)
    place = jnp.arange(n_items)
    is_chosen = place < case.count
    successor = jnp.where(is_chosen, order[jnp.where(place + 1 < case.count, place + 1, 0)], order)
    partner = jnp.zeros(n_items, order.dtype).at[order].set(successor)
    return jnp.zeros(n_items, bool).at[order].set(is_chosen), partner


def variable_at(model: Recommender, path: str) -> Any:
    """The variable of a model at a dotted path."""
    return functools.reduce(getattr, path.split("."), model)


def item_tables(model: Recommender, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """Paths of the learned item tables that get noise: those asked for, or those its scores are made of.

    Raises:
        UserError: there are none, or what is asked for is no table with a row per item.
    """
    sizes = (model.n_items, model.n_users + model.n_items)
    shapes = {
        ".".join(map(str, path)): jnp.shape(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    learned = [path for path, shape in shapes.items() if len(shape) == 2 and shape[0] in sizes]
    for path in asked:
        if path not in learned:
            raise UserError(
                f"{model.name} has no learned table '{path}' with a row per item; choose among {', '.join(learned)}."
            )
    found = tuple(asked) or tuple(path for path in model.item_tables if path in learned)
    if not found:
        raise UserError(
            f"{model.name} learns no table of items that its scores are made of; change its features with --adjust."
        )
    return found
