"""Which members a grid of settings has, and which of them one compiled program can train."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mgrad_jax import models
from mgrad_jax.declaration import check_names, marked
from mgrad_jax.errors import UserError, shown
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.methods import follows_epochs, unused

# Numbers of a run that may be traced; the model's traced hyper-parameters and the seed join them.
TRACED = marked(RunConfig, "traced")
# What a member can vary besides the model's hyper-parameters.
AXES = (*TRACED, *marked(RunConfig, "axis"))
MOST_MEMBERS = 10_000
# What no compiled program depends on.
_NO_STRUCTURE = (*TRACED, *marked(RunConfig, "outside"))


def expand_grid(base: RunConfig, grid: Mapping[str, Sequence[Any]]) -> list[RunConfig]:
    """All combinations of the grid's values over a base configuration.

    What has no effect in a member's training (alpha1 in plain training, say) is set back to its default, and members
    that are then equal are kept once.

    Args:
        base: what the grid does not name.
        grid: lists of values by name, one of `AXES` or a hyper-parameter of the model.

    Raises:
        UserError: an unknown name, a list that is empty or repeats itself, an axis without effect, or a value that
            does not fit.

    >>> [m.alpha2 for m in expand_grid(RunConfig("vbpr", "demo"), {"alpha2": [0.1, 0.2]})]
    [0.1, 0.2]
    """
    hyper = [f.name for f in dataclasses.fields(models.model_class(base.model).config_class)]
    check_size(grid)
    for name, values in grid.items():
        _check_axis(name, values, hyper)
    members: dict[str, RunConfig] = {}
    for point in itertools.product(*grid.values()):
        chosen = dict(zip(grid, point, strict=True))
        hyper_parameters = {**base.hyper_parameters, **{k: v for k, v in chosen.items() if k in hyper}}
        own = {k: v for k, v in chosen.items() if k not in hyper}
        with no_advice():
            member = _canonical(dataclasses.replace(base, hyper_parameters=hyper_parameters, **own))
        members.setdefault(repr(member.to_dict()), member)
    trainings = {member.training for member in members.values()}
    for name in grid:
        if all(name in unused(training) for training in trainings):
            raise UserError(
                f"the grid's axis '{name}' has no effect in {' or '.join(sorted(trainings))} training; leave it out."
            )
    return list(members.values())


def check_size(grid: Mapping[str, Sequence[Any]], n_seeds: int = 1) -> None:
    """Refuse a grid that nobody can train, before it is expanded."""
    n_members = n_seeds * math.prod(len(values) for values in grid.values())
    if n_members > MOST_MEMBERS:
        raise UserError(
            f"the sweep has {shown(n_members)} members; it can have {MOST_MEMBERS}, so give fewer seeds or values."
        )


def _check_axis(name: str, values: Sequence[Any], hyper: Sequence[str]) -> None:
    check_names("the grid has no axis", [name], sorted({*AXES, *hyper}))
    if not len(values):
        raise UserError(f"the grid's axis '{name}' has no values; give at least one.")
    repeated = [value for i, value in enumerate(values) if value in values[:i]]
    if repeated:
        raise UserError(f"the grid's axis '{name}' names {shown(repeated[0])} twice; leave one of them out.")


def _canonical(config: RunConfig) -> RunConfig:
    """The same run with what has no effect in it at its default."""
    defaults: dict[str, Any] = {name: getattr(RunConfig, name) for name in unused(config.training)}
    return dataclasses.replace(config, **defaults) if defaults else config


def group_members(members: Sequence[RunConfig]) -> list[list[int]]:
    """Indices of the members that share one compiled program, group by group, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        groups.setdefault(_structure(member), []).append(index)
    return list(groups.values())


def _structure(config: RunConfig) -> str:
    """What must be equal for two members to share a program."""
    values = config.to_dict()
    traced = marked(config.model_config, "traced")
    hyper = {name: value for name, value in values["hyper_parameters"].items() if name not in traced}
    shared = {name: value for name, value in values.items() if name not in _NO_STRUCTURE}
    planned = config.epochs if follows_epochs(values) else None
    # These decays are transformations of their own, so whether there is one is structure; how much is a traced number.
    links = {"weight decay": config.weight_decay > 0, "rate decay": config.rate_factors is not None}
    return repr({**shared, "hyper_parameters": hyper, "links": links, "planned": planned})


def published_grid(model: str) -> dict[str, tuple[Any, ...]]:
    """The grid that the model's published configuration searches, by name of the hyper-parameter.

    >>> published_grid("freedom")["dropout"]
    (0.8, 0.9)
    """
    return dict(models.model_class(model).grid)


@contextlib.contextmanager
def no_advice() -> Iterator[None]:
    """A grid may well contain what a single run is warned of, such as alpha1 <= alpha2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
