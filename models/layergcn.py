"""LayerGCN: graph layers re-weighted by their similarity to the layer-0 embeddings, on a pruned graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.data.interactions import distinct_pairs
from mgrad_jax.errors import UserError
from mgrad_jax.graph import SparseGraph, bipartite_edges, normalized_bipartite, propagate_bipartite, prune_edges
from mgrad_jax.graph.sparse import shapes_only
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, EpochState, ModelConfig, Recommender, xavier_uniform
from mgrad_jax.models.hyper_parameters import MOST_LAYERS, hyper

_EPS = 1e-8  # norms are at least this, as in the reference code


@dataclasses.dataclass(frozen=True)
class LayerGCNConfig(ModelConfig):
    """Hyper-parameters of LayerGCN under the names of the reference code.

    The reference grid leaves `dropout` and `reg_weight` open; the defaults are its first dropout (no pruning) and 1e-3.
    """

    n_layers: int = hyper(4, "propagation steps over the user-item graph", least=1, limit=MOST_LAYERS)
    dropout: float = hyper(0.0, "share of the edges pruned in each epoch", least=0, below=1)
    reg_weight: float = hyper(1e-3, "weight of the squared norms of the batch's embeddings", traced=True, least=0)


class LayerGCN(Recommender):
    """Every propagated row is scaled by its cosine with the row of layer 0 (Zhou, Lin, Liu, Miao 2023).

    With A the normalised graph (1e-7 added to the degrees) and x_0 = [E_u; E_i], row by row

        y_l = A x_{l-1},   x_l = cos(y_l, x_0) y_l,   z = sum_{l=1..L} x_l,   score(u, i) = <z_u, z_i>

    and for a batch of users u, positives i and negatives j

        loss = SUM -log sigmoid(score(u, i) - score(u, j))
             + reg_weight (|E_u|^2 + |E_i|^2 + |E_j|^2) / 2,

    over the gathered layer-0 rows, repeats included. Gradients flow through the cosine.

    As in the reference code: the loss is a sum over the batch, not a mean (it matters to SGD, Adagrad and clipping, not
    to Adam), and layer 0 is left out of z. With `dropout` p > 0 each epoch trains on int(E (1 - p)) of the E edges,
    drawn without replacement and normalised again: in the first, third, fifth ... epoch with weight 1 /
    sqrt(degree_u degree_i), in the others uniformly. Scores always come from the whole graph.
    """

    name: ClassVar[str] = "layergcn"
    paper: ClassVar[str] = (
        "Zhou, Lin, Liu, Miao: Layer-refined Graph Convolutional Networks for Recommendation, ICDE 2023"
    )
    config_class: ClassVar[type[ModelConfig]] = LayerGCNConfig
    item_tables: ClassVar[tuple[str, ...]] = ("item_embedding",)
    penalties: ClassVar[tuple[str, ...]] = ("regulariser",)
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dropout": (0.0, 0.1, 0.2), "reg_weight": (1e-2, 1e-3, 1e-4, 1e-5)}
    published_names: ClassVar[Mapping[str, str]] = {
        "user_embedding": "user_embeddings",
        "item_embedding": "item_embeddings",
    }

    config: LayerGCNConfig
    reg_weight: nnx.Variable[Array]

    def __init__(self, data: Interactions, config: LayerGCNConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        dim = config.embedding_dim
        self.user_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_users, dim), dtype))
        self.item_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_items, dim), dtype))
        pairs = data.train if shapes_only.value else distinct_pairs(data.train, data.n_items)
        sizes = (data.n_users, data.n_items)
        self.graph = Constant(normalized_bipartite(pairs[:, 0], pairs[:, 1], *sizes, dtype=dtype))
        if config.dropout > 0:
            self.n_keep = int(len(pairs) * (1.0 - config.dropout))
            if self.n_keep < 1:
                raise UserError(
                    f"dropout={config.dropout} leaves none of the {len(pairs)} training pairs; choose a smaller one."
                )
            edges = bipartite_edges(pairs[:, 0], pairs[:, 1], *sizes, dtype=dtype)
            self.edges = Constant(edges)
            self.pruned_graph = EpochState(prune_edges(rngs.params(), edges, self.n_keep))
            self.epoch = EpochState(jnp.zeros((), jnp.int32))

    def resample(self, key: Array) -> dict[str, Any]:
        """The epoch's pruned graph: weighted in epochs 0, 2, 4 ..., uniform in epochs 1, 3, 5 ..."""
        if self.config.dropout == 0:
            return {}
        epoch = self.epoch[...]
        pruned = prune_edges(key, self.edges.get_value(), self.n_keep, weighted=epoch % 2 == 0)
        return {"pruned_graph": pruned, "epoch": epoch + 1}

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Pairwise ranking, summed over the batch, plus the squared norms of the layer-0 rows; `key` is not used."""
        del key
        users, items = self._refine((self.pruned_graph if self.config.dropout > 0 else self.graph).get_value())
        user_rows = users[batch.users]
        difference = jnp.sum(user_rows * (items[batch.positives] - items[batch.negatives]), axis=-1)
        ranking = losses.bpr_loss_sum(difference)
        regulariser = self.reg_weight[...] * losses.l2_penalty(
            self.user_embedding[...][batch.users],
            self.item_embedding[...][batch.positives],
            self.item_embedding[...][batch.negatives],
        )
        return ranking + regulariser, {"bpr": ranking, "regulariser": regulariser}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """The sum of the refined layers on the whole graph, of users and of items."""
        return self._refine(self.graph.get_value())

    def _refine(self, graph: SparseGraph) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """Sum over layers 1..L of the propagated rows, each times its cosine with layer 0."""
        users, items = self.user_embedding[...], self.item_embedding[...]
        directions = losses.normalize(users, _EPS), losses.normalize(items, _EPS)
        user_sum, item_sum = jnp.zeros_like(users), jnp.zeros_like(items)
        for _ in range(self.config.n_layers):
            users, items = propagate_bipartite(graph, users, items)
            users, items = map(_times_cosine, (users, items), directions)
            user_sum, item_sum = user_sum + users, item_sum + items
        return user_sum, item_sum


def _times_cosine(x: Float[Array, "rows dim"], directions: Float[Array, "rows dim"]) -> Float[Array, "rows dim"]:
    """Each row times its cosine with its direction, which has norm 1; two sums a row and no normalised copy of x."""
    along = jnp.sum(x * directions, axis=-1, keepdims=True)
    return along / jnp.maximum(losses.safe_norm(x, axis=-1, keepdims=True), _EPS) * x
