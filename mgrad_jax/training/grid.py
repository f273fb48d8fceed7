"""Which members a sweep has, made of a grid of settings, and which of them one compiled program can train."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgrad_jax import models
from mgrad_jax.declaration import check_names, marked
from mgrad_jax.errors import UserError, shown
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.methods import follows_epochs, unused
from mgrad_jax.training.settings import dataset_name

# Numbers of a run that may be traced; the model's traced hyper-parameters and the seed join them.
TRACED = marked(RunConfig, "traced")
# What a member can vary besides the model's hyper-parameters.
AXES = (*TRACED, *marked(RunConfig, "axis"))
MOST_MEMBERS = 10_000
# What no compiled program depends on.
_NO_STRUCTURE = (*TRACED, *marked(RunConfig, "outside"))


@dataclass(frozen=True)
class SweepConfig:
    """Everything that determines a sweep.

    Attributes:
        base: what the grid does not vary; its `out` is not used.
        grid: lists of values by name, see `expand_grid`.
        n_seeds: every setting is trained with this many seeds, from the base's upwards.
        out: the sweep's directory; None: `sweeps/<model>-<data>`.

    Raises:
        UserError: a name that does not exist, a value out of range, or a grid that does not fit the base.
    """

    base: RunConfig
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    n_seeds: int = 1
    out: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.n_seeds, bool) or not isinstance(self.n_seeds, int) or self.n_seeds < 1:
            raise UserError(f"seeds is {shown(self.n_seeds)}; it must be at least 1.")
        if "seed" in self.grid and self.n_seeds > 1:
            raise UserError("the grid names the seeds and so does --seeds; leave one of them out.")
        check_size(self.grid, self.n_seeds)
        self.members()

    @property
    def directory(self) -> Path:
        """The sweep's directory."""
        return Path(self.out or f"sweeps/{self.base.model}-{dataset_name(self.base.data)}")

    @property
    def axes(self) -> list[str]:
        """What varies between settings."""
        return [name for name in self.grid if name != "seed"]

    @property
    def seeds(self) -> list[int]:
        """The seeds of every setting."""
        return list(self.grid.get("seed", range(self.base.seed, self.base.seed + self.n_seeds)))

    def members(self) -> list[RunConfig]:
        """All members, those of one setting next to each other."""
        return self._members

    @functools.cached_property
    def _members(self) -> list[RunConfig]:
        settings = {name: values for name, values in self.grid.items() if name != "seed"}
        return expand_grid(self.base, {**settings, "seed": self.seeds})

    def setting(self, member: RunConfig) -> dict[str, Any]:
        """A member's values on the axes; None where an axis has no effect on it."""
        values = {**dataclasses.asdict(member), **member.hyper_parameters}
        return {axis: None if axis in unused(member.training) else values[axis] for axis in self.axes}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, without what the grid replaces."""
        base = self.base.to_dict()
        hyper = {k: v for k, v in base.pop("hyper_parameters").items() if k not in self.grid}
        kept = {k: v for k, v in base.items() if k not in (*self.grid, "out", "seed")}
        return {
            **kept,
            "hyper_parameters": hyper,
            "grid": {name: list(values) for name, values in self.grid.items() if name != "seed"},
            "seeds": self.seeds,
        }


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
        own |= {name: getattr(RunConfig, name) for name in unused(own.get("training", base.training))}
        with no_advice():
            member = dataclasses.replace(base, hyper_parameters=hyper_parameters, **own)
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
