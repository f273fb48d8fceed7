"""AMR: train on features as they are and on features perturbed against the model, for every model that reads any."""

from __future__ import annotations

import functools
import math
import types
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mgrad_jax import models
from mgrad_jax.data import Batch
from mgrad_jax.errors import UserError
from mgrad_jax.models import losses
from mgrad_jax.models.base import Recommender, TracedHyperParameter, Variables


class AdversarialRecommender(Recommender):
    """A recommender trained on perturbed features too (Tang et al. 2019); `adversarial` makes one of any model.

    Let L(theta, X) be the model's loss on a batch without its `penalties`, and X the items' features the loss reads.
    The perturbation that hurts most, to first order and with rows of norm epsilon, is

        Gamma = dL(theta, X) / dX,   delta_i = epsilon Gamma_i / |Gamma_i|, 0 where Gamma_i = 0
        loss = L(theta, X) + penalties + weight L(theta, X + delta),

    with delta held constant in the gradient by theta. It is taken anew in every pass, so that the second pass of Mirror
    Gradient meets the perturbation of the parameters it moved to. Both L share the pass's key, thus its dropout masks.
    An item the batch does not reach has no gradient and stays as it is.

    X is what the loss reads, in its units: VBPR's rows [text; image] are perturbed as one vector each; other models
    have a table a modality, and each of its rows gets a delta of norm epsilon. SLMRec's rows have unit length. FREEDOM
    and BM3 train their tables: delta is added to the current values. Item graphs made of the features stay as they are.

    Parameters, their names and the vectors for evaluation are those of the model, so that training can start at the
    parameters of a plain run, as in the reference code: VBPR to its best epoch, then adversarially from there.

    Other than in the reference code of AMR, the model and its penalties are this package's (users of twice the width in
    VBPR, losses as means), the features are not divided by their largest absolute value (epsilon is in their units),
    and the guard against division by zero is smaller: the reference one shortens delta where |Gamma_i| < 1e-6, which
    FREEDOM falls below by its `reg_weight`.

    Attributes:
        epsilon: norm of a perturbed row's change.
        weight: of the loss on perturbed features.
        tables: paths of the variables that hold the features.

    References:
        Tang, Du, He, Yuan, Tian and Chua, *Adversarial Training Towards Robust Multimedia Recommender System*, IEEE
        TKDE 2019, https://arxiv.org/abs/1809.07062.
    """

    stops_gradient: ClassVar[bool] = True

    epsilon: nnx.Variable[Array]
    weight: nnx.Variable[Array]
    tables: tuple[str, ...]

    def loss(self, batch: Batch, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The model's loss plus that on perturbed features, the part "adversarial"."""
        total, parts = super().loss(batch, key)
        graphdef, tables, rest = self._split()
        perturbed = jax.tree.map(jnp.add, tables, self.perturbation(batch, key))
        adversarial = self.weight[...] * nnx.merge(graphdef, perturbed, rest)._unpenalised(batch, key)
        return total + adversarial, {**parts, "adversarial": adversarial}

    def perturbation(self, batch: Batch, key: Array) -> Variables:
        """delta of every table, (n_items, dim) each, as a constant.

        Args:
            batch: users, positives and negatives, (B,) int32 each.
            key: drives dropout, as in `loss`.
        """
        graphdef, *states = self._split()
        # Stopped here and not at the result: nothing of the inner gradient is differentiated again.
        tables, rest = jax.lax.stop_gradient(states)
        gradient = jax.grad(lambda tables: nnx.merge(graphdef, tables, rest)._unpenalised(batch, key))(tables)
        # In the model's type, also where the tables are held in a narrower one, which would round a small delta away.
        delta: Variables = jax.tree.map(lambda g: self.epsilon[...] * losses.normalize(g.astype(self.dtype)), gradient)
        return delta

    def _unpenalised(self, batch: Batch, key: Array) -> Float[Array, ""]:
        """L, of the features the variables hold now."""
        _, parts = super().loss(batch, key)
        return sum((part for name, part in parts.items() if name not in self.penalties), jnp.zeros((), self.dtype))

    def _split(self) -> tuple[nnx.GraphDef[Self], Variables, Variables]:
        """The structure, the tables of features, and all other variables."""
        parts: tuple[Any, ...] = nnx.split(self, lambda path, _: ".".join(map(str, path)) in self.tables, ...)
        return parts[0], parts[1], parts[2]


def adversarial(model: Recommender, epsilon: float, weight: float) -> AdversarialRecommender:
    """A model that trains on perturbed features too; see `AdversarialRecommender` for the loss.

    Args:
        model: from `mgrad_jax.models.create`; it stays as it is.
        epsilon: norm of a perturbed row's change, in units of the features; the authors' 0.1, for features up to 1.
        weight: of the loss on perturbed features; the authors' is 1.

    Returns:
        A copy of the model, a subclass of its class under the same name, whose `epsilon` and `weight` are traced as its
        hyper-parameters are.

    Raises:
        UserError: a model whose loss reads no features or that is adversarial already, or a number below or at 0.

    >>> from mgrad_jax.data import demo_interactions
    >>> data = demo_interactions(n_users=60, n_items=40, n_groups=4)
    >>> model = adversarial(models.create("vbpr", data), epsilon=0.1, weight=1.0)
    >>> model.name, model.tables
    ('vbpr', ('item_features',))
    """
    for name, value in (("epsilon", epsilon), ("weight", weight)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"adversarial training has {name} {value}; it must be a positive number.")
    if isinstance(model, AdversarialRecommender):
        raise UserError(f"this {model.name} is trained adversarially already; give the plain model.")
    copy: Any = nnx.clone(model)
    tables = copy.expose_features()
    if not tables:
        able = ", ".join(name for name in models.names() if models.model_class(name).needs)
        raise UserError(
            f"{model.name} reads no features in training, so there is nothing to perturb; choose one of {able}, or "
            "leave adversarial training out."
        )
    object.__setattr__(copy, "__class__", _adversarial_class(type(model)))
    assert isinstance(copy, AdversarialRecommender)
    copy.tables = tables
    copy.epsilon = TracedHyperParameter(jnp.asarray(epsilon, model.dtype))
    copy.weight = TracedHyperParameter(jnp.asarray(weight, model.dtype))
    return copy


@functools.cache
def _adversarial_class(kind: type[Recommender]) -> type[AdversarialRecommender]:
    """One class for one model class: compiled programs tell models apart by it."""
    doc = f"{kind.__name__}, trained on perturbed features too; see `AdversarialRecommender`."
    body = {"__doc__": doc, "__module__": __name__}
    return types.new_class(
        f"Adversarial{kind.__name__}", (AdversarialRecommender, kind), exec_body=lambda ns: ns.update(body)
    )
