"""Begin a run at the parameters of another: AMR starts from a trained VBPR, as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import nnx

from mgrad_jax.errors import UserError
from mgrad_jax.models import Recommender


def start_from(model: Recommender, trained: Recommender, directory: str | Path) -> None:
    """Give a model the parameters of a trained one, by their paths.

    Args:
        model: to be trained; it may be adversarial where the other was not.
        trained: the model of a run, at its best epoch.
        directory: of that run, for messages.

    Raises:
        UserError: the run's parameters are others or have other shapes.
    """
    theirs, ours = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (trained, model))
    for path in sorted(ours.keys() ^ theirs.keys(), key=_name):
        lacking, having = (trained, model) if path in ours else (model, trained)
        raise UserError(
            f"{directory} is a run of {trained.name} and cannot start {model.name}: {having.name} has the parameter "
            f"{_name(path)} and {lacking.name} has not; give a run of {model.name}."
        )
    for path, parameter in ours.items():
        if theirs[path].shape != parameter.shape:
            raise UserError(
                f"{directory} has {_name(path)} of shape {theirs[path].shape} and this run of {parameter.shape}; give "
                "a run with the same hyper-parameters."
            )
    nnx.update(model, nnx.state(trained, nnx.Param))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
