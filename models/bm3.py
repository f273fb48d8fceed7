"""BM3: bootstrapped multimodal recommendation without negatives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.devices import by_rows
from mgrad_jax.dropout import dropout
from mgrad_jax.graph import lightgcn_mean, normalized_bipartite
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, ModelConfig, Recommender, linear, map_names, xavier_normal, xavier_uniform
from mgrad_jax.models.hyper_parameters import MOST_LAYERS, hyper


@dataclasses.dataclass(frozen=True)
class BM3Config(ModelConfig):
    """Hyper-parameters of BM3 under the names of the reference code."""

    n_layers: int = hyper(1, "propagation steps over the user-item graph", least=0, limit=MOST_LAYERS)
    dropout: float = hyper(0.3, "share of a target vector's entries dropped", traced=True, least=0, below=1)
    reg_weight: float = hyper(0.1, "weight of the norms of all users' and items' vectors", traced=True, least=0)
    cl_weight: float = hyper(2.0, "weight of the alignment of features with ids", traced=True, least=0)


class BM3(Recommender):
    """An online predictor q towards dropped-out targets, with features aligned to ids (Zhou et al., WWW 2023).

    With A the normalised graph (1e-7 added to the degrees), Z = LG(A, [E_u; E_i]) the mean over layers 0..L, h_u its
    user rows, h_i its item rows + E_i, m = T F projected features (tables F are trained, starting at the raw features),
    x~ a dropped-out copy without gradient, and C(a, b) = 1 - mean cos(a, b) over the batch's pairs (u, i):

        loss = C(q(h_u), i~) + C(q(h_i), u~)
             + cl_weight sum over modalities [C(q(m)_i, i~) + C(q(m)_i, m~_i)]
             + reg_weight (|h_u|_F + |h_i|_F) / n_items
        score(u, i) = <q(h_u), q(h_i)>.

    The norms run over all users and items and are not squared; dropout masks belong to a user or item, so that its
    repeats in a batch share one. `batch.negatives` are not read.
    """

    name: ClassVar[str] = "bm3"
    paper: ClassVar[str] = (
        "Zhou, Zhou, Liu, Zeng, Miao, Wang, You, Jiang: Bootstrap Latent Representations for Multi-modal "
        "Recommendation, WWW 2023"
    )
    config_class: ClassVar[type[ModelConfig]] = BM3Config
    needs: ClassVar[tuple[str, ...]] = ("image", "text")
    item_tables: ClassVar[tuple[str, ...]] = ("item_id_embedding",)
    features_at: ClassVar[str] = "{modality}_embedding"  # F; its rows are trained
    penalties: ClassVar[tuple[str, ...]] = ("regulariser",)
    uses_negatives: ClassVar[bool] = False
    stops_gradient: ClassVar[bool] = True
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "n_layers": (1, 2),
        "dropout": (0.3, 0.5),
        "reg_weight": (0.1, 0.01),
    }
    published_names: ClassVar[Mapping[str, str]] = {
        "user_embedding": "user_embedding.weight",
        "item_id_embedding": "item_id_embedding.weight",
        "image_embedding": "image_embedding.weight",
        "text_embedding": "text_embedding.weight",
        **map_names(predictor="predictor", image_trs="image_trs", text_trs="text_trs"),
    }

    config: BM3Config
    reg_weight: nnx.Variable[Array]
    cl_weight: nnx.Variable[Array]
    dropout: nnx.Variable[Array]

    def __init__(self, data: Interactions, config: BM3Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        dim = config.embedding_dim
        projection = functools.partial(linear, rngs=rngs, dtype=dtype, kernel_init=xavier_normal)
        self.user_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_users, dim), dtype))
        self.item_id_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_items, dim), dtype))
        self.predictor = projection(dim, dim)
        for modality in self.modalities:
            table = self.feature(data, modality)
            setattr(self, f"{modality}_embedding", nnx.Param(table))
            setattr(self, f"{modality}_trs", projection(table.shape[1], dim))
        self.graph = Constant(normalized_bipartite(*self.training_pairs(data), dtype=dtype))

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Bootstrap terms of ids and features plus the norms; `key` draws the targets' dropout masks."""
        users, items = self.representations()
        keys = jax.random.split(key, 2 + len(self.modalities))
        user_rows, item_rows = users[batch.users], items[batch.positives]
        user_target = self._target(keys[0], user_rows, batch.users)
        item_target = self._target(keys[1], item_rows, batch.positives)
        ids = losses.cosine_alignment(self.predictor(user_rows), item_target)
        ids += losses.cosine_alignment(self.predictor(item_rows), user_target)
        features = jnp.zeros((), self.dtype)
        for modality, modality_key in zip(self.modalities, keys[2:], strict=True):
            table, projection = getattr(self, f"{modality}_embedding"), getattr(self, f"{modality}_trs")
            rows = projection(table[...][batch.positives])
            online = self.predictor(rows)
            target = self._target(modality_key, rows, batch.positives)
            features += losses.cosine_alignment(online, item_target) + losses.cosine_alignment(online, target)
        alignment = self.cl_weight[...] * features
        regulariser = self.reg_weight[...] * losses.embedding_norm(users, items)
        return ids + alignment + regulariser, {"ids": ids, "alignment": alignment, "regulariser": regulariser}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """The predictor's outputs for all users and items."""
        users, items = self.representations()
        return by_rows(self.predictor, users), by_rows(self.predictor, items)

    def representations(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """h_u and h_i, before the predictor."""
        ids = self.item_id_embedding[...]
        users, items = lightgcn_mean(self.graph.get_value(), self.user_embedding[...], ids, self.config.n_layers)
        return users, items + ids

    def _target(self, key: Array, rows: Float[Array, "batch dim"], ids: Int[Array, " batch"]) -> Array:
        """A dropped-out copy of some rows without gradient."""
        return dropout(key, jax.lax.stop_gradient(rows), self.dropout[...], ids)
