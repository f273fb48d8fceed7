"""DRAGON: DualGNN's convolutions side by side, and items smoothed over a frozen item graph."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.data import Interactions
from mgrad_jax.graph import knn_graph
from mgrad_jax.models.base import Constant, ModelConfig
from mgrad_jax.models.dualgnn import UserGraphConfig, UserGraphRecommender
from mgrad_jax.models.freedom import item_graph, smoothed
from mgrad_jax.models.hyper_parameters import MOST_LAYERS, hyper


@dataclasses.dataclass(frozen=True)
class DRAGONConfig(UserGraphConfig):
    """Hyper-parameters of DRAGON under the names of the reference code."""

    n_mm_layers: int = hyper(1, "propagation steps over the item graph", least=0, limit=MOST_LAYERS)
    knn_k: int = hyper(10, "nearest items in the item graph, itself included", least=1)
    mm_image_weight: float = hyper(0.1, "share of images in the item graph", least=0, most=1)


class DRAGON(UserGraphRecommender):
    """Dyadic relations and homogeneous graphs (Zhou et al., ECAI 2023).

    With z_m, S and h_u as in `UserGraphRecommender`, w the users' modality weights and M the kNN item graph (share
    mm_image_weight of images, the rest text),

        h0_u = [w_u,image z_image,u; w_u,text z_text,u],  h0_i = [z_image,i; z_text,i],  h_i = h0_i + M^n_mm_layers h0_i
        score(u, i) = <h_u, h_i>
        loss = mean -log2 sigmoid(score(u, i) - score(u, j))
             + reg_weight (mean P_image,u^2 + mean P_text,u^2 + mean w^2),

    the means of P over the batch's users, that of w over all.

    As in the reference code: the logarithm is to base 2; two steps over the user-item graph and a width of 64 a
    modality (`embedding_dim`) whatever `n_layers` and the embedding size are there; scores use the epoch's user graph.
    The reference trainable features, their projections and the items' weights never get a gradient and are left out.
    """

    name: ClassVar[str] = "dragon"
    paper: ClassVar[str] = (
        "Zhou, Zhou, Zhang, Shen: Enhancing Dyadic Relations with Homogeneous Graphs for Multimodal Recommendation, "
        "ECAI 2023"
    )
    config_class: ClassVar[type[ModelConfig]] = DRAGONConfig
    compares_items: ClassVar[bool] = True
    ignored_names: ClassVar[tuple[str, ...]] = (
        *UserGraphRecommender.ignored_names,
        "weight_i",
        "image_embedding.weight",
        "image_trs.weight",
        "image_trs.bias",
        "text_embedding.weight",
        "text_trs.weight",
        "text_trs.bias",
    )
    feature_graphs: ClassVar[tuple[str, ...]] = ("item_graph",)

    config: DRAGONConfig

    def __init__(self, data: Interactions, config: DRAGONConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        graphs = [knn_graph(getattr(self, path)[...], config.knn_k, dtype) for path in self.feature_paths]
        self.item_graph = Constant(item_graph(graphs, config.mm_image_weight))

    def _representations(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        users, items = self._convolved()
        users = (self.user_weights[...] * users).reshape(self.n_users, -1)
        items = items.reshape(self.n_items, -1)
        return users, items + smoothed(self.item_graph.get_value(), items, self.config.n_mm_layers)
