"""MMGCN: one graph convolution network a modality, with id residuals, averaged."""

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
from mgrad_jax.graph import SparseGraph, mean_bipartite, propagate
from mgrad_jax.models import losses
from mgrad_jax.models.base import Constant, ModelConfig, Recommender, linear, map_names, xavier_normal
from mgrad_jax.models.hyper_parameters import hyper

N_LAYERS = 3


@dataclasses.dataclass(frozen=True)
class MMGCNConfig(ModelConfig):
    """Hyper-parameters of MMGCN under the names of the reference code."""

    dim_latent: int = hyper(256, "width the image features are mapped to", least=1)
    reg_weight: float = hyper(1e-3, "weight of the squares of the random tables", traced=True, least=0)
    train_tables: bool = hyper(False, "learn the id and preference tables, which in the reference code stay random")
    table_seed: int = hyper(999, "seed of the id and preference tables", least=0, most=2**32 - 1)
    sum_modalities: bool = hyper(False, "add the modalities' vectors, as in the paper, and do not average them")


class _Layer(nnx.Module):
    """x -> lrelu(G [lrelu(A x C); lrelu(W x + c) + Y] + d), from `width` to `dim` columns."""

    def __init__(self, width: int, inner: int, dim: int, merge_init: Any, *, rngs: nnx.Rngs, dtype: Any) -> None:
        self.conv = nnx.Param(xavier_normal(rngs.params(), (width, inner), dtype))
        self.residual = linear(width, dim, rngs=rngs, dtype=dtype, kernel_init=xavier_normal)
        self.merge = linear(inner + dim, dim, rngs=rngs, dtype=dtype, kernel_init=merge_init)

    def __call__(
        self, x: Float[Array, "nodes width"], neighbours: Float[Array, "nodes width"], ids: Float[Array, "nodes dim"]
    ) -> Float[Array, "nodes dim"]:
        gathered = jax.nn.leaky_relu(neighbours @ self.conv[...])
        own = jax.nn.leaky_relu(self.residual(x)) + ids
        return jax.nn.leaky_relu(self.merge(jnp.concatenate([gathered, own], axis=1)))


class _Branch(nnx.Module):
    """One modality: users start at their preferences, items at their features, mapped to `latent` columns if given."""

    def __init__(
        self, features: Float[Array, "items raw"], dim: int, latent: int | None, *, rngs: nnx.Rngs, dtype: Any
    ) -> None:
        self.features = Constant(features)
        self.width = latent or features.shape[1]
        self.map = linear(features.shape[1], latent, rngs=rngs, dtype=dtype) if latent else None
        self.constant_features = True
        wide, narrow = (self.width, self.width, dim, xavier_normal), (dim, dim, dim, None)
        shapes = [wide] + [narrow] * (N_LAYERS - 1)
        self.layers = nnx.List([_Layer(*shape, rngs=rngs, dtype=dtype) for shape in shapes])

    def start(self) -> Float[Array, "nodes width"]:
        """Layer 0: rows of unit length, users first."""
        items = self.features[...]
        if self.map is not None:
            items = self.map(items)
        return losses.normalize(jnp.concatenate([self.preference[...], items]))

    def __call__(
        self, graph: SparseGraph, ids: Float[Array, "nodes dim"], nodes: Int[Array, " n"] | None = None
    ) -> Float[Array, "n dim"]:
        """x_m of some nodes, or of all: the last layer's dense products are made for those asked for only."""
        if self.constant_start:
            x, neighbours = self.first_input[...], self.first_neighbours[...]
        else:
            x = self.start()
            neighbours = propagate(graph, x)
        for layer in self.layers[:-1]:
            x = layer(x, neighbours, ids)
            neighbours = propagate(graph, x)
        if nodes is not None:
            x, neighbours, ids = x[nodes], neighbours[nodes], ids[nodes]
        return self.layers[-1](x, neighbours, ids)

    def use_preference(self, kind: type[nnx.Variable[Any]], table: Array, graph: SparseGraph) -> None:
        """Set the users' preferences; where nothing in layer 0 is learned, its products are made once, here."""
        self.preference = kind(table)
        self.constant_start = self.constant_features and kind is Constant and self.map is None
        if self.constant_start:
            start = self.start()
            self.first_input, self.first_neighbours = Constant(start), Constant(propagate(graph, start))

    def expose_features(self) -> None:
        """Make layer 0 of the features in every pass, so that it follows a change of them."""
        if self.constant_start:
            del self.first_input, self.first_neighbours
        self.constant_features = self.constant_start = False


