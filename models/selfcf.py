"""SelfCF: collaborative filtering without negatives, against dropped-out targets of the same encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.devices import by_rows, side_by_side
from mgrad_jax.dropout import dropout
from mgrad_jax.graph import SparseGraph, drop_entries, lightgcn_mean, normalized_bipartite, with_transpose
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, ModelConfig, Recommender, linear, map_names, xavier_uniform
from mgrad_jax.models.hyper_parameters import MOST_LAYERS, hyper


@dataclasses.dataclass(frozen=True)
class SelfCFConfig(ModelConfig):
    """Hyper-parameters of SelfCF under the names of the reference code.

    The reference grid leaves all three open; the defaults are 2 layers, its smallest dropout and 1e-3.
    """

    n_layers: int = hyper(2, "propagation steps over the user-item graph", least=0, limit=MOST_LAYERS)
    dropout: float = hyper(0.1, "share of a target vector's entries dropped", traced=True, least=0, below=1)
    reg_weight: float = hyper(1e-3, "weight of the squared norms of the batch's representations", traced=True, least=0)
    edge_dropout: bool = hyper(
        True, "drop edges in every training step, at a rate drawn from U(0, 1), as in the reference code"
    )


class SelfCF(Recommender):
    """The variant published as SELFCFED_LGN: LightGCN encoder, embedding dropout (Zhou, Sun, Liu, Zhang, Miao 2023).

    With A the normalised graph (1e-7 added to the degrees), LG the mean over layers 0..L, q a linear predictor and
    sg the stop-gradient, for a batch of pairs (u, i)

        h = LG(A', [E_u; E_i])  rows u and i,   u~ = drop(sg h_u),   i~ = drop(sg h_i)
        loss = - mean cos(q(h_u), i~) / 2 - mean cos(q(h_i), u~) / 2 + reg_weight (|h_u|^2 + |h_i|^2) / 2
        score(u, i) = <q(z_u), z_i> + <z_u, q(z_i)>,   z = LG(A, [E_u; E_i]).

    The squared norms are those of the *propagated* rows and are summed over the batch. `batch.negatives` are not
    read. `embed` gives [q(z_u); z_u] and [z_i; q(z_i)], whose dot product is the score.

    As in the reference code, A' is A with entries dropped anew in every pass: a rate r ~ U(0, 1), each stored entry
    (each direction of an edge by itself) kept with probability 1 - r and divided by 1 - r, one matrix for all layers.
    The paper describes no such dropout for this variant; `edge_dropout=False` trains on A.
    """

    name: ClassVar[str] = "selfcf"
    paper: ClassVar[str] = (
        "Zhou, Sun, Liu, Zhang, Miao: SelfCF: A Simple Framework for Self-supervised Collaborative Filtering, "
        "ACM Transactions on Recommender Systems 2023"
    )
    config_class: ClassVar[type[ModelConfig]] = SelfCFConfig
    item_tables: ClassVar[tuple[str, ...]] = ("item_embedding",)
    penalties: ClassVar[tuple[str, ...]] = ("regulariser",)
    uses_negatives: ClassVar[bool] = False
    stops_gradient: ClassVar[bool] = True
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "n_layers": (1, 2),
        "dropout": (0.1, 0.2, 0.5),
        "reg_weight": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0),
    }
    published_names: ClassVar[Mapping[str, str]] = {
        "user_embedding": "online_encoder.embedding_dict.user_emb",
        "item_embedding": "online_encoder.embedding_dict.item_emb",
        **map_names(predictor="predictor"),
    }

    config: SelfCFConfig
    dropout: nnx.Variable[Array]
    reg_weight: nnx.Variable[Array]

    def __init__(self, data: Interactions, config: SelfCFConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        dim = config.embedding_dim
        self.user_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_users, dim), dtype))
        self.item_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_items, dim), dtype))
        self.predictor = linear(dim, dim, rngs=rngs, dtype=dtype)
        graph = normalized_bipartite(*self.training_pairs(data), dtype=dtype)
        self.graph = Constant(with_transpose(graph) if config.edge_dropout else graph)

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Online rows towards dropped-out target rows, on a graph whose entries `key` drops."""
        graph_key, target_key = jax.random.split(key)
        return self._loss_on(self._training_graph(graph_key), batch, target_key)

    def embed(self) -> tuple[Float[Array, "users both"], Float[Array, "items both"]]:
        """[q(z_u); z_u] and [z_i; q(z_i)] on the whole graph."""
        users, items = self._encode(self.graph.get_value())
        return (
            side_by_side(by_rows(self.predictor, users), users),
            side_by_side(items, by_rows(self.predictor, items)),
        )

    def _training_graph(self, key: Array) -> SparseGraph:
        """The graph of one pass: entries dropped at a rate drawn from U(0, 1), unless `edge_dropout` is off."""
        graph: SparseGraph = self.graph.get_value()
        if not self.config.edge_dropout:
            return graph
        rate_key, entry_key = jax.random.split(key)
        return drop_entries(entry_key, graph, jax.random.uniform(rate_key, (), self.dtype))

    def _encode(self, graph: SparseGraph) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """LightGCN's mean over the layers, of users and of items."""
        return lightgcn_mean(graph, self.user_embedding[...], self.item_embedding[...], self.config.n_layers)

    def _loss_on(
        self, graph: SparseGraph, batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss on a given graph; `key` drives the targets' dropout, by row of the batch."""
        users, items = self._encode(graph)
        user_rows, item_rows = users[batch.users], items[batch.positives]
        user_key, item_key = jax.random.split(key)
        user_targets = dropout(user_key, jax.lax.stop_gradient(user_rows), self.dropout[...])
        item_targets = dropout(item_key, jax.lax.stop_gradient(item_rows), self.dropout[...])
        similarity = 0.5 * jnp.mean(losses.cosine(self.predictor(user_rows), item_targets)) + 0.5 * jnp.mean(
            losses.cosine(self.predictor(item_rows), user_targets)
        )
        regulariser = self.reg_weight[...] * losses.l2_penalty(user_rows, item_rows)
        return regulariser - similarity, {"similarity": -similarity, "regulariser": regulariser}
