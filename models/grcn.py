"""GRCN: user-item edges weighed, or closed, by how well the modalities agree with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.devices import side_by_side
from mgrad_jax.graph import SparseGraph, edge_dot, edge_softmax, mean_bipartite, propagate, replace_values
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, ModelConfig, Recommender, linear, map_names, xavier_normal
from mgrad_jax.models.hyper_parameters import MOST_LAYERS, hyper

ID_STEPS = 2


@dataclasses.dataclass(frozen=True)
class GRCNConfig(ModelConfig):
    """Hyper-parameters of GRCN under the names of the reference code."""

    latent_embedding: int = hyper(64, "width of preferences and mapped features", least=1)
    n_layers: int = hyper(
        3, "routing steps of the preferences (read only with item_to_user_routing)", least=0, limit=MOST_LAYERS
    )
    reg_weight: float = hyper(1e-3, "weight of the squares of ids and preferences", traced=True, least=0)
    item_to_user_routing: bool = hyper(
        False, "route items' features into preferences, as the paper says and the code does not"
    )


class GRCN(Recommender):
    """Graph-refined convolution (Wei et al., ACM MM 2020, as in MMRec).

    Every training pair is two directed edges, c -> r, source and target. nrm gives rows unit length. For a modality m,

        x_m = nrm([P_m; lrelu(V_m X_m + b_m)])             preferences of the users, mapped features of the items
        a_m(c -> r) = softmax over the edges into r of <x_m,c, x_m,r>
        z_m = x_m + A_m x_m,   with (A_m)_rc = a_m(c -> r).

    With trained confidences K (a node by a modality) and ids E,

        w(c -> r) = max(0, max over m of a_m(c -> r) K_c,m),   y_0 = nrm(E),  y_1 = W y_0,  y_2 = W y_1
        z = [y_0 + y_1 + y_2; z_image; z_text],   score(u, i) = <z_u, z_i>
        loss = mean -log sigmoid(score(u, i) - score(u, j))
             + reg_weight (mean (2 E_u^2 + E_i^2 + E_j^2) / 2 + mean P_image^2 + mean P_image,u^2 + mean P_text,u^2),

    the first mean of P_image over the whole table, those marked u over the batch's users.

    As in the reference code: the n_layers routing steps send messages to the items only and read the users, so that
    they leave the preferences as they are; here the steps are passed over, unless `item_to_user_routing` has each of
    them do p_u <- nrm(p_u + sum of the user's items, weighed by the softmax of <p_u, x_i>), as in the paper. W is not
    normalised by degrees. An edge starts closed where all confidences of its source are negative, and the maximum
    passes its gradient to the larger modality only. The reference penalty on K is computed there but not added, so it
    is left out.

    The loss is softplus(-difference), which stays finite where the reference log(sigmoid) overflows. Scores come from
    the current parameters, where the reference code scores with the representations of the last training step
    (`fit(..., evaluate="stale")`).
    """

    name: ClassVar[str] = "grcn"
    paper: ClassVar[str] = (
        "Wei, Wang, Nie, He, Chua: Graph-Refined Convolutional Network for Multimedia Recommendation with Implicit "
        "Feedback, ACM MM 2020"
    )
    config_class: ClassVar[type[ModelConfig]] = GRCNConfig
    needs: ClassVar[tuple[str, ...]] = ("image", "text")
    item_tables: ClassVar[tuple[str, ...]] = ("id_embedding",)
    features_in_scores: ClassVar[bool] = True
    penalties: ClassVar[tuple[str, ...]] = ("squares",)
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "learning_rate": (1.0, 1e-1, 1e-2, 1e-3, 1e-4),
        "reg_weight": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    }
    published_names: ClassVar[Mapping[str, str]] = {
        "id_embedding": "id_gcn.id_embedding",
        "confidence": "model_specific_conf",
        "image_preference": "v_gcn.preference",
        "text_preference": "t_gcn.preference",
        **map_names(image_map="v_gcn.MLP", text_map="t_gcn.MLP"),
    }

    config: GRCNConfig
    reg_weight: nnx.Variable[Array]

    def __init__(self, data: Interactions, config: GRCNConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        # Only the structure counts: rows are targets, columns sources; the entries are weighed in every pass.
        self.graph = Constant(mean_bipartite(*self.training_pairs(data), dtype=dtype))
        n_nodes, width = data.n_users + data.n_items, config.latent_embedding
        self.id_embedding = nnx.Param(xavier_normal(rngs.params(), (n_nodes, config.embedding_dim), dtype))
        self.confidence = nnx.Param(xavier_normal(rngs.params(), (n_nodes, len(self.modalities)), dtype))
        for modality in self.modalities:
            table = self.feature(data, modality)
            preference = nnx.Param(xavier_normal(rngs.params(), (data.n_users, width), dtype))
            setattr(self, f"{modality}_features", Constant(table))
            setattr(self, f"{modality}_preference", preference)
            feature_map = linear(table.shape[1], width, rngs=rngs, dtype=dtype, kernel_init=xavier_normal)
            setattr(self, f"{modality}_map", feature_map)

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Pairwise ranking and the penalty on ids and preferences; `key` is not used."""
        del key
        users, items = self.embed()
        difference = jnp.sum(users[batch.users] * (items[batch.positives] - items[batch.negatives]), axis=-1)
        ranking = losses.bpr_loss(difference)
        penalty = self.reg_weight[...] * self._squares(batch)
        return ranking + penalty, {"bpr": ranking, "squares": penalty}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """[id part; image part; text part] of users and items."""
        graph = self.graph.get_value()
        attentions, views = [], []
        for modality in self.modalities:
            attention, view = self._modality_view(graph, modality)
            attentions.append(attention)
            views.append(view)
        weighted = replace_values(graph, self._edge_weights(graph, attentions))
        total = layer = losses.normalize(self.id_embedding[...])
        for _ in range(ID_STEPS):
            layer = propagate(weighted, layer)
            total = total + layer
        nodes = side_by_side(total, *views)
        return nodes[: self.n_users], nodes[self.n_users :]

    def _modality_view(
        self, graph: SparseGraph, modality: str
    ) -> tuple[Float[Array, " nnz"], Float[Array, "nodes latent"]]:
        """a_m of every entry of the graph, and z_m."""
        feature_map, table = getattr(self, f"{modality}_map"), getattr(self, f"{modality}_features")
        items = losses.normalize(jax.nn.leaky_relu(feature_map(table[...])))
        users = losses.normalize(getattr(self, f"{modality}_preference")[...])
        if self.config.item_to_user_routing:
            users = self._routed(graph, users, items)
        x = jnp.concatenate([users, items])
        attention = _attention(graph, x)
        return attention, x + propagate(replace_values(graph, attention), x)

    def _routed(
        self, graph: SparseGraph, users: Float[Array, "users latent"], items: Float[Array, "items latent"]
    ) -> Float[Array, "users latent"]:
        """Preferences drawn n_layers times towards the user's items that fit them best."""
        for _ in range(self.config.n_layers):
            x = jnp.concatenate([users, items])
            messages = propagate(replace_values(graph, _attention(graph, x)), x)
            users = losses.normalize(users + messages[: self.n_users])
        return users

    def _edge_weights(self, graph: SparseGraph, attentions: list[Float[Array, " nnz"]]) -> Float[Array, " nnz"]:
        """w of every entry: the larger of the modalities' attention times confidence of the source, cut off at 0."""
        confidence = self.confidence[...][graph.indices]
        weights = [attention * confidence[:, m] for m, attention in enumerate(attentions)]
        # Where, not maximum: a tie passes its gradient to one modality, not half to each.
        return jax.nn.relu(functools.reduce(lambda a, b: jnp.where(a >= b, a, b), weights))

    def _squares(self, batch: Batch) -> Float[Array, ""]:
        total = losses.mean_squares(self.id_embedding[...], self.n_users, batch)
        for modality in self.modalities:
            preference = getattr(self, f"{modality}_preference")[...]
            total += jnp.mean(preference[batch.users] ** 2)
            if modality == "image":
                total += jnp.mean(preference**2)
        return total


def _attention(graph: SparseGraph, x: Float[Array, "nodes dim"]) -> Float[Array, " nnz"]:
    """Softmax over the entries of every row of <x_row, x_column>."""
    return edge_softmax(graph, edge_dot(graph, x))
