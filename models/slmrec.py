"""SLMRec: in-batch contrast of fused representations, with a fine-to-coarse contrast between modalities."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.devices import by_rows
from mgrad_jax.graph import lightgcn_mean, normalized_bipartite
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, ModelConfig, Recommender, linear, map_names, xavier_uniform
from mgrad_jax.models.hyper_parameters import MOST_LAYERS, hyper


@dataclasses.dataclass(frozen=True)
class SLMRecConfig(ModelConfig):
    """Hyper-parameters of SLMRec under the names of the reference code, whose `recdim` is `embedding_dim` here."""

    embedding_dim: int = hyper(64, "width of the embeddings, of which two heads give half", least=2)
    layer_num: int = hyper(3, "propagation steps over the user-item graph", least=0, limit=MOST_LAYERS)
    temp: float = hyper(0.2, "temperature of the contrast between users and items", traced=True, above=0)
    ssl_temp: float = hyper(0.2, "temperature of the contrast between modalities", traced=True, above=0)
    ssl_alpha: float = hyper(0.1, "weight of the contrast between modalities", traced=True, least=0)
    sigmoid_scores: bool = hyper(
        False, "scores in (0, 1) as in the reference code; rankings go by the dot product all the same"
    )


class SLMRec(Recommender):
    """Three propagated views (id, image, text), fused for ranking and contrasted with each other (Tao et al. 2022).

    With A the normalised graph (1e-8 added to the degrees), X_v, X_t the features with rows of unit length, V and T
    linear maps to the embedding width, and LG the mean over layers 0..layer_num,

        G_id = LG([E_u; E_i]),  G_v = LG([E_u; V X_v]),  G_t = LG([E_u; T X_t]),
        z_u = F_u [G_id; G_v; G_t]_u,  z_i = F_i [G_id; G_v; G_t]_i,  score(u, i) = <z_u, z_i>.

    CE(S) is the mean over rows of logsumexp(S_r) - S_rr; nrm gives rows unit length. For a batch of pairs (u, i)
    the task "FAC" (fine and coarse) contrasts a = g_i(G_id,i) with b = g_v(G_v,i), and c = g_c2(g_c(a)) with t =
    g_t(G_t,i):

        loss = CE(nrm(z_u) nrm(z_i)^T / temp) + ssl_alpha (CE(a b^T / ssl_temp) + CE(c t^T / ssl_temp)).

    As in the reference code: the other positives of a batch are the negatives, so the loss depends on the batch size
    and `batch.negatives` are not read; the modality contrast is not normalised; the step for audio is passed over.

    None of these deviations changes the training loss: scores come from the current parameters, where the reference
    code scores with the representations of the last training step (`fit(..., evaluate="stale")`); they are dot
    products without the reference sigmoid, which orders the items alike but saturates to ties in float32
    (`sigmoid_scores` gives it in `scores`; evaluation and recommendation rank by the dot product all the same); the
    reference `reg`, which takes no part in its loss, and the head for audio, which never gets a gradient, are left
    out.

    The biases of `head_image` and `head_text` have gradient zero. The reference configuration gives Adam a weight decay
    of 1e-4, added to the gradient (`--weight-decay 1e-4`).
    """

    name: ClassVar[str] = "slmrec"
    paper: ClassVar[str] = (
        "Tao, Liu, Xia, Wang, Yang, Huang, Chua: Self-supervised Learning for Multimedia Recommendation, "
        "IEEE Transactions on Multimedia 2022"
    )
    config_class: ClassVar[type[ModelConfig]] = SLMRecConfig
    needs: ClassVar[tuple[str, ...]] = ("image", "text")
    needs_all: ClassVar[bool] = True
    uses_negatives: ClassVar[bool] = False
    tables_in_pass: ClassVar[Literal["columns", "rows"]] = "rows"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "learning_rate": (1e-4, 1e-3, 1e-2, 1e-1),
        "ssl_temp": (0.1, 0.2, 0.5, 1.0),
        "ssl_alpha": (0.01, 0.05, 0.1, 0.5, 1.0),
    }
    item_tables: ClassVar[tuple[str, ...]] = ("item_embedding",)
    features_in_scores: ClassVar[bool] = True
    features_at: ClassVar[str] = "{modality}"  # X_v and X_t, whose rows have unit length
    ignored_names: ClassVar[tuple[str, ...]] = ("g_a_iva.weight", "g_a_iva.bias")
    published_names: ClassVar[Mapping[str, str]] = {
        "user_embedding": "embedding_user.weight",
        "item_embedding": "embedding_item.weight",
        **map_names(
            image_map="v_dense",
            text_map="t_dense",
            fuse_users="embedding_user_after_GCN",
            fuse_items="embedding_item_after_GCN",
            head_id="g_i_iv",
            head_image="g_v_iv",
            head_coarse="g_iv_iva",
            head_coarse_narrow="g_iva_ivat",
            head_text="g_t_ivat",
        ),
    }

    config: SLMRecConfig
    temp: nnx.Variable[Array]
    ssl_temp: nnx.Variable[Array]
    ssl_alpha: nnx.Variable[Array]

    def __init__(self, data: Interactions, config: SLMRecConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        self.image = Constant(losses.normalize(self.feature(data, "image")))
        self.text = Constant(losses.normalize(self.feature(data, "text")))
        self.graph = Constant(normalized_bipartite(*self.training_pairs(data), eps=1e-8, dtype=dtype))
        dim = config.embedding_dim
        self.user_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_users, dim), dtype))
        self.item_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_items, dim), dtype))

        def dense(fan_in: int, fan_out: int) -> nnx.Linear:
            return linear(fan_in, fan_out, rngs=rngs, dtype=dtype, kernel_init=xavier_uniform)

        self.image_map = dense(self.image[...].shape[1], dim)
        self.text_map = dense(self.text[...].shape[1], dim)
        self.fuse_users = dense(3 * dim, dim)
        self.fuse_items = dense(3 * dim, dim)
        self.head_id = dense(dim, dim)
        self.head_image = dense(dim, dim)
        self.head_coarse = dense(dim, dim)
        self.head_coarse_narrow = dense(dim, dim // 2)
        self.head_text = dense(dim, dim // 2)

    def feature_tables(self, features: Mapping[str, Float[Array, "items _"]]) -> dict[str, Float[Array, "items _"]]:
        """X_v and X_t of these features."""
        return {modality: losses.normalize(table) for modality, table in features.items()}

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Contrast of users with the batch's items, and of the items' modalities; `key` is not used."""
        del key
        user_views, item_views = self._views()
        item_rows = item_views[batch.positives]
        users = losses.normalize(self.fuse_users(user_views[batch.users]))
        items = losses.normalize(self.fuse_items(item_rows))
        ranking = losses.info_nce(users @ items.T / self.temp[...])
        contrast = self.ssl_alpha[...] * self._modality_contrast(item_rows)
        return ranking + contrast, {"ranking": ranking, "modality_contrast": contrast}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """The fused representations, of users and of items."""
        user_views, item_views = self._views()
        return by_rows(self.fuse_users, user_views), by_rows(self.fuse_items, item_views)

    def scores(self, users: Int[Array, " n"] | Int[np.ndarray, " n"]) -> Float[Array, "n items"]:
        """Scores of all items for some users, (len(users), n_items); their sigmoid with `sigmoid_scores`."""
        products = super().scores(users)
        return jax.nn.sigmoid(products) if self.config.sigmoid_scores else products

    def _views(self) -> tuple[Float[Array, "users views"], Float[Array, "items views"]]:
        """[G_id; G_v; G_t] side by side: the three propagations run as one, three times as wide."""
        users = jnp.tile(self.user_embedding[...], (1, 3))
        features = by_rows(self.image_map, self.image[...]), by_rows(self.text_map, self.text[...])
        items = jnp.concatenate([self.item_embedding[...], *features], axis=1)
        return lightgcn_mean(self.graph.get_value(), users, items, self.config.layer_num)

    def _modality_contrast(self, item_rows: Float[Array, "batch views"]) -> Float[Array, ""]:
        """CE(a b^T / ssl_temp) + CE(c t^T / ssl_temp): id with image (fine), both with text (coarse)."""
        id_rows, image_rows, text_rows = jnp.split(item_rows, 3, axis=1)
        fine = self.head_id(id_rows)
        coarse = self.head_coarse_narrow(self.head_coarse(fine))
        id_with_image = losses.info_nce(fine @ self.head_image(image_rows).T / self.ssl_temp[...])
        coarse_with_text = losses.info_nce(coarse @ self.head_text(text_rows).T / self.ssl_temp[...])
        return id_with_image + coarse_with_text
