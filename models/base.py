"""The contract every recommender follows (docs/architecture.md, "Models")."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.data.features import rows_shown, zero_rows
from mgrad_jax.deprecation import renamed
from mgrad_jax.devices import drawn, loaded
from mgrad_jax.errors import UserError
from mgrad_jax.models.hyper_parameters import check, hyper

renamed(__name__, {"Frozen": "Constant", "Scalar": "TracedHyperParameter", "hold_features": "cast_features"})

# What `nnx.split` takes out of a model: variables by their paths.
Variables: TypeAlias = nnx.State[Any, Any]


class Constant(nnx.Variable[Any]):
    """Constant arrays and graphs: an argument of every compiled function, never closed over, never trained."""


class TracedHyperParameter(nnx.Variable[Array]):
    """A scalar hyper-parameter that is traced, so that one compiled program serves a whole grid of values."""


class EpochState(nnx.Variable[Any]):
    """What `Recommender.resample` redraws at the start of every epoch, such as a pruned graph."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters every model has; subclasses add theirs, each declared with `hyper`, under the names of the
    reference code.

    Types and ranges are checked however a configuration is made. A field declared `traced` becomes a
    `TracedHyperParameter` of the model under the same name.
    """

    embedding_dim: int = hyper(64, "width of the embeddings", least=1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))


class Recommender(nnx.Module):
    """A recommender over `n_users` users and `n_items` items whose score is a dot product of two vectors.

    Attributes:
        name: the name in the registry and on the command line.
        paper: citation of the model.
        config_class: its hyper-parameters.
        needs: features ("image", "text") it reads; without any of them it cannot be built.
        needs_all: whether it cannot be built without one of them either.
        compares_items: whether it looks for each item's `knn_k` nearest by the direction of their features, which a row
            of zeros does not have.
        uses_negatives: whether `loss` reads `batch.negatives`.
        published_names: our parameter path -> name in the reference state_dict; a path that ends in
            `.kernel` is stored transposed there.
        ignored_names: parameters of the reference code that never get a gradient and are not ported.
        penalties: parts of `loss` that penalise parameters and rank nothing.
        grid: values that the reference configuration searches, by name of the hyper-parameter, or "learning_rate".
        item_tables: paths of the tables that `embed` reads a row of for every item, be they items alone or users, then
            items; learned where they are an `nnx.Param`.
        features_in_scores: whether `embed` reads the variables of `feature_paths`, untrained.
        feature_graphs: paths of the item graphs that `embed` reads and that are made of the features once.
        stops_gradient: whether `loss` holds back gradients, so that its gradient is not that of its values.
        features_at: paths of the variables that `loss` reads features from, by "{modality}"; the `feature_paths`.
        tables_in_pass: how several devices share the tables while a pass reads them: by "columns", or by "rows" where
            every pass maps whole tables of features.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    needs: ClassVar[tuple[str, ...]] = ()
    needs_all: ClassVar[bool] = False
    compares_items: ClassVar[bool] = False
    uses_negatives: ClassVar[bool] = True
    published_names: ClassVar[Mapping[str, str]]
    ignored_names: ClassVar[tuple[str, ...]] = ()
    penalties: ClassVar[tuple[str, ...]] = ()
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    item_tables: ClassVar[tuple[str, ...]] = ()
    features_in_scores: ClassVar[bool] = False
    feature_graphs: ClassVar[tuple[str, ...]] = ()
    stops_gradient: ClassVar[bool] = False
    features_at: ClassVar[str] = "{modality}_features"
    tables_in_pass: ClassVar[Literal["columns", "rows"]] = "columns"

    def __init__(self, data: Interactions, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        del rngs  # the subclasses draw their parameters from it
        if (sentence := self.obstacle(data, config)) is not None:
            raise UserError(sentence)
        self.n_users = data.n_users
        self.n_items = data.n_items
        self.config = config
        self.dtype = dtype
        self.modalities = self.features_given(data)
        for field in dataclasses.fields(config):
            if field.metadata.get("traced"):
                setattr(self, field.name, TracedHyperParameter(jnp.asarray(getattr(config, field.name), dtype)))

    @classmethod
    def needs_in_words(cls) -> str:
        """The features it needs, as tables and messages name them: "image or text", where one of them suffices."""
        return (" and " if cls.needs_all else " or ").join(cls.needs) or "no features"

    @classmethod
    def obstacle(cls, data: Interactions, config: ModelConfig) -> str | None:
        """Why the model cannot be built on some data, one sentence with a remedy; None where nothing is in the way."""
        missing = [modality for modality in cls.needs if modality not in data.features]
        if missing and (cls.needs_all or len(missing) == len(cls.needs)):
            none = "none" if len(missing) == len(cls.needs) else f"no {missing[0]} features"
            files = (" and " if cls.needs_all else " or ").join(f"{modality}_feat.npy" for modality in missing)
            return (
                f"{data.source}: {cls.name} needs {cls.needs_in_words()} features and there are {none}; "
                f"add {files} (one row per item) or choose a model that needs no features."
            )
        if not cls.compares_items:
            return None
        if not 1 <= (k := getattr(config, "knn_k", 1)) <= data.n_items:
            return f"knn_k is {k}; it must be between 1 and the number of items, {data.n_items}."
        for modality in cls.needs:
            rows = zero_rows(data.features[modality]) if modality in data.features else ()
            if len(rows):
                are = "is" if len(rows) == 1 else "are"
                return (
                    f"{data.source}: {cls.name} compares items by their {modality} features, and "
                    f"{rows_shown(np.asarray(rows))} of {modality}_feat.npy {are} all zero; fill them, e.g. with "
                    "`mgrad-jax prepare DATASET NEW --fill-features` (the mean of the others)."
                )
        return None

    def feature(self, data: Interactions, *modalities: str) -> Float[Array, "items dim"]:
        """The raw features of one modality, or of several side by side, in the model's dtype."""
        return loaded([data.features[modality] for modality in modalities], self.dtype)

    def features_given(self, data: Interactions) -> list[str]:
        """The modalities the data have among those the model can use."""
        return [modality for modality in self.needs if modality in data.features]

    @staticmethod
    def training_pairs(data: Interactions) -> tuple[np.ndarray, np.ndarray, int, int]:
        """What graphs are made of: users and items of the training pairs, (n_train,) each, and how many there are."""
        return data.train[:, 0], data.train[:, 1], data.n_users, data.n_items

    def resample(self, key: Array) -> dict[str, Any]:
        """New values of the `EpochState` attributes for one epoch, by attribute name. Pure, with static shapes."""
        del key
        return {}

    @property
    def feature_paths(self) -> tuple[str, ...]:
        """Paths of the variables that `loss` reads items' features from; empty in a model that reads none."""
        return tuple(self.features_at.format(modality=modality) for modality in self.modalities)

    def expose_features(self) -> tuple[str, ...]:
        """Have `loss` and `embed` follow changes of the variables at `feature_paths`, and return these paths.

        To be called before their values are changed, as adversarial training and the study of perturbed features do;
        a model that computes something from its features ahead computes it in every pass from then on.
        """
        return self.feature_paths

    def open_feature_tables(self) -> tuple[str, ...]:
        """The former name of `expose_features`."""
        told = "Recommender.open_feature_tables is expose_features now; the old name goes with the next version."
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return self.expose_features()

    def feature_tables(self, features: Mapping[str, Float[Array, "items _"]]) -> dict[str, Float[Array, "items _"]]:
        """What the variables of `feature_paths` hold for these raw features, by path; pure.

        Args:
            features: (n_items, dim) of every modality the model was made with.
        """
        return {self.features_at.format(modality=modality): table for modality, table in features.items()}

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Training loss of a batch and its parts.

        Args:
            batch: users, positives and negatives, (B,) int32 each.
            key: drives dropout; every pass over a batch gets its own.
        """
        raise NotImplementedError

    def embed(self) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
        """Vectors of all users and items in evaluation mode; the score of a pair is their dot product."""
        raise NotImplementedError

    def scores(self, users: Int[Array, " n"] | Int[np.ndarray, " n"]) -> Float[Array, "n items"]:
        """Scores of all items for some users, (len(users), n_items)."""
        user_vectors, item_vectors = self.embed()
        return user_vectors[jnp.asarray(users)] @ item_vectors.T


def cast_features(model: Recommender, dtype: Any) -> None:
    """Hold the tables of features that the loss reads in another type.

    A row is widened to the model's type where it meets a parameter; a trained table, and the optimizer's moments of it,
    keep the narrow type.

    Raises:
        UserError: the model reads no features.
    """
    tables = model.expose_features()
    if not tables:
        raise UserError(f"{model.name} reads no features in training; leave the type of the features out.")
    for path in tables:
        variable: Any = functools.reduce(getattr, path.split("."), model)
        variable.set_value(variable.get_value().astype(dtype))


def map_names(**maps: str) -> dict[str, str]:
    """The `published_names` of kernels and biases, of the names of linear maps: ours -> in the reference code."""
    parts = {"kernel": "weight", "bias": "bias"}
    return {f"{ours}.{part}": f"{theirs}.{name}" for ours, theirs in maps.items() for part, name in parts.items()}


def xavier_uniform(key: Array, shape: tuple[int, int], dtype: Any) -> Float[Array, "rows cols"]:
    """U(-a, a) with a = sqrt(6 / (rows + columns)) (Glorot and Bengio 2010)."""
    bound = (6.0 / (shape[0] + shape[1])) ** 0.5
    return drawn(lambda key: jax.random.uniform(key, shape, dtype, -bound, bound), key, shape[1])


def xavier_normal(key: Array, shape: tuple[int, int], dtype: Any) -> Float[Array, "rows cols"]:
    """N(0, 2 / (rows + columns)) (Glorot and Bengio 2010)."""
    scale = jnp.asarray((2.0 / (shape[0] + shape[1])) ** 0.5, dtype)
    return drawn(lambda key: jax.random.normal(key, shape, dtype) * scale, key, shape[1])


def torch_uniform(fan_in: int) -> Any:
    """PyTorch's default for the weight and the bias of a linear map: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def linear(
    fan_in: int, fan_out: int, *, rngs: nnx.Rngs, dtype: Any, kernel_init: Any = None, bias_init: Any = None
) -> nnx.Linear:
    """`y = x @ kernel + bias` with PyTorch's default initialisation unless told otherwise; kernel (fan_in, fan_out)."""
    return nnx.Linear(
        fan_in,
        fan_out,
        kernel_init=kernel_init or torch_uniform(fan_in),
        bias_init=bias_init or torch_uniform(fan_in),
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )
