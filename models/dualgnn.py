"""DualGNN: one graph convolution a modality, and users smoothed over those who share most items with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.data.user_graph import build_user_graph, cache_directory
from mgrad_jax.devices import held_by_rows, turned_to_columns
from mgrad_jax.errors import UserError
from mgrad_jax.graph import UserGraph, mix_neighbours, normalized_bipartite, sample_user_graph, sum_of_layers
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, EpochState, ModelConfig, Recommender, linear, map_names, xavier_normal
from mgrad_jax.models.hyper_parameters import hyper

N_STEPS = 2
HIDDEN_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class UserGraphConfig(ModelConfig):
    """Hyper-parameters that DualGNN and DRAGON share (the reference width is always 64, `embedding_dim` here)."""

    user_k: int = hyper(40, "nearest users in the user graph, as in the reference code", least=1)
    reg_weight: float = hyper(1e-3, "weight of the squares of preferences and modality weights", traced=True, least=0)


class UserGraphRecommender(Recommender):
    """What DualGNN and DRAGON share: the convolutions of the modalities, the user graph, ranking and penalty.

    With A~ the normalised user-item graph (nothing added to the degrees) and nrm rows of unit length, for a modality m

        x_m = nrm([P_m; W2_m lrelu(W1_m X_m + b1_m) + b2_m]),   z_m = x_m + A~ x_m + A~^2 x_m   over [users; items].

    The user graph S joins each user with the `user_k` others who share the most training items, weighed by the softmax
    of the numbers shared. A user with fewer has the list filled up with repeats, drawn anew every epoch, of whatever
    the list holds by then; a user with none keeps the own vector:

        h_u = h0_u + sum_v S_uv h0_v.

    The subclasses say what h0_u and h_i are, and what is penalised.
    """

    needs: ClassVar[tuple[str, ...]] = ("image", "text")
    features_in_scores: ClassVar[bool] = True
    penalties: ClassVar[tuple[str, ...]] = ("squares",)
    tables_in_pass: ClassVar[Literal["columns", "rows"]] = "rows"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "learning_rate": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
        "reg_weight": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    }
    published_names: ClassVar[Mapping[str, str]] = {
        "user_weights": "weight_u",
        "image_preference": "v_gcn.preference",
        "text_preference": "t_gcn.preference",
        **map_names(image_hidden="v_gcn.MLP", image_map="v_gcn.MLP_1"),
        **map_names(text_hidden="t_gcn.MLP", text_map="t_gcn.MLP_1"),
    }
    ignored_names: ClassVar[tuple[str, ...]] = ("MLP_v.weight", "MLP_t.weight", "MLP_user.weight", "MLP_user.bias")

    config: UserGraphConfig
    reg_weight: nnx.Variable[Array]

    def __init__(
        self, data: Interactions, config: UserGraphConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32
    ) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        self.graph = Constant(normalized_bipartite(*self.training_pairs(data), eps=0.0, dtype=dtype))
        dim = config.embedding_dim
        for modality in self.modalities:
            table = self.feature(data, modality)
            preference = nnx.Param(xavier_normal(rngs.params(), (data.n_users, dim), dtype))
            setattr(self, f"{modality}_features", Constant(table))
            setattr(self, f"{modality}_preference", preference)
            setattr(self, f"{modality}_hidden", linear(table.shape[1], HIDDEN_FACTOR * dim, rngs=rngs, dtype=dtype))
            setattr(self, f"{modality}_map", linear(HIDDEN_FACTOR * dim, dim, rngs=rngs, dtype=dtype))
        self.user_weights = nnx.Param(modality_weights(rngs.params(), data.n_users, len(self.modalities), dtype))
        graph = build_user_graph(data, config.user_k, cache=cache_directory(data), write=False)
        self.user_graph = Constant(jax.tree.map(jnp.asarray, graph))
        self.user_sample = EpochState(sample_user_graph(rngs.params(), self.user_graph.get_value(), dtype))

    def use_user_graph(self, graph: UserGraph, key: Array) -> None:
        """Another user graph of the same shape, e.g. one read from a published file, and a first sample of it."""
        if graph.shared.shape != (self.n_users, self.config.user_k):
            raise UserError(
                f"the user graph has shape {graph.shared.shape} and the model needs ({self.n_users}, "
                f"{self.config.user_k}); give one of this dataset and this user_k."
            )
        self.user_graph.set_value(jax.tree.map(jnp.asarray, graph))
        self.user_sample.set_value(sample_user_graph(key, self.user_graph.get_value(), self.dtype))

    def resample(self, key: Array) -> dict[str, Any]:
        """The epoch's user graph, short lists filled up anew."""
        return {"user_sample": sample_user_graph(key, self.user_graph.get_value(), self.dtype)}

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Pairwise ranking to base 2 and the penalty; `key` is not used."""
        del key
        users, items = self._turned()
        # Only the batch's users meet their neighbours: work and memory follow the batch, not the number of users.
        user_rows = users[batch.users] + mix_neighbours(self.user_sample.get_value(), users, batch.users)
        difference = jnp.sum(user_rows * (items[batch.positives] - items[batch.negatives]), axis=-1)
        ranking = losses.bpr_loss_log2(difference)
        penalty = self.reg_weight[...] * self._squares(batch)
        return ranking + penalty, {"bpr": ranking, "squares": penalty}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """h_u, with this epoch's user graph, and h_i."""
        users, items = self._turned()
        return users + mix_neighbours(self.user_sample.get_value(), users), items

    def _representations(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """h0_u of all users and h_i of all items."""
        raise NotImplementedError

    def _turned(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """The same, on several devices by columns, of which rows are taken without any exchange."""
        return turned_to_columns(held_by_rows(self._representations()))

    def _squares(self, batch: Batch) -> Float[Array, ""]:
        """Mean squares of the batch's preferences, one table after another, and of all users' modality weights."""
        total = jnp.mean(self.user_weights[...] ** 2)
        for modality in self.modalities:
            total += jnp.mean(getattr(self, f"{modality}_preference")[...][batch.users] ** 2)
        return total

    def _convolved(self) -> tuple[Float[Array, "users modalities dim"], Float[Array, "items modalities dim"]]:
        """z of users and items, the modalities side by side: one propagation for all of them."""
        user_parts = [losses.normalize(getattr(self, f"{m}_preference")[...]) for m in self.modalities]
        item_parts = [losses.normalize(self._mapped(m)) for m in self.modalities]
        users, items = jnp.concatenate(user_parts, axis=1), jnp.concatenate(item_parts, axis=1)
        users, items = held_by_rows(sum_of_layers(self.graph.get_value(), users, items, N_STEPS))
        shape = len(self.modalities), self.config.embedding_dim
        return users.reshape(-1, *shape), items.reshape(-1, *shape)

    def _mapped(self, modality: str) -> Float[Array, "items dim"]:
        hidden, narrow = getattr(self, f"{modality}_hidden"), getattr(self, f"{modality}_map")
        mapped: Array = narrow(jax.nn.leaky_relu(hidden(getattr(self, f"{modality}_features")[...])))
        return mapped


def modality_weights(key: Array, rows: int, modalities: int, dtype: Any) -> Float[Array, "rows modalities 1"]:
    """A softmax over Xavier normal draws, taken once: near 1 / modalities each, and free from then on."""
    return jax.nn.softmax(xavier_normal(key, (rows, modalities), dtype), axis=1)[..., None]


@dataclasses.dataclass(frozen=True)
class DualGNNConfig(UserGraphConfig):
    """Hyper-parameters of DualGNN under the names of the reference code."""

    separate_modalities: bool = hyper(
        False, "weigh a user's own image and text vectors, as the paper says and the code does not"
    )


class DualGNN(UserGraphRecommender):
    """Dual graph neural network (Wang et al., IEEE Transactions on Multimedia 2021, as in MMRec).

    With z_m, S and h_u as in `UserGraphRecommender` and w the users' modality weights,

        h0_u = w_u,image (z_image + z_text)_u + w_u,text z_text,u, h_i = (z_image + z_text)_i, score(u, i) = <h_u, h_i>
        loss = mean -log2 sigmoid(score(u, i) - score(u, j))
             + reg_weight (mean P_image,u^2 + mean P_text,u^2 + mean w^2 + mean v^2),

    the means of P over the batch's users, those of w and of the items' weights v over all.

    As in the reference code: the text enters a user twice, since the reference code adds it to the image vector in
    place (`separate_modalities` gives w_u,image z_image,u + w_u,text z_text,u, as in the paper); the logarithm is to
    base 2; the items' weights v are penalised but used nowhere else; two steps and a width of 64 (`embedding_dim`; the
    layer before is four times as wide) whatever `n_layers` and the embedding size are there.

    Scores come from the current parameters, where the reference code scores with the representations of the last
    training step (`fit(..., evaluate="stale")`), and like there from the epoch's user graph.
    """

    name: ClassVar[str] = "dualgnn"
    paper: ClassVar[str] = (
        "Wang, Wei, Yin, Wu, Song, Nie: DualGNN: Dual Graph Neural Network for Multimedia Recommendation, "
        "IEEE Transactions on Multimedia 2021"
    )
    config_class: ClassVar[type[ModelConfig]] = DualGNNConfig
    published_names: ClassVar[Mapping[str, str]] = {**UserGraphRecommender.published_names, "item_weights": "weight_i"}

    config: DualGNNConfig

    def __init__(self, data: Interactions, config: DualGNNConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        self.item_weights = nnx.Param(modality_weights(rngs.params(), data.n_items, len(self.modalities), dtype))

    def _representations(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        users, items = self._convolved()
        if not self.config.separate_modalities:
            users = users.at[:, 0].set(jnp.sum(users, axis=1))
        return jnp.sum(self.user_weights[...] * users, axis=1), jnp.sum(items, axis=1)

    def _squares(self, batch: Batch) -> Float[Array, ""]:
        return super()._squares(batch) + jnp.mean(self.item_weights[...] ** 2)
