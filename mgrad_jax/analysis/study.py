"""A study: models x methods x optimizers x intervals x seeds, one run directory each, and what came of every run.

| file | holds |
|---|---|
| `study.yaml` | what was asked for last |
| `runs/<model>-<method>-<optimizer>[-i<interval>][-<setting>]-s<seed>/` | see below |

A run's directory (`mgrad_jax.training.run`) also holds `users.npz`, each user's test metrics, and `candidates.npz`, the
same on sampled candidates.

Some trainings are tried several times (`Study.tune`): with every setting, and `replay` with as many sets of other
seeds. The try with the best mean on validation stands for the training; nothing else enters the tables.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mgrad_jax import models
from mgrad_jax.analysis.convergence import gradient_evaluations
from mgrad_jax.analysis.study_users import sampled_metrics, user_metrics
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.errors import UserError, shown
from mgrad_jax.evaluation.candidates import Candidates, read_candidates
from mgrad_jax.files import Damaged, locked, read_mapping, write_whole
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.fit import EpochReport, TrainingDiverged
from mgrad_jax.training.history import History, read_rows
from mgrad_jax.training.methods import METHODS, SETTINGS, unused
from mgrad_jax.training.run import train_run

STUDY_FILE = "study.yaml"
_DIVERGED_FILE = "diverged.txt"
_STRIDE = 100_000  # between the seeds of one try of `replay` and the next


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


class Key(NamedTuple):
    """One run of a study: a training, a seed, and which of the tries it belongs to."""

    cell: Cell
    seed: int
    attempt: int = 0


class Run(NamedTuple):
    """What came of one run.

    Attributes:
        cell, seed, directory: which it is. Where `replay` is tried with other seeds, `seed` is the one it stands for.
        result: the content of `result.json`; None where the run diverged.
        history: rows of `history.csv`.
        evaluations: gradient evaluations until the end of every epoch of the history.
        users: (n,) the evaluated test users, ascending.
        metrics: each user's test metrics at the best epoch, `{"recall@5": (n,), ...}`; those on sampled candidates are
            of the users who have some.
        note: how the training was tuned; "" where it was not.
    """

    cell: Cell
    seed: int
    directory: Path
    result: dict[str, Any] | None
    history: list[dict[str, float]]
    evaluations: np.ndarray
    users: np.ndarray
    metrics: dict[str, np.ndarray]
    note: str = ""


class Tried(NamedTuple):
    """One try of a training that is tuned.

    Attributes:
        cell, setting: the training, and the setting in words.
        valid: mean validation metric of each seed that finished.
        diverged: how many did not.
        is_chosen: whether it stands for the training.
    """

    cell: Cell
    setting: str
    valid: tuple[float, ...]
    diverged: int
    is_chosen: bool


class Outcome(NamedTuple):
    """The runs that stand for their trainings, seed by seed, and all tries of those that were tuned."""

    runs: list[Run]
    tried: list[Tried]


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
            every combination, and `replay` with as many sets of seeds, `_STRIDE` apart.
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
            if method not in METHODS:
                raise UserError(f"unknown method '{method}'; choose among {', '.join(METHODS)}.")
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
            seed += attempt * _STRIDE
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
        defaults = {f.name: f.default for f in dataclasses.fields(RunConfig)}
        return self.settings.get(name, defaults[name])

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
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _tuned(tune: Mapping[str, Sequence[float]], method: str) -> dict[str, Sequence[float]]:
    """What is tuned of a method."""
    return {name: values for name, values in tune.items() if name not in unused(method)}


def _combinations(values: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def hyper_parameter_names(model: str) -> list[str]:
    """The names of a model's hyper-parameters."""
    return [f.name for f in dataclasses.fields(models.model_class(model).config_class)]


