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
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mgrad_jax import models
from mgrad_jax.analysis.convergence import gradient_evaluations
from mgrad_jax.analysis.study_plan import STRIDE, Cell, Key, Study
from mgrad_jax.analysis.study_users import sampled_metrics, user_metrics
from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.errors import Interrupted, UserError
from mgrad_jax.evaluation.candidates import Candidates, read_candidates
from mgrad_jax.files import Damaged, locked, read_mapping, write_whole
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.fit import EpochReport, TrainingDiverged
from mgrad_jax.training.history import History, read_rows
from mgrad_jax.training.run import train_run

__all__ = [
    "Cell",
    "Key",
    "Outcome",
    "Run",
    "Study",
    "StudyInterrupted",
    "Tried",
    "check_models",
    "is_finished",
    "study_runs",
    "train_study",
]
STUDY_FILE = "study.yaml"
_DIVERGED_FILE = "diverged.txt"


class StudyInterrupted(Interrupted):
    """The user stopped a study; what its runs had finished is on disk."""

    def __init__(self, directory: Path, finished: int, runs: int) -> None:
        super().__init__(directory, f"stopped with {finished} of {runs} runs finished")
        self.finished, self.runs = finished, runs


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
        if (sentence := models.model_class(config.model).obstacle(data, config.model_config)) is not None:
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
        return f"seeds + {attempt * STRIDE}" if attempt else "seeds as given"
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
        settings = read_mapping(directory / STUDY_FILE, yaml.safe_load)
        named = {f.name for f in dataclasses.fields(Study)} - {"out"}
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in named
        }
        study = Study(out=str(directory), **values)
    except (Damaged, FileNotFoundError, AttributeError, TypeError) as error:
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
