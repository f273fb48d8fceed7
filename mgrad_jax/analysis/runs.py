"""Finished runs, grouped for a comparison: by model, by training within it, paired by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mgrad_jax.analysis.study import STUDY_FILE, study_runs
from mgrad_jax.errors import UserError, shown
from mgrad_jax.files import Damaged, read_mapping
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.methods import unused
from mgrad_jax.training.run import LoadedRun, load_run

# What runs of one training may differ in, and what trainings of one model may.
_FREE = ("out", "seed", "data", "keep_every")
_SAID = ("model", "training", "data_digest", "out", "seed", "data")
_OF_TRAINING = (
    "training",
    "optimizer",
    "optimizer_args",
    "learning_rate",
    "weight_decay",
    "flat_minima_args",
    "alpha1",
    "alpha2",
    "interval",
)


# Which trainings are held against which, by their methods.
_COMPARED = (
    *((method, other) for method in ("mirror", "mirror-ascent") for other in ("plain", "replay")),
    ("replay", "plain"),
)


class _Described(NamedTuple):
    directory: Path
    settings: dict[str, Any]


def group_runs(paths: Sequence[Path]) -> dict[str, dict[str, dict[int, Path]]]:
    """Run directories by model, training and seed.

    A training is named by its method, and by interval and optimizer where these differ among the runs.

    Args:
        paths: run directories; that of a study stands for all of its runs.

    Raises:
        UserError: no run, an unfinished one, one given twice, runs of several datasets or settings, or runs of mirror
            and another training without the control `replay`.
    """
    runs = [_described(run) for path in paths for run in _expanded(path)]
    digests = {run.settings["data_digest"]: run for run in runs}
    if len(digests) > 1:
        first, second = list(digests.values())[:2]
        raise UserError(
            f"{first.directory} and {second.directory} were trained on different data; give runs of one dataset."
        )
    groups: dict[str, dict[str, dict[int, Path]]] = {}
    for model in dict.fromkeys(run.settings["model"] for run in runs):
        of_model = [run for run in runs if run.settings["model"] == model]
        _check_alike(of_model, _OF_TRAINING)
        groups[model] = _by_training(model, of_model)
    return groups


def each_run(
    groups: Mapping[str, Mapping[str, Mapping[int, Path]]],
    data: str | None = None,
    progress: Callable[[Path], None] | None = None,
) -> Iterator[tuple[str, str, int, LoadedRun]]:
    """Load the runs of `group_runs` one after another: model, training, seed and run.

    Args:
        groups: run directories by model, training and seed.
        data: where the runs' data lie now, if they were moved.
        progress: called with every directory before it is loaded.

    Raises:
        UserError: a run that cannot be read.
    """
    for model, trainings in groups.items():
        for training, by_seed in trainings.items():
            for seed, directory in by_seed.items():
                if progress is not None:
                    progress(directory)
                yield model, training, seed, load_run(directory, data)


def compared_pairs(trainings: Sequence[str]) -> list[tuple[str, str]]:
    """Which trainings are held against which; an interval meets its own only.

    >>> compared_pairs(["plain", "replay every 3", "replay every 5", "mirror every 5"])[-2:]
    [('replay every 3', 'plain'), ('replay every 5', 'plain')]
    """

    def parts(name: str) -> tuple[str, str, str]:
        method, _, optimizer = name.partition(", ")
        method, _, interval = method.partition(" every ")
        return method, interval, optimizer

    found = []
    for ours, other in _COMPARED:
        for a in trainings:
            for b in trainings:
                (m, i, o), (n, j, p) = parts(a), parts(b)
                if (m, n) == (ours, other) and o == p and ("" in (i, j) or i == j):
                    found.append((a, b))
    return found


def _expanded(path: Path) -> list[Path]:
    return study_runs(path) if (path / STUDY_FILE).exists() else [path]


def _described(directory: Path) -> _Described:
    """A run and what its `config.yaml` says; only what has finished counts."""
    try:
        settings = read_mapping(directory / "config.yaml", yaml.safe_load)
    except (FileNotFoundError, Damaged):
        settings = {}
    if not settings.keys() >= set(_SAID):
        load_run(directory)  # says what is wrong with it
        raise UserError(f"{directory / 'config.yaml'} is not a run's configuration; train the run anew.")
    if not (directory / "result.json").exists():
        raise UserError(f"{directory} is a run that has not finished; go on with it with train --resume first.")
    if Checkpoints(directory / "checkpoint").best_epoch() is None:
        raise UserError(f"{directory} has no checkpoint, so that its model is lost; train the run anew.")
    return _Described(directory, settings)


def _by_training(model: str, runs: Sequence[_Described]) -> dict[str, dict[int, Path]]:
    several = {
        key: len({run.settings.get(key) for run in runs if _has(run, key)}) > 1 for key in ("optimizer", "interval")
    }
    named: dict[str, list[_Described]] = {}
    for run in runs:
        name = run.settings["training"]
        if several["interval"] and _has(run, "interval"):
            name += f" every {run.settings['interval']}"
        named.setdefault(name + (f", {run.settings['optimizer']}" if several["optimizer"] else ""), []).append(run)
    for alike in named.values():
        _check_alike(alike, unused(alike[0].settings["training"]))
    methods = {run.settings["training"] for run in runs}
    if methods & {"mirror", "mirror-ascent"} and len(methods) > 1 and "replay" not in methods:
        raise UserError(
            f"{model} has runs of {' and '.join(sorted(methods))} and none of replay, the control with as many "
            "updates; add runs made with train --replay."
        )
    return {name: _by_seed(alike) for name, alike in named.items()}


def _has(run: _Described, key: str) -> bool:
    return key not in unused(run.settings["training"])


def _by_seed(runs: Sequence[_Described]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for run in runs:
        seed = run.settings["seed"]
        if seed in found:
            raise UserError(f"{found[seed]} and {run.directory} are the same training and seed; give one of them.")
        found[seed] = run.directory
    return dict(sorted(found.items()))


def _check_alike(runs: Sequence[_Described], free: Sequence[str]) -> None:
    """Refuse runs that differ in a setting that is not free, naming it."""
    first = runs[0]
    for other in runs[1:]:
        ours, theirs = _flat(first.settings, free), _flat(other.settings, free)
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{first.directory} and {other.directory} do not compare: {key} is {shown(ours.get(key))} and "
                    f"{shown(theirs.get(key))}; give runs of one setting."
                )


def _flat(settings: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in (*_FREE, *free, "hyper_parameters")}
    # The runs of a study that begins with another begin with one of it each.
    started = {"start_from": "another run"} if kept.pop("start_from", None) is not None else {}
    return {**kept, **started, **(settings.get("hyper_parameters") or {})}