def train_study(
    study: Study,
    *,
    resume: bool = False,
    progress: Callable[[int, RunConfig, EpochReport | None], None] | None = None,
) -> Outcome:
    """Train what is missing of a study, and read the runs that stand for their trainings.

    Args:
        study: what is compared.
        resume: go on with the study that is there; finished runs are not trained again, so that it may also be extended
            by models, methods, intervals, seeds or settings to try.
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
    candidates = None if study.candidates is None else read_candidates(Path(study.candidates), data)
    configs = study.configs()
    check_models(configs.values(), data)
    for start in filter(None, dict.fromkeys(config.start_from for config in configs.values())):
        if not (Path(start) / "config.yaml").exists():
            raise UserError(f"{start} holds no run to start from; train it first, or give another --start-from.")
    results: dict[Key, dict[str, Any] | None] = {}
    with locked(study.directory):
        write_whole(study.directory / STUDY_FILE, yaml.safe_dump(study.to_dict(), sort_keys=False))
        try:
            for key, config in configs.items():
                if progress is not None:
                    progress(len(results), config, None)

                def report(epoch: EpochReport, config: RunConfig = config) -> None:
                    if progress is not None:
                        progress(len(results), config, epoch)

                results[key] = _train(config, report)
            chosen, tried = _choose(study, results)
            runs = [_read(key, results[key], configs[key], data, candidates, chosen[key]) for key in chosen]
        except KeyboardInterrupt:
            raise StudyInterrupted(study.directory, len(results), len(configs)) from None
    return Outcome(runs, tried)


def check_models(configs: Iterable[RunConfig], data: Interactions) -> None:
    """A model that the data cannot train is found before hours are spent on the others."""
    for config in {config.model: config for config in configs}.values():
        settings = models.make_config(config.model, dict(config.hyper_parameters))
        if (sentence := models.model_class(config.model).obstacle(data, settings)) is not None:
            raise UserError(sentence)


def _train(config: RunConfig, report: Callable[[EpochReport], None]) -> dict[str, Any] | None:
    """One run, trained as far as it is not yet; its result, or None where it diverged."""
    directory = config.directory
    diverged = directory / _DIVERGED_FILE
    if diverged.exists():
        return None
    try:
        return train_run(config, resume=(directory / "config.yaml").exists(), progress=report)
    except TrainingDiverged as error:
        # One setting that diverges is a finding, and no reason to lose the others.
        write_whole(diverged, f"{error}\n")
        return None


def _choose(study: Study, results: Mapping[Key, dict[str, Any] | None]) -> tuple[dict[Key, str], list[Tried]]:
    """The runs of every training's best try by the mean validation metric, each with a note; and what was tried."""
    chosen: dict[Key, str] = {}
    tried: list[Tried] = []
    for cell in study.cells():
        settings = study.tries(cell)
        found = [[results[Key(cell, seed, attempt)] for seed in study.seeds] for attempt in range(len(settings))]
        metric = next(iter(study.configs().values())).metric
        valid = [tuple(float(result["valid"][metric]) for result in runs if result is not None) for runs in found]
        # Fewest diverged first; of equal tries the first.
        best = min(range(len(found)), key=lambda i: (-len(valid[i]), -float(np.mean(valid[i])) if valid[i] else 0.0))
        words = [_in_words(cell, setting, attempt) for attempt, setting in enumerate(settings)]
        several = len(settings) > 1
        note = f"best of {len(settings)} tries on validation: {words[best]}" if several else ""
        chosen.update({Key(cell, seed, best): note for seed in study.seeds})
        if several:
            lost = [len(runs) - len(values) for runs, values in zip(found, valid, strict=True)]
            rows = zip(words, valid, lost, strict=True)
            tried += [Tried(cell, *row, i == best) for i, row in enumerate(rows)]
    return chosen, tried


def _in_words(cell: Cell, setting: Mapping[str, float], attempt: int) -> str:
    if cell.method == "replay":
        return f"seeds + {attempt * _STRIDE}" if attempt else "seeds as given"
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def _read(
    key: Key,
    result: dict[str, Any] | None,
    config: RunConfig,
    data: Interactions,
    candidates: Candidates | None,
    note: str,
) -> Run:
    """What came of a run that has been trained."""
    directory = config.directory
    history = History(config.metric_names, read_rows(directory / "history.csv")).rows()
    evaluations = gradient_evaluations(config, len(data.train), len(history))
    if result is None:
        return Run(key.cell, key.seed, directory, None, history, evaluations, np.zeros(0, np.int64), {}, note)
    users, metrics = user_metrics(directory, result)
    if candidates is not None:
        metrics = {**metrics, **sampled_metrics(directory, result, candidates)}
    return Run(key.cell, key.seed, directory, result, history, evaluations, users, metrics, note)


def study_runs(directory: Path) -> list[Path]:
    """The run directories of a finished study, for commands that read runs.

    Of a training that was tuned they are those of the best setting, and of `replay` those with the seeds as given.

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
    found = {key: config.directory for key, config in study.configs().items()}
    missing = [run for run in found.values() if not is_finished(run)]
    if missing:
        raise UserError(
            f"{directory} is a study with {len(found) - len(missing)} of {len(found)} runs finished; "
            "go on with it with --resume first."
        )
    keys = list(found)
    if study.tune:
        chosen, _ = _choose(study, {key: _read_result(run) for key, run in found.items()})
        keys = [key._replace(attempt=0) if key.cell.method == "replay" else key for key in chosen]
    return [found[key] for key in keys if not (found[key] / _DIVERGED_FILE).exists()]


def _read_result(run: Path) -> dict[str, Any] | None:
    if (run / _DIVERGED_FILE).exists():
        return None
    try:
        return read_mapping(run / "result.json", json.loads)
    except Damaged as damage:
        raise UserError(f"{run / 'result.json'} is damaged ({damage}); repeat the study with --resume.") from None


def is_finished(run: Path) -> bool:
    """Whether a run's directory holds what came of it: a result, or that it diverged."""
    return any((run / name).exists() for name in ("result.json", _DIVERGED_FILE))
