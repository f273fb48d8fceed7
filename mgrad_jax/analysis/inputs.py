r"""How much a trained model's loss answers to its inputs: Lemma 3.1 and Eq. 8 on real runs.

For one example whose first layer is :math:`h = W x + b`,

.. math::
    \lVert \nabla_x L \rVert^2\, (1 + \lVert x \rVert^2) / \lVert W \rVert^2 \le \lVert \nabla_\theta L \rVert^2

with the spectral norm of W. It says nothing of the mean of a batch, in which the parameters' gradients may cancel and
the inputs' do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from mgrad_jax.analysis.perturb import variable_at
from mgrad_jax.analysis.theory import norm
from mgrad_jax.data import Batch
from mgrad_jax.data.features import MODALITIES
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import EvalSplit, full_sort_metrics
from mgrad_jax.models import Recommender, Variables


class TableNumbers(NamedTuple):
    """One table of inputs at some parameters.

    Attributes:
        gradient: |dL/dX|, Frobenius.
        sensitivity: mean over items of |x_i| |d(B L)/dx_i|, with B the size of the batch: what a relative change does,
            unmoved where X is multiplied by a number and W divided by it.
        constant: mean over items of (1 + |x_i|^2) / |W|^2; None where no layer reads the table alone.
    """

    gradient: float
    sensitivity: float
    constant: float | None


@dataclass(frozen=True)
class InputNumbers:
    """A model's inputs at some parameters.

    Attributes:
        loss: of the batch.
        gradient: |dL/dtheta|.
        tables: the numbers of every table, by path.
        holding: for how many of the single examples the lemma's inequality holds, for every table with a layer.
        examples: how many there were.
    """

    loss: float
    gradient: float
    tables: Mapping[str, TableNumbers]
    holding: Mapping[str, int]
    examples: int


def open_inputs(model: Recommender) -> tuple[Recommender, tuple[str, ...]]:
    """A copy whose loss reads the features from variables, and their paths.

    Raises:
        UserError: the model reads no features.
    """
    copy = nnx.clone(model)
    tables = copy.expose_features()
    if not tables:
        raise UserError(f"{model.name} reads no features in training, so it has no inputs to measure; leave it out.")
    return copy, tables


def first_layer(model: Recommender, table: str) -> str | None:
    """Path of the matrix that multiplies the rows of a table; None where there is none, or several.

    That is a kernel as high as the rows are wide, of the table's own modality where there are several. What propagates
    a row before its first layer, as the texts of MMGCN, has none.
    """
    width = jnp.shape(variable_at(model, table).get_value())[1]
    kernels = {
        ".".join(map(str, path)): jnp.shape(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[-1] == "kernel" and "layers" not in path
    }
    fitting = [path for path, shape in kernels.items() if shape[0] == width]
    modality = table.split(".")[0].split("_")[0]
    if modality in MODALITIES:
        fitting = [path for path in fitting if path.startswith(modality)]
    return fitting[0] if len(fitting) == 1 else None


def measure_inputs(
    model: Recommender, tables: tuple[str, ...], batch: Batch, key: Array, examples: int = 0
) -> InputNumbers:
    """The numbers of a model.

    Args:
        model: from `open_inputs`, with those tables.
        tables: paths of its tables.
        batch: what the loss is taken of.
        key: of its dropout.
        examples: of how many of the batch's examples the inequality is tested, one at a time.
    """
    loss, by_theta, by_inputs = _gradients(tables, model, batch, key)
    size = len(batch.users)
    numbers = {}
    for path, gradient in by_inputs.items():
        rows = jnp.asarray(variable_at(model, path).get_value(), gradient.dtype)
        constants = _constants(model, path)
        numbers[path] = TableNumbers(
            float(norm(gradient)),
            float(jnp.mean(jnp.linalg.norm(rows, axis=1) * size * jnp.linalg.norm(gradient, axis=1))),
            None if constants is None else float(jnp.mean(constants)),
        )
    singles = jax.tree.map(lambda x: x[:examples, None], batch)
    holding = {} if examples == 0 else jax.device_get(_holding(tables, model, singles, key))
    with_layer = {path: int(holding[path].sum()) for path in holding if numbers[path].constant is not None}
    return InputNumbers(float(loss), float(norm(by_theta)), numbers, with_layer, min(examples, size))


@partial(jax.jit, static_argnums=0)
def _gradients(
    tables: tuple[str, ...], model: Recommender, batch: Batch, key: Array
) -> tuple[Float[Array, ""], Variables, dict[str, Float[Array, "_ _"]]]:
    """The loss and its gradients by the parameters and by every table."""

    def by(chosen: Any) -> tuple[Float[Array, ""], Variables]:
        parts: tuple[Any, ...] = nnx.split(model, chosen, ...)
        graphdef, variables, rest = parts
        return jax.value_and_grad(lambda x: nnx.merge(graphdef, x, rest).loss(batch, key)[0])(variables)

    loss, by_theta = by(nnx.Param)
    _, by_inputs = by(lambda path, _: ".".join(map(str, path)) in tables)
    flat = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(by_inputs)}
    return loss, by_theta, {path: flat[path] for path in tables}


def _constants(model: Recommender, table: str) -> Float[Array, " items"] | None:
    """(1 + |x_i|^2) / |W|^2 of every row."""
    if (path := first_layer(model, table)) is None:
        return None
    kernel = variable_at(model, path).get_value()
    rows = jnp.asarray(variable_at(model, table).get_value(), kernel.dtype)
    return lemma_constant(rows, kernel)


def lemma_constant(rows: Float[Array, "n width"], kernel: Float[Array, "width dim"]) -> Float[Array, " n"]:
    """(1 + |x|^2) / |W|^2 of every row x, with the spectral norm of W."""
    spectral: Array = jnp.linalg.norm(kernel, ord=2)
    return (1 + jnp.sum(rows**2, axis=1)) / spectral**2


@partial(jax.jit, static_argnums=0)
def _holding(
    tables: tuple[str, ...], model: Recommender, singles: Batch, key: Array
) -> dict[str, Bool[Array, " examples"]]:
    """Whether the inequality holds for single examples, by table: for every row that an example reads."""
    constants = {path: _constants(model, path) for path in tables}

    def example(single: Batch) -> dict[str, Array]:
        _, by_theta, by_inputs = _gradients(tables, model, single, key)
        right = norm(by_theta) ** 2
        found = {}
        for path, factor in constants.items():
            if factor is not None:
                left = jnp.sum(by_inputs[path] ** 2, axis=1) * factor
                found[path] = jnp.all(left <= right * (1 + 1e-5))
        return found

    holding: dict[str, Array] = jax.lax.map(example, singles)
    return holding


def worst_case_metrics(
    model: Recommender, tables: tuple[str, ...], batch: Batch, key: Array, sizes: Sequence[float], eval_split: EvalSplit
) -> list[dict[str, float]]:
    """Metrics after every row of the inputs moved by a share of its length to where the loss rises fastest.

    Args:
        model, tables: from `open_inputs`, of a model whose scores read its features.
        batch, key: of the loss whose gradient says where to, as AMR trains against.
        sizes: relative sizes of the change.
        eval_split: the split and the cut-offs.
    """
    _, _, gradients = _gradients(tables, model, batch, key)
    return [
        {name: float(value) for name, value in jax.device_get(_after(model, gradients, eval_split, size)).items()}
        for size in sizes
    ]


@jax.jit
def _after(
    model: Recommender, gradients: Mapping[str, Float[Array, "_ _"]], eval_split: EvalSplit, size: Float[Array, ""]
) -> dict[str, Float[Array, ""]]:
    copy = jax.tree.map(lambda x: x, model)  # variables of the outer program cannot be changed in here
    for path, gradient in gradients.items():
        variable = variable_at(copy, path)
        rows = variable.get_value()
        length = jnp.linalg.norm(gradient, axis=1, keepdims=True)
        unit = jnp.where(length > 0, gradient / jnp.where(length > 0, length, 1.0), 0.0)
        moved = rows + size * jnp.linalg.norm(rows, axis=1, keepdims=True) * unit
        variable.set_value(moved.astype(rows.dtype))
    return full_sort_metrics(eval_split, *copy.embed())


def at_loss(course: Sequence[tuple[float, Mapping[str, float]]], loss: float) -> dict[str, float] | None:
    """A run's numbers where its loss first comes down to a value, between the two places around it.

    Args:
        course: (loss, numbers) along the training.
        loss: the value.

    Returns:
        The numbers, interpolated linearly in the loss; None where the run never is there.
    """
    for (before, earlier), (after, later) in itertools.pairwise(course):
        if before >= loss >= after:
            share = 0.0 if before == after else (before - loss) / (before - after)
            return {name: (1 - share) * earlier[name] + share * later[name] for name in earlier}
    exact = [numbers for value, numbers in course if np.isclose(value, loss, rtol=1e-12)]
    return dict(exact[0]) if exact else None


def common_loss(courses: Sequence[Sequence[tuple[float, Mapping[str, float]]]]) -> float:
    """The smallest loss that every run comes down to."""
    return max(min(loss for loss, _ in course) for course in courses)
