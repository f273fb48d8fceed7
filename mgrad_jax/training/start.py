"""Begin a run at the parameters of another: AMR starts from a trained VBPR, as published."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from mgrad_jax.errors import UserError
from mgrad_jax.models import Recommender


def start_from(model: Recommender, directory: str | Path, data: str) -> None:
    """Give a model the best parameters of a run, by their paths.

    Args:
        model: to be trained; it may be adversarial where the run was not.
        directory: of the run.
        data: the dataset of both.

    Raises:
        UserError: no run there, one of other data, or one whose parameters are others or have other shapes.
    """
    from mgrad_jax.training.run import load_run  # which begins runs, too

    loaded = load_run(directory, data)
    theirs, ours = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (loaded.model, model))
    for path in (*ours, *theirs):
        name = ".".join(map(str, path))
        if path not in theirs or path not in ours:
            lacking, having = (loaded.model, model) if path not in theirs else (model, loaded.model)
            raise UserError(
                f"{directory} is a run of {loaded.config.model} and cannot start {model.name}: {having.name} has the "
                f"parameter {name} and {lacking.name} has not; give a run of {model.name}."
            )
        if theirs[path].shape != ours[path].shape:
            raise UserError(
                f"{directory} has {name} of shape {theirs[path].shape} and this run of {ours[path].shape}; give a run with "
                "the same hyper-parameters."
            )
    nnx.update(model, nnx.state(loaded.model, nnx.Param))
