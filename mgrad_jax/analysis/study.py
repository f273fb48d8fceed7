"""A study: models x methods x optimizers x intervals x seeds, one run directory each, and what came of every run.

| file | holds |
|---|---|
| `study.yaml` | what was asked for last |
| `runs/<model>-<method>-<optimizer>[-i<interval>]-s<seed>/` | a run (`mgrad_jax.training.run`), and `users.npz`: each user's test metrics |
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mgrad_jax import models
from mgrad_jax.analysis.convergence import gradient_evaluations
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import make_ranker, per_user_metrics
from mgrad_jax.files import locked, write_whole, written_whole
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.fit import EpochReport, TrainingDiverged, fit
from mgrad_jax.training.history import History, read_rows
from mgrad_jax.training.methods import METHODS, unused
from mgrad_jax.training.run import load_run, train_run

STUDY_FILE = "study.yaml"
USERS_FILE = "users.npz"
_DIVERGED_FILE = "diverged.txt"


class StudyInterrupted(KeyboardInterrupt):
    """The user stopped a study; what its runs had finished is on disk."""

    def __init__(self, out: Path, finished: int, runs: int) -> None:
        super().__init__(f"{out}: stopped with {finished} of {runs} runs finished")
        self.out, self.finished, self.runs = out, finished, runs


class Cell(NamedTuple):
    """One training of one model, whatever the seed; `interval` is None where the method has none."""

    model: str
    method: str
    optimizer: str
    interval: int | None


class Run(NamedTuple):
    """What came of one run.

    Attributes:
        cell, seed, directory: which it is.
        result: the content of `result.json`; None where the run diverged.
        history: rows of `history.csv`.
        evaluations: gradient evaluations until the end of every epoch of the history.
        users: (n,) the evaluated test users, ascending.
        metrics: each user's test metrics at the best epoch, `{"recall@5": (n,), ...}`.
    """

    cell: Cell
    seed: int
    directory: Path
    result: dict[str, Any] | None
    history: list[dict[str, float]]
    evaluations: np.ndarray
    users: np.ndarray
    metrics: dict[str, np.ndarray]


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

    def __post_init__(self) -> None:
        for name in ("models", "methods", "optimizers", "intervals", "seeds"):
            values = getattr(self, name)
            if not values:
                raise UserError(f"--{name} names nothing; name at least one.")
            if len(set(values)) < len(values):
                repeated = next(value for value in values if values.count(value) > 1)
                raise UserError(f"--{name} names {repeated} twice; name each once.")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"unknown method '{method}'; choose among {', '.join(METHODS)}.")
        if "replay" not in self.methods:
            place = self.methods.index("plain") + 1 if "plain" in self.methods else 0
            methods = (*self.methods[:place], "replay", *self.methods[place:])
            object.__setattr__(self, "methods", methods)
        known = {name: _hyper_parameter_names(name) for name in self.models}
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

    def configs(self) -> dict[tuple[Cell, int], RunConfig]:
        """The configuration of every run, by cell and seed."""
        return self._configs

    @functools.cached_property
    def _configs(self) -> dict[tuple[Cell, int], RunConfig]:
        return {(cell, seed): self._config(cell, seed) for cell in self.cells() for seed in self.seeds}

    def _config(self, cell: Cell, seed: int) -> RunConfig:
        interval = "" if cell.interval is None else f"-i{cell.interval}"
        name = f"{cell.model}-{cell.method}-{cell.optimizer}{interval}-s{seed}"
        given = {} if cell.interval is None else {"interval": cell.interval}
        return RunConfig(
            model=cell.model,
            data=self.data,
            training=cell.method,
            optimizer=cell.optimizer,
            seed=seed,
            hyper_parameters=self._hyper_parameters(cell.model),
            out=str(self.directory / "runs" / name),
            **{**self.settings, **given},
        )

    def _hyper_parameters(self, model: str) -> dict[str, Any]:
        known = _hyper_parameter_names(model)
        shared = {name: value for name, value in self.hyper_parameters.items() if name in known}
        own = {key.partition(".")[2]: v for key, v in self.hyper_parameters.items() if key.startswith(f"{model}.")}
        return {**shared, **own}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "out"}
        return {name: list(value) if isinstance(value, tuple) else _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _hyper_parameter_names(model: str) -> list[str]:
    return [f.name for f in dataclasses.fields(models.model_class(model).config_class)]


def train_study(
    study: Study,
    *,
    resume: bool = False,
    progress: Callable[[int, RunConfig, EpochReport | None], None] | None = None,
) -> list[Run]:
    """Train what is missing of a study, and read all of its runs.

    Args:
        study: what is compared.
        resume: go on with the study that is there; finished runs are not trained again, so that it may also be extended
            by models, methods, intervals or seeds.
        progress: called with the number of runs before this one, its configuration, and every epoch's report; once
            without one as it starts.

    Returns:
        The runs in the order of `Study.cells`, seed by seed; those that diverged have no result.

    Raises:
        UserError: as `train_run`, or a study is there already.
        StudyInterrupted: Ctrl-C; everything up to the last finished epoch is on disk.
    """
    if (study.directory / STUDY_FILE).exists() and not resume:
        raise UserError(
            f"{study.directory} already holds a study; add --resume to go on with it, or choose another --out."
        )
    if resume and not (study.directory / STUDY_FILE).exists():
        raise UserError(f"{study.directory} holds no study to resume; leave --resume out to begin one.")
    data = load_interactions(study.data)
    configs = study.configs()
    _check_models(configs.values(), data)
    runs: list[Run] = []
    with locked(study.directory):
        write_whole(study.directory / STUDY_FILE, yaml.safe_dump(study.to_dict(), sort_keys=False))
        try:
            for (cell, seed), config in configs.items():
                if progress is not None:
                    progress(len(runs), config, None)

                def report(epoch: EpochReport, config: RunConfig = config) -> None:
                    if progress is not None:
                        progress(len(runs), config, epoch)

                runs.append(_train(cell, seed, config, data, report))
        except KeyboardInterrupt:
            raise StudyInterrupted(study.directory, len(runs), len(configs)) from None
    return runs


def _check_models(configs: Iterable[RunConfig], data: Interactions) -> None:
    """A model that the data cannot train is found before hours are spent on the others."""
    for config in {config.model: config for config in configs}.values():
        settings = models.make_config(config.model, dict(config.hyper_parameters))
        if (sentence := models.model_class(config.model).obstacle(data, settings)) is not None:
            raise UserError(sentence)


def _train(cell: Cell, seed: int, config: RunConfig, data: Interactions, report: Callable[[EpochReport], None]) -> Run:
    """One run, trained as far as it is not yet."""
    directory, result = config.directory, None
    diverged = directory / _DIVERGED_FILE
    if not diverged.exists():
        try:
            result = train_run(config, resume=(directory / "config.yaml").exists(), progress=report)
        except TrainingDiverged as error:
            # One setting that diverges is a finding, and no reason to lose the others.
            write_whole(diverged, f"{error}\n")
    history = History(config.metric_names, read_rows(directory / "history.csv")).rows()
    evaluations = gradient_evaluations(config, len(data.train), len(history))
    if result is None:
        return Run(cell, seed, directory, None, history, evaluations, np.zeros(0, np.int64), {})
    users, metrics = _user_metrics(directory, result)
    return Run(cell, seed, directory, result, history, evaluations, users, metrics)


def _user_metrics(directory: Path, result: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Each user's test metrics at the best epoch, kept in `users.npz` beside the run."""
    path = directory / USERS_FILE
    kept = _read_users(path)
    if kept is None or int(kept.pop("epoch")) != result["best_epoch"]:
        loaded = load_run(directory)
        vectors = loaded.vectors()
        users, metrics = per_user_metrics(make_ranker(loaded.data, "test", loaded.config.ks), *vectors)
        with written_whole(path, "wb") as stream:
            np.savez(stream, epoch=result["best_epoch"], users=users, **metrics)  # type: ignore[arg-type]
        return users, metrics
    return kept.pop("users"), kept


