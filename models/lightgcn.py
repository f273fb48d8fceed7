"""LightGCN: linear propagation over the user-item graph and a mean over its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.graph import lightgcn_mean, normalized_bipartite
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, ModelConfig, Recommender, xavier_uniform
from mgrad_jax.models.hyper_parameters import MOST_LAYERS, hyper


@dataclasses.dataclass(frozen=True)
class LightGCNConfig(ModelConfig):
    """Hyper-parameters of LightGCN; the defaults are its paper's."""

    n_layers: int = hyper(3, "propagation steps over the user-item graph", least=0, limit=MOST_LAYERS)
    reg_weight: float = hyper(1e-4, "weight of the norms of the batch's embeddings", traced=True, least=0)
    original_loss: bool = hyper(False, "squared norms and an unclipped pairwise loss, as in the paper of LightGCN")


class LightGCN(Recommender):
    """Embeddings E of users and items, propagated without weights or activations (He et al. 2020).

    With A the symmetrically normalised graph of the training pairs (1e-7 added to the degrees) and E both tables
    stacked,

        Z = 1 / (L + 1) sum_{l=0..L} A^l E,     score(u, i) = <z_u, z_i>

    and for a batch of B users u, positives i and negatives j

        loss = mean -log(1e-10 + sigmoid(score(u, i) - score(u, j)))
             + reg_weight (|E_u|_F + |E_i|_F + |E_j|_F) / B.

    The norms are those of the gathered layer-0 rows, repeats included, and they are not squared: this is the loss
    of the MMRec collection. `original_loss=True` gives the paper's: mean softplus(-difference) + reg_weight (sum of
    the *squared* norms) / (2 B).
    """

    name: ClassVar[str] = "lightgcn"
    paper: ClassVar[str] = (
        "He, Deng, Wang, Li, Zhang, Wang: LightGCN: Simplifying and Powering Graph Convolution Network for "
        "Recommendation, SIGIR 2020"
    )
    config_class: ClassVar[type[ModelConfig]] = LightGCNConfig
    item_tables: ClassVar[tuple[str, ...]] = ("item_embedding",)
    penalties: ClassVar[tuple[str, ...]] = ("regulariser",)
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "n_layers": (1, 2, 3, 4),
        "reg_weight": (1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    }
    published_names: ClassVar[Mapping[str, str]] = {
        "user_embedding": "embedding_dict.user_emb",
        "item_embedding": "embedding_dict.item_emb",
    }

    config: LightGCNConfig
    reg_weight: nnx.Variable[Array]

    def __init__(self, data: Interactions, config: LightGCNConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        dim = config.embedding_dim
        self.user_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_users, dim), dtype))
        self.item_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_items, dim), dtype))
        self.graph = Constant(normalized_bipartite(*self.training_pairs(data), dtype=dtype))

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Pairwise ranking of the propagated rows plus the norms of the layer-0 rows; `key` is not used."""
        del key
        users, items = self.embed()
        user_rows = users[batch.users]
        difference = jnp.sum(user_rows * (items[batch.positives] - items[batch.negatives]), axis=-1)
        rows = (
            self.user_embedding[...][batch.users],
            self.item_embedding[...][batch.positives],
            self.item_embedding[...][batch.negatives],
        )
        if self.config.original_loss:
            ranking = losses.bpr_loss(difference)
            penalty = losses.l2_penalty(*rows) / batch.users.shape[0]
        else:
            ranking = losses.bpr_loss_clipped(difference)
            penalty = losses.embedding_norm(*rows)
        regulariser = self.reg_weight[...] * penalty
        return ranking + regulariser, {"bpr": ranking, "regulariser": regulariser}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """The mean over the layers, of users and of items."""
        ego = self.user_embedding[...], self.item_embedding[...]
        return lightgcn_mean(self.graph.get_value(), *ego, self.config.n_layers)
