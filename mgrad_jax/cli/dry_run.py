"""`--dry-run`: what a training would do or be refused for; nothing is trained and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgrad_jax.cli.console import print_table
from mgrad_jax.errors import UserError

if TYPE_CHECKING:
    from mgrad_jax.data import Interactions
    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.sweep_run import SweepConfig


def show_run(config: RunConfig, resume: bool) -> None:
    """What `train` would do with a configuration; what it would refuse is a `UserError`."""
    from mgrad_jax.data import load_interactions
    from mgrad_jax.training.run_directory import is_begun

    place = _place(config.directory, "run", is_begun, resume)
    data = load_interactions(config.data)
    rows = {**_settings(config.to_dict()), **_of_data(config, data), **_of_model(config, data), "directory": place}
    _print(config.summary, rows)


def show_sweep(config: SweepConfig, resume: bool, slots: int | None) -> None:
    """What `sweep` would do with a configuration; what it would refuse is a `UserError`."""
    from mgrad_jax.data import load_interactions
    from mgrad_jax.training.grid import group_members, no_advice
    from mgrad_jax.training.sweep import check_sweep
    from mgrad_jax.training.sweep_directory import is_begun

    place = _place(config.directory, "sweep", is_begun, resume)
    data = load_interactions(config.base.data)
    members = config.members()
    check_sweep(data, members, slots)
    groups = group_members(members)
    rows = {**_settings(config.to_dict()), **_of_data(config.base, data)}
    with no_advice():
        for first, *_ in groups:  # what the members of a group need is the same
            rows |= _of_model(members[first], data, f" of member {first:04d}")
    rows["members"] = f"{len(members)}, in {len(groups)} program{'' if len(groups) == 1 else 's'}"
    rows["directory"] = place
    _print(f"{config.base.model} sweep", rows)


def _place(directory: Path, what: str, is_begun: Callable[[Path], bool], resume: bool) -> str:
    """The directory and whether it can be used, as training itself would find."""
    from mgrad_jax.training.directories import check_begun

    check_begun(directory, what, is_begun, resume)
    existing = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{directory} cannot be written ({existing} is no directory one can write in); change --out.")
    return f"{directory} ({'would be gone on with' if resume else 'free'})"


def _settings(values: dict[str, Any]) -> dict[str, str]:
    """A configuration as rows; what is empty is left out."""
    nested = ("hyper_parameters", "grid", "optimizer_args", "flat_minima_args")
    flat = {key: value for key, value in values.items() if key not in (*nested, "out", "data")}
    for name in nested:
        flat |= values[name] if values.get(name) else {}
    return {key: str(value) for key, value in flat.items() if value is not None}


def _of_data(config: RunConfig, data: Interactions) -> dict[str, str]:
    batches = -(-len(data.train) // config.batch_size)
    counts = {split: len(getattr(data, split)) for split in ("train", "valid", "test")}
    features = ", ".join(f"{name} ({table.shape[1]} wide)" for name, table in data.features.items())
    return {
        "data": f"{config.data}: {data.n_users:,} users, {data.n_items:,} items",
        "interactions": ", ".join(f"{count:,} {split}" for split, count in counts.items()),
        "features": features or "none",
        "batches per epoch": f"{batches:,}",
    }


def _of_model(config: RunConfig, data: Interactions, heading: str = "") -> dict[str, str]:
    """How large the model and its training are; what cannot be built on the data or in memory is refused here."""
    import jax
    from flax import nnx

    from mgrad_jax.training.memory import available_bytes, in_words

    try:
        model = nnx.eval_shape(lambda: config.create_model(data))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        model = config.create_model(data)  # a graph of this model is made of numbers, not of shapes
    n_params = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    parts = config.memory(data)
    needed = in_words(sum(part.size for part in parts.values()))
    return {
        f"parameters{heading}": f"{n_params:,}",
        f"memory{heading}": f"about {needed}, of {in_words(available_bytes())}",
    }


def _print(what: str, rows: dict[str, str]) -> None:
    print_table(f"{what}: nothing was trained", ["setting", "value"], [[key, value] for key, value in rows.items()])