def _read_users(path: Path) -> dict[str, np.ndarray] | None:
    """The content of a `users.npz`; None where there is none that can be read, for it is made again at will."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError):
        return None
    return content if {"epoch", "users"} <= content.keys() else None


def study_runs(directory: Path) -> list[Path]:
    """The run directories of a finished study, for commands that read runs.

    Raises:
        UserError: no study there, or one whose runs are not all finished.
    """
    try:
        settings = yaml.safe_load((directory / STUDY_FILE).read_text(encoding="utf-8"))
        named = {f.name for f in dataclasses.fields(Study)} - {"out"}
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in named
        }
        study = Study(out=str(directory), **values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{directory / STUDY_FILE} cannot be read ({reason}); repeat the study with --resume."
        ) from None
    found = [config.directory for config in study.configs().values()]
    missing = [run for run in found if not any((run / name).exists() for name in ("result.json", _DIVERGED_FILE))]
    if missing:
        raise UserError(
            f"{directory} is a study with {len(found) - len(missing)} of {len(found)} runs finished; "
            "go on with it with --resume first."
        )
    return [run for run in found if not (run / _DIVERGED_FILE).exists()]


class Estimate(NamedTuple):
    """Seconds a cell's runs will take.

    Attributes:
        cell: which.
        runs: how many there are to train, finished ones left out.
        compilation: of one run, where nothing is in the cache.
        epoch: of training and evaluating once.
        least, most: of all the runs: patience + 1 epochs each, and all the epochs that are allowed.
    """

    cell: Cell
    runs: int
    compilation: float
    epoch: float
    least: float
    most: float


def estimate(study: Study) -> Iterator[Estimate]:
    """Time two epochs of plain training of every model and optimizer, in memory, and reckon the rest from them.

    Raises:
        UserError: data that cannot be loaded or trained on.
    """
    data = load_interactions(study.data)
    _check_models(study.configs().values(), data)
    measured: dict[tuple[str, str], tuple[float, float, float]] = {}
    for cell in study.cells():
        key = cell.model, cell.optimizer
        if key not in measured:
            measured[key] = _measure(study._config(cell._replace(method="plain", interval=None), study.seeds[0]), data)
        compilation, gradient, evaluation = measured[key]
        configs = [study.configs()[cell, seed] for seed in study.seeds]
        runs = sum(not _is_finished(config.directory) for config in configs)
        epoch = float(gradient_evaluations(configs[0], len(data.train), 1)[0]) * gradient + evaluation
        patience, epochs = configs[0].patience, configs[0].epochs
        least, most = (runs * (compilation + n * epoch) for n in (min(patience + 1, epochs), epochs))
        yield Estimate(cell, runs, compilation, epoch, least, most)


def _is_finished(run: Path) -> bool:
    return any((run / name).exists() for name in ("result.json", _DIVERGED_FILE))


def _measure(config: RunConfig, data: Interactions) -> tuple[float, float, float]:
    """Seconds of compilation, of one gradient evaluation with its update, and of one evaluation of the metrics."""
    timed = fit(
        config.create_model(data),
        data,
        config.transformation(data),
        epochs=2,
        seed=config.seed,
        batch_size=config.batch_size,
        metric=config.metric,
        ks=config.ks,
    )
    batches = math.ceil(len(data.train) / config.batch_size)
    warm = timed.history[-1]
    return timed.seconds["compile"], warm.seconds_train / batches, warm.seconds_evaluate
