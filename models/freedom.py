"""FREEDOM: a frozen item graph from features and a user-item graph pruned anew every epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.errors import UserError
from mgrad_jax.graph import (
    SparseGraph,
    bipartite_edges,
    blend_graphs,
    knn_graph,
    lightgcn_mean,
    normalized_bipartite,
    propagate,
    prune_edges,
)
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, EpochState, ModelConfig, Recommender, linear, map_names, xavier_uniform
from mgrad_jax.models.hyper_parameters import MOST_LAYERS, hyper


@dataclasses.dataclass(frozen=True)
class FREEDOMConfig(ModelConfig):
    """Hyper-parameters of FREEDOM under the names of the reference code."""

    feat_embed_dim: int = hyper(0, "width of the projected features: embedding_dim, the only one that fits", least=0)
    n_ui_layers: int = hyper(2, "propagation steps over the user-item graph", least=0, limit=MOST_LAYERS)
    n_mm_layers: int = hyper(1, "propagation steps over the item graph", least=0, limit=MOST_LAYERS)
    knn_k: int = hyper(10, "nearest items in the item graph, itself included", least=1)
    mm_image_weight: float = hyper(0.1, "share of images in the item graph", least=0, most=1)
    dropout: float = hyper(0.8, "share of edges pruned in every epoch", least=0, below=1)
    reg_weight: float = hyper(1e-3, "weight of the ranking by projected features", traced=True, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feat_embed_dim not in (0, self.embedding_dim):
            raise UserError(
                f"feat_embed_dim is {self.feat_embed_dim} and embedding_dim {self.embedding_dim}; users are compared "
                "with projected features, so leave it out or set both to one value."
            )


class FREEDOM(Recommender):
    """Frozen item-item structure and degree-sensitive edge pruning (Zhou and Shen, ACM MM 2023).

    With M the kNN item graph (share mm_image_weight of images, the rest text), A~ the user-item graph pruned for the
    epoch (dropout of the edges, kept in proportion to 1 / sqrt(d_u d_i), then normalised by the kept degrees) and Z =
    LG(A~, [E_u; E_i]) the mean over layers 0..n_ui_layers,

        z_u = Z_u,   z_i = Z_i + M^n_mm_layers E_i,   m = T F (tables F are trained, starting at the raw features)
        b(x, y) = mean -log sigmoid(<z_u, x> - <z_u, y>)
        loss = b(z_i, z_j) + reg_weight sum over modalities b(m_i, m_j)
        score(u, i) = <z_u, z_i>, with the full graph in place of A~.
    """

    name: ClassVar[str] = "freedom"
    paper: ClassVar[str] = (
        "Zhou, Shen: A Tale of Two Graphs: Freezing and Denoising Graph Structures for Multimodal Recommendation, "
        "ACM MM 2023"
    )
    config_class: ClassVar[type[ModelConfig]] = FREEDOMConfig
    needs: ClassVar[tuple[str, ...]] = ("image", "text")
    compares_items: ClassVar[bool] = True
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dropout": (0.8, 0.9), "reg_weight": (0.0, 1e-5, 1e-4, 1e-3)}
    item_tables: ClassVar[tuple[str, ...]] = ("item_id_embedding",)
    features_at: ClassVar[str] = "{modality}_embedding"  # F, not the item graph that was made of the same features
    feature_graphs: ClassVar[tuple[str, ...]] = ("item_graph",)
    published_names: ClassVar[Mapping[str, str]] = {
        "user_embedding": "user_embedding.weight",
        "item_id_embedding": "item_id_embedding.weight",
        "image_embedding": "image_embedding.weight",
        "text_embedding": "text_embedding.weight",
        **map_names(image_trs="image_trs", text_trs="text_trs"),
    }

    config: FREEDOMConfig
    reg_weight: nnx.Variable[Array]

    def __init__(self, data: Interactions, config: FREEDOMConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        dim = config.embedding_dim
        self.user_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_users, dim), dtype))
        self.item_id_embedding = nnx.Param(xavier_uniform(rngs.params(), (data.n_items, dim), dtype))
        graphs = []
        for modality in self.modalities:
            table = self.feature(data, modality)
            setattr(self, f"{modality}_embedding", nnx.Param(table))
            setattr(self, f"{modality}_trs", linear(table.shape[1], dim, rngs=rngs, dtype=dtype))
            graphs.append(knn_graph(table, config.knn_k, dtype))
        self.item_graph = Constant(item_graph(graphs, config.mm_image_weight))
        self.graph = Constant(normalized_bipartite(*self.training_pairs(data), dtype=dtype))
        if config.dropout > 0:
            edges = bipartite_edges(*self.training_pairs(data), dtype=dtype)
            self.n_keep = int(edges.users.shape[0] * (1.0 - config.dropout))
            self.edges = Constant(edges)
            self.pruned_graph = EpochState(prune_edges(rngs.params(), edges, self.n_keep))

    def resample(self, key: Array) -> dict[str, Any]:
        """The epoch's pruned graph."""
        if self.config.dropout == 0:
            return {}
        return {"pruned_graph": prune_edges(key, self.edges.get_value(), self.n_keep)}

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Pairwise ranking by the propagated vectors and by the projected features; `key` is not used."""
        del key
        users, items = self._propagated(self.pruned_graph if self.config.dropout > 0 else self.graph)
        user_rows = users[batch.users]
        ranking = losses.bpr_loss(jnp.sum(user_rows * (items[batch.positives] - items[batch.negatives]), axis=-1))
        features = jnp.zeros((), self.dtype)
        for modality in self.modalities:
            table, projection = getattr(self, f"{modality}_embedding")[...], getattr(self, f"{modality}_trs")
            # Ranking sees differences only: one product instead of two, and the bias cancels.
            difference = (table[batch.positives] - table[batch.negatives]) @ projection.kernel[...]
            features += losses.bpr_loss(jnp.sum(user_rows * difference, axis=-1))
        weighted = self.reg_weight[...] * features
        return ranking + weighted, {"bpr": ranking, "feature_bpr": weighted}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """z_u and z_i on the full graph."""
        return self._propagated(self.graph)

    def _propagated(self, graph: nnx.Variable[Any]) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        item_ids = self.item_id_embedding[...]
        neighbours = smoothed(self.item_graph.get_value(), item_ids, self.config.n_mm_layers)
        users, items = lightgcn_mean(graph.get_value(), self.user_embedding[...], item_ids, self.config.n_ui_layers)
        return users, items + neighbours


def item_graph(graphs: Sequence[SparseGraph], image_share: float) -> SparseGraph:
    """M, of the graphs of nearest items by image and by text; where one is missing, the other."""
    shares = (image_share, 1.0 - image_share) if len(graphs) > 1 else (1.0,)
    return blend_graphs(list(zip(shares, graphs, strict=True)))


def smoothed(graph: SparseGraph, items: Float[Array, "items dim"], n_steps: int) -> Float[Array, "items dim"]:
    """M^n_steps of a table of items."""
    for _ in range(n_steps):
        items = propagate(graph, items)
    return items