class MMGCN(Recommender):
    """Modality-wise graph convolution with id residuals (Wei et al., ACM MM 2019, as in MMRec).

    With A = D^-1 R~ the user-item graph whose rows average the neighbours, Y an id table of random numbers, and for a
    modality m the preferences P_m of the users (random numbers too) and the features X_m of the items,

        x_m = rows of [P_m; f_m(X_m)] at unit length,   f_image a linear map to dim_latent columns, f_text = identity
        three times:  h = lrelu(A x_m C),  r = lrelu(W x_m + c) + Y,  x_m <- lrelu(G [h; r] + d)
        z = mean over modalities of x_m,   score(u, i) = <z_u, z_i>
        loss = mean -log sigmoid(score(u, i) - score(u, j))
             + reg_weight (mean (2 Y_u^2 + Y_i^2 + Y_j^2) / 2 + mean P_image^2).

    As in the reference code: Y and P are meant to be learned and are not, so they stay the noise they start as and the
    penalty is a constant (`train_tables=True` learns them); P_text has no penalty; there are three layers, whatever the
    reference `n_layers` says, which is left out; modalities are averaged where the paper adds them
    (`sum_modalities=True` adds).

    The reference code draws the tables with the run's seed and its checkpoints lack them. Here they are drawn from
    `table_seed`, so that parameters and configuration suffice to rebuild a model; seeds of a study share the tables
    unless `table_seed` varies too. `use_tables` puts in others. The loss is softplus(-difference), which stays finite
    where the reference log(sigmoid) overflows. Scores come from the current parameters, where the reference code
    scores with the representations of the last training step (`fit(..., evaluate="stale")`).
    """

    name: ClassVar[str] = "mmgcn"
    paper: ClassVar[str] = (
        "Wei, Wang, Nie, He, Hong, Chua: MMGCN: Multi-modal Graph Convolution Network for Personalized Recommendation "
        "of Micro-video, ACM MM 2019"
    )
    config_class: ClassVar[type[ModelConfig]] = MMGCNConfig
    needs: ClassVar[tuple[str, ...]] = ("image", "text")
    item_tables: ClassVar[tuple[str, ...]] = ("id_embedding",)
    features_in_scores: ClassVar[bool] = True
    features_at: ClassVar[str] = "{modality}.features"
    penalties: ClassVar[tuple[str, ...]] = ("table_squares",)
    tables_in_pass: ClassVar[Literal["columns", "rows"]] = "rows"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "learning_rate": (1e-4, 5e-4, 1e-3, 5e-3, 1e-2),
        "reg_weight": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    }
    published_names: ClassVar[Mapping[str, str]] = {
        "id_embedding": "id_embedding",
        **map_names(**{"image.map": "v_gcn.MLP"}),
        **{
            f"{ours}.{path}": f"{published}.{name}"
            for ours, published in {"image": "v_gcn", "text": "t_gcn"}.items()
            for path, name in {
                "preference": "preference",
                **{f"layers.{layer}.conv": f"conv_embed_{layer + 1}.weight" for layer in range(N_LAYERS)},
                **map_names(**{f"layers.{layer}.residual": f"linear_layer{layer + 1}" for layer in range(N_LAYERS)}),
                **map_names(**{f"layers.{layer}.merge": f"g_layer{layer + 1}" for layer in range(N_LAYERS)}),
            }.items()
        },
    }

    config: MMGCNConfig
    reg_weight: nnx.Variable[Array]
    image: _Branch  # where the data have images
    text: _Branch  # where the data have texts

    def __init__(self, data: Interactions, config: MMGCNConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        super().__init__(data, config, rngs=rngs, dtype=dtype)
        self.graph = Constant(mean_bipartite(*self.training_pairs(data), dtype=dtype))
        for modality in self.modalities:
            latent = config.dim_latent if modality == "image" else None
            table = self.feature(data, modality)
            setattr(self, modality, _Branch(table, config.embedding_dim, latent, rngs=rngs, dtype=dtype))
        keys = nnx.Rngs(config.table_seed)
        n_nodes = data.n_users + data.n_items
        ids = xavier_normal(keys.params(), (n_nodes, config.embedding_dim), dtype)
        shapes = {modality: (data.n_users, getattr(self, modality).width) for modality in self.modalities}
        self.use_tables(ids, **{name: xavier_normal(keys.params(), shape, dtype) for name, shape in shapes.items()})

    def use_tables(
        self,
        ids: Float[Array, "nodes dim"] | Float[np.ndarray, "nodes dim"],
        **preferences: Float[Array, "users _"] | Float[np.ndarray, "users _"],
    ) -> None:
        """Replace the id table and the users' preferences by modality: `use_tables(ids, image=..., text=...)`.

        Also to be called after `graph` has been replaced. Not for use inside compiled functions.
        """
        kind = nnx.Param if self.config.train_tables else Constant
        self.id_embedding = kind(jnp.asarray(ids, self.dtype))
        for modality in self.modalities:
            table = jnp.asarray(preferences[modality], self.dtype)
            getattr(self, modality).use_preference(kind, table, self.graph.get_value())

    def expose_features(self) -> tuple[str, ...]:
        """X of each modality; what was made of the texts ahead is made in every pass from then on."""
        for modality in self.modalities:
            getattr(self, modality).expose_features()
        return self.feature_paths

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Pairwise ranking and the penalty on the tables; `key` is not used."""
        del key
        nodes = jnp.concatenate([batch.users, self.n_users + batch.positives, self.n_users + batch.negatives])
        users, positives, negatives = jnp.split(self._fused(nodes), 3)
        difference = jnp.sum(users * (positives - negatives), axis=-1)
        ranking = losses.bpr_loss(difference)
        penalty = self.reg_weight[...] * self._table_squares(batch)
        return ranking + penalty, {"bpr": ranking, "table_squares": penalty}

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """z_u and z_i."""
        nodes = self._fused()
        return nodes[: self.n_users], nodes[self.n_users :]

    def _fused(self, nodes: Int[Array, " n"] | None = None) -> Float[Array, "n dim"]:
        """z of some nodes, or of all."""
        graph, ids = self.graph.get_value(), self.id_embedding[...]
        views = [getattr(self, modality)(graph, ids, nodes) for modality in self.modalities]
        total: Array = sum(views[1:], views[0])
        return total if self.config.sum_modalities else total / len(views)

    def _table_squares(self, batch: Batch) -> Float[Array, ""]:
        total = losses.mean_squares(self.id_embedding[...], self.n_users, batch)
        if "image" in self.modalities:
            total += jnp.mean(self.image.preference[...] ** 2)
        return total
