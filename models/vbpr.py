"""VBPR: matrix factorisation whose item vector is half learned, half projected from features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, ModelConfig, Recommender, linear, map_names, xavier_normal, xavier_uniform
from mgrad_jax.models.hyper_parameters import hyper


@dataclasses.dataclass(frozen=True)
class VBPRConfig(ModelConfig):
    """Hyper-parameters of VBPR under the names of the reference code."""

    reg_weight: float = hyper(1e-3, "weight of the norms of the batch's vectors", traced=True, least=0)


class VBPR(Recommender):
    """Item vectors of a free part and a linear map of the features (He and McAuley 2016, as in MMRec).

    With x_i = [text_i; image_i] (features as they are, frozen), for a batch of B users u, positives i and negatives j

        e_i = [Q_i; W x_i + c],   score(u, i) = <P_u, e_i>
        loss = mean -log(1e-10 + sigmoid(score(u, i) - score(u, j)))
             + reg_weight (|P_u|_F + |e_i|_F + |e_j|_F) / B.

    The norms are those of the gathered rows, repeats included, and not squared. Other than the 2016 paper there are no
    item, visual or global bias terms, and one user vector of twice the embedding size.
    """

    name: ClassVar[str] = "vbpr"
    paper: ClassVar[str] = "He, McAuley: VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback, AAAI 2016"
    config_class: ClassVar[type[ModelConfig]] = VBPRConfig
    needs: ClassVar[tuple[str, ...]] = ("image", "text")
    item_tables: ClassVar[tuple[str, ...]] = ("item_embedding",)
    features_in_scores: ClassVar[bool] = True
    penalties: ClassVar[tuple[str, ...]] = ("regulariser",)
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"reg_weight": (2.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)}
    published_names: ClassVar[Mapping[str, str]] = {
        "user_embedding": "u_embedding",
        "item_embedding": "i_embedding",
        **map_names(item_linear="item_linear"),
    }

    config: VBPRConfig
    reg_weight: nnx.Variable[Array]

    def __init__(self, data: Interactions, config: VBPRConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        dim = config.embedding_dim
        table = self.feature(data, *reversed(self.modalities))
        self.item_features = Constant(table)
        self.user_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_users, 2 * dim), dtype))
        self.item_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_items, dim), dtype))
        self.item_linear = linear(
            table.shape[1], dim, rngs=rngs, dtype=dtype, kernel_init=xavier_normal, bias_init=nnx.initializers.zeros
        )

    @property
    def feature_paths(self) -> tuple[str, ...]:
        """x, text and image side by side."""
        return ("item_features",)

    def feature_tables(self, features: Mapping[str, Float[Array, "items _"]]) -> dict[str, Float[Array, "items _"]]:
        """x of these features."""
        given = [features[modality] for modality in reversed(self.needs) if modality in features]
        return {"item_features": jnp.concatenate(given, axis=1)}

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Pairwise ranking plus the norms of the gathered vectors; `key` is not used."""
        del key
        users = self.user_embedding[...][batch.users]
        embeddings, features = self.item_embedding[...], self.item_features[...]
        positives, negatives = (
            self._item_vectors(embeddings[items], features[items]) for items in (batch.positives, batch.negatives)
        )
        ranking = losses.bpr_loss_clipped(jnp.sum(users * (positives - negatives), axis=-1))
        regulariser = self.reg_weight[...] * losses.embedding_norm(users, positives, negatives)
        return ranking + regulariser, {"bpr": ranking, "regulariser": regulariser}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """P and e, (n_users, 2 d) and (n_items, 2 d)."""
        return self.user_embedding[...], self._item_vectors(self.item_embedding[...], self.item_features[...])

    def _item_vectors(
        self, embeddings: Float[Array, "n dim"], features: Float[Array, "n raw"]
    ) -> Float[Array, "n both"]:
        return jnp.concatenate([embeddings, self.item_linear(features)], axis=-1)
