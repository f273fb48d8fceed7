"""The configuration of a sweep: a base, a grid over it, and seeds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgrad_jax.errors import UserError, shown
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import check_size, expand_grid
from mgrad_jax.training.methods import unused
from mgrad_jax.training.settings import dataset_name


@dataclass(frozen=True)
class SweepConfig:
    """Everything that determines a sweep.

    Attributes:
        base: what the grid does not vary; its `out` is not used.
        grid: lists of values by name, see `mgrad_jax.training.grid.expand_grid`.
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
