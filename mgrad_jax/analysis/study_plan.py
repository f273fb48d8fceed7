"""What a study compares: models x methods x optimizers x intervals x seeds, and the settings that are tried."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mgrad_jax import models
from mgrad_jax.declaration import check_choice, marked, plain
from mgrad_jax.errors import UserError, shown
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.methods import METHODS, SETTINGS, unused

STRIDE = 100_000  # between the seeds of one try of `replay` and the next


class Cell(NamedTuple):
    """One training of one model, whatever the seed; `interval` is None where the method has none."""

    model: str
    method: str
    optimizer: str
    interval: int | None


class Key(NamedTuple):
    """One run of a study: a training, a seed, and which of the tries it belongs to."""

    cell: Cell
    seed: int
    attempt: int = 0


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        data: a directory in MMRec format, or "demo".
        models, methods, optimizers, intervals, seeds: every combination is a run. `replay` is among the methods whether
            named or not; methods without an interval are run once for all of them.
        out: the study's directory.
        hyper_parameters: of the models. A name is for every model that has it, `model.name` for one.
        settings: further arguments of `RunConfig`, the same in every run.
        tune: values by name of a setting that some of the methods have, such as alpha2. Those methods are trained with
            every combination, and `replay` with as many sets of seeds, `STRIDE` apart.
        candidates: an .npy file of sampled candidates (`mgrad_jax.evaluation.candidates`) that runs are ranked on.
        start_from: a run whose parameters every run begins with, or a study, whose plain run of the same model and seed
            it is.

    Raises:
        UserError: a name that does not exist, a value out of range, or a list that is empty or repeats itself.
    """

    data: str
    models: tuple[str, ...]
    out: str
    methods: tuple[str, ...] = ("plain", "replay", "mirror")
    optimizers: tuple[str, ...] = ("adam",)
    intervals: tuple[int, ...] = (3,)
    seeds: tuple[int, ...] = (999, 1000, 1001, 1002, 1003)
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[float]] = field(default_factory=dict)
    candidates: str | None = None
    start_from: str | None = None

    def __post_init__(self) -> None:
        for name in ("models", "methods", "optimizers", "intervals", "seeds"):
            values = getattr(self, name)
            if not values:
                raise UserError(f"--{name} names nothing; name at least one.")
            if len(set(values)) < len(values):
                repeated = next(value for value in values if values.count(value) > 1)
                raise UserError(f"--{name} names {repeated} twice; name each once.")
        for method in self.methods:
            check_choice("unknown method", method, METHODS)
        if "replay" not in self.methods:
            place = self.methods.index("plain") + 1 if "plain" in self.methods else 0
            methods = (*self.methods[:place], "replay", *self.methods[place:])
            object.__setattr__(self, "methods", methods)
        self._check_tune()
        known = {name: hyper_parameter_names(name) for name in self.models}
        for key in self.hyper_parameters:
            model, separator, name = key.rpartition(".")
            if separator and model not in known:
                raise UserError(f"--set {key} is for {model}, which is not compared; name one of {', '.join(known)}.")
            if not any(name in known[m] for m in ([model] if separator else self.models)):
                names = sorted(set().union(*(known[m] for m in ([model] if separator else self.models))))
                raise UserError(f"no compared model has the hyper-parameter '{name}'; choose among {', '.join(names)}.")
        self.configs()

    @property
    def directory(self) -> Path:
        """The study's directory."""
        return Path(self.out)

    def cells(self) -> list[Cell]:
        """Every training of every model, in the order of the tables."""
        cells = [
            Cell(model, method, optimizer, None if "interval" in unused(method) else interval)
            for model, optimizer, method, interval in itertools.product(
                self.models, self.optimizers, self.methods, self.intervals
            )
        ]
        return list(dict.fromkeys(cells))

    def tries(self, cell: Cell) -> list[dict[str, float]]:
        """The settings that a training is tried with; `replay`, which has none of them, is tried with other seeds."""
        if cell.method == "replay":
            return [{}] * max(len(_combinations(_tuned(self.tune, method))) for method in self.methods)
        return _combinations(_tuned(self.tune, cell.method))

    def configs(self) -> dict[Key, RunConfig]:
        """The configuration of every run."""
        return self._configs

    @functools.cached_property
    def _configs(self) -> dict[Key, RunConfig]:
        return {
            Key(cell, seed, attempt): self.config(cell, seed, attempt, setting)
            for cell in self.cells()
            for attempt, setting in enumerate(self.tries(cell))
            for seed in self.seeds
        }

    def config(self, cell: Cell, seed: int, attempt: int = 0, setting: Mapping[str, float] | None = None) -> RunConfig:
        """The configuration of one run; `attempt` counts the tries of a tuned training, with these settings."""
        interval = "" if cell.interval is None else f"-i{cell.interval}"
        setting = setting or {}
        # A try at what is set anyway is the run of a study that is not tuned.
        own = {name: value for name, value in setting.items() if value != self._base(name)}
        tried = "".join(f"-{name}-{value:g}" for name, value in own.items())
        if cell.method == "replay":
            seed += attempt * STRIDE
        name = f"{cell.model}-{cell.method}-{cell.optimizer}{interval}{tried}-s{seed}"
        given = {} if cell.interval is None else {"interval": cell.interval}
        start = {} if self.start_from is None else {"start_from": self._start(cell, seed)}
        return RunConfig(
            model=cell.model,
            data=self.data,
            training=cell.method,
            optimizer=cell.optimizer,
            seed=seed,
            hyper_parameters=self._hyper_parameters(cell.model),
            out=str(self.directory / "runs" / name),
            **{**self.settings, **given, **setting, **start},
        )

    def _base(self, name: str) -> Any:
        return self.settings.get(name, RunConfig.defaults()[name])

    def _start(self, cell: Cell, seed: int) -> str:
        """The run that one begins with."""
        place = Path(str(self.start_from))
        if (place / "config.yaml").exists():
            return str(place)
        return str(place / "runs" / f"{cell.model}-plain-{cell.optimizer}-s{seed}")

    def _check_tune(self) -> None:
        tunable = sorted(set(SETTINGS) - {"interval"})
        for name, values in self.tune.items():
            if name not in tunable:
                raise UserError(
                    f"--tune has no setting {shown(name)}; choose among {', '.join(tunable)}, which some methods have "
                    "and others do not."
                )
            if all(name in unused(method) for method in self.methods):
                raise UserError(f"--tune {name} has no effect in {' or '.join(self.methods)}; leave it out.")
            if len(set(values)) < len(values):
                raise UserError(f"--tune {name} names a value twice; name each once.")

    def _hyper_parameters(self, model: str) -> dict[str, Any]:
        known = hyper_parameter_names(model)
        shared = {name: value for name, value in self.hyper_parameters.items() if name in known}
        own = {key.partition(".")[2]: v for key, v in self.hyper_parameters.items() if key.startswith(f"{model}.")}
        return {**shared, **own}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "out"}
        return {name: plain(value) for name, value in values.items()}


def _tuned(tune: Mapping[str, Sequence[float]], method: str) -> dict[str, Sequence[float]]:
    """What is tuned of a method."""
    return {name: values for name, values in tune.items() if name not in unused(method)}


def _combinations(values: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def hyper_parameter_names(model: str) -> list[str]:
    """The names of a model's hyper-parameters."""
    return list(marked(models.model_class(model).config_class))
