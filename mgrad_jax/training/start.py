"""Begin a run at the parameters of another: AMR starts from a trained VBPR, as published."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from mgrad_jax.errors import UserError
from mgrad_jax.models import Recommender
from mgrad_jax.training.kept import named


def start_from(model: Recommender, trained: Recommender, directory: str | Path) -> None:
    """Give a model, perhaps an adversarial one, the parameters of another, trained in a directory, by their paths.

    Raises:
        UserError: the run's parameters are others or have other shapes.
    """
    theirs, ours = (named(nnx.state(m, nnx.Param)) for m in (trained, model))
    for path in sorted(ours.keys() ^ theirs.keys()):
        lacking, having = (trained, model) if path in ours else (model, trained)
        raise UserError(
            f"{directory} is a run of {trained.name} and cannot start {model.name}: {having.name} has the parameter "
            f"{path} and {lacking.name} has not; give a run of {model.name}."
        )
    for path, parameter in ours.items():
        if theirs[path].shape != parameter.shape:
            raise UserError(
                f"{directory} has {path} of shape {theirs[path].shape} and this run of {parameter.shape}; give "
                "a run with the same hyper-parameters."
            )
    nnx.update(model, nnx.state(trained, nnx.Param))
