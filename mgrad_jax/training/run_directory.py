"""The directory of a run: what was asked for, what happened, where it stands, what came out.

| file | holds |
|---|---|
| `config.yaml` | the whole configuration, defaults included, and a digest of the data |
| `checkpoint/` | the latest and the best state; each with the configuration and the history up to its epoch |
| `kept/` | the parameters of every N-th epoch, where they are asked for (`mgrad_jax.training.kept`) |
| `history.csv` | one row per epoch: loss and its parts, validation and test metrics, seconds |
| `result.json` | the best epoch's metrics and everything needed to compare runs; written when training ends |
| `curves.png` | loss and recall over the epochs |
| `.lock` | the process that writes, while it does |

The checkpoints are what is precious. Everything else is made again from them where it is missing or damaged.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import yaml

from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError
from mgrad_jax.files import Damaged, read_mapping, write_whole
from mgrad_jax.signals import held_back
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.checkpoint_directory import CheckpointLost, entries_of
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.directories import of_first
from mgrad_jax.training.epoch import TrainState
from mgrad_jax.training.fit import EpochReport, FitResult
from mgrad_jax.training.history import History, draw_curves, read_rows
from mgrad_jax.training.identity import (
    check_data,
    differences,
    differing_machine,
    identity,
    machine,
    run_settings,
    spread,
)
from mgrad_jax.training.kept import KeptParams
from mgrad_jax.training.record import nothing_left, read_record, result_record


def is_begun(path: Path) -> bool:
    """Whether a run's directory holds anything that took an epoch to compute."""
    history = path / "history.csv"
    rows = history.exists() and history.stat().st_size > 0
    return rows or (path / "result.json").exists() or latest_epoch(path) is not None


def latest_epoch(path: Path) -> int | None:
    """The last epoch of which a run's directory holds a complete checkpoint, None where there is none."""
    entries = entries_of(path / "checkpoint")
    return entries[-1].epoch if entries else None


class RunDirectory:
    """The files of a run that is trained, in a directory that this process holds, or the first of several.

    All processes make the same calls. The first one reads and writes, and the others are told what it found.

    Args:
        config, data: the run, and what it trains on.
        check: called before anything is written; from `mgrad_jax.training.directories.held`.
        devices: how many the run is split over.

    Attributes:
        checkpoints: the states that are kept to go on from.
        kept: the parameters of some epochs.
    """

    def __init__(self, config: RunConfig, data: Interactions, check: Callable[[], None], devices: int) -> None:
        self.config, self.data, self.path = config, data, config.directory
        self._check, self._devices = check, devices
        self.settings = run_settings(config, data)
        self._run = identity(self.settings)
        self.kept = KeptParams(self.path, config.keep_every, self._run)
        self.history = History(config.metric_names)
        self.checkpoints = Checkpoints(self.path / "checkpoint", self._write_history)

    @of_first
    def take_up(self) -> dict[str, Any] | None:
        """Go on with the run that is there, if one is; returns its result where nothing is left to train.

        What else a finished run lacks is made again.

        Raises:
            UserError: it is another run than this one, or cannot be read.
        """
        if not is_begun(self.path):
            return None
        self._read_history()
        try:
            result = read_record(self.path / "result.json", self._run)
        except (FileNotFoundError, Damaged):
            return None
        epoch = self.checkpoints.latest_epoch()
        if not nothing_left(result, self.config) or epoch not in (None, result["epochs_run"]):
            return None
        if epoch is not None:  # whoever removed the checkpoints of a finished run wanted no more of it
            if not self.checkpoints.are_intact():
                return None
            with held_back():
                self.checkpoints.tidy()
                self._make_whole()
        if result["epochs_run"] > self.config.epochs:
            _warn(f"{self.path} has {result['epochs_run']} epochs, more than were asked for; it stays as it is.")
        return result

    @of_first
    def needs_start(self) -> bool:
        """Whether the parameters of another run are needed to begin with.

        A resumed run does without them, unless a best epoch that was lost has to be trained again.
        """
        start = self.config.start_from
        return start is not None and (self.checkpoints.latest_epoch() is None or Path(start).exists())

    @of_first
    def begin(self, state: TrainState) -> None:
        """Write down what is going to be trained, and checkpoints of these shapes; from here on the run can be resumed.

        Raises:
            UserError: the disk has no room for them.
        """
        epoch = self.checkpoints.latest_epoch()
        if epoch is None and is_begun(self.path):
            _warn(f"{self.path} has no checkpoints any more; it is trained from the beginning.")
        if len(self.history.rows()) < (epoch or 0):
            _warn(f"{self.path / 'history.csv'} lacks epochs, of which checkpoints of earlier versions hold no copy.")
        self._write_settings()
        if self.history.text:
            self.history.restore(self.path / "history.csv")
        (self.path / "result.json").unlink(missing_ok=True)  # it tells of fewer epochs
        n_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state)))
        best = self.checkpoints.best_epoch() or 0
        self.checkpoints.check_space(n_bytes, self.kept.least_bytes(self.config, state.params, epoch or 0, best))
        self._note()

    def add(self, report: EpochReport) -> None:
        """Take an epoch into the history, which its checkpoint will hold; by each process for itself."""
        self._check()
        self.history.append(report)
        self._note()

    @of_first
    def conclude(self, outcome: FitResult) -> dict[str, Any]:
        """Write what a finished run has besides, once its checkpoints are known to be there; returns the result."""
        self._check()
        self.checkpoints.tidy()
        if self.checkpoints.latest_epoch() != outcome.epochs_run:
            raise UserError(f"{self.path} lost its checkpoint of epoch {outcome.epochs_run}; repeat with --resume.")
        self.checkpoints.read_notes("best")
        rows = self.history.rows()
        # The whole run's, also where it was resumed; compilation is this process's.
        seconds = {
            "compile": outcome.seconds["compile"],
            "train": math.fsum(row["seconds_train"] for row in rows),
            "evaluate": math.fsum(row["seconds_evaluate"] for row in rows),
        }
        result = result_record(self.config, self.data, self._run, outcome, seconds, self._devices)
        write_whole(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        (self.path / "curves.png").unlink(missing_ok=True)  # those of fewer epochs
        self._make_whole()
        return result

    def _read_history(self) -> None:
        """Check that what is there is this run, and read its history."""
        epoch = self.checkpoints.latest_epoch()
        place, notes = (self.path, {}) if epoch is None else self.checkpoints.read_notes("latest")
        before = notes["run"] if notes else read_settings(self.path)
        self._check_same(place, before)
        with contextlib.suppress(CheckpointLost):  # the latest is enough to go on
            place, best = self.checkpoints.read_notes("best") if notes else (place, {})
            self._check_same(place, best.get("run", before))
        self.history.text = notes["history"] if notes else read_rows(self.path / "history.csv")
        self.history.rewind(epoch or 0)
        if notes and (changes := differing_machine(notes["machine"], self._devices)):
            _warn(f"{self.path} was trained elsewhere ({changes}); the last bits of its numbers may differ here.")

    def _check_same(self, place: Path, before: Mapping[str, Any]) -> None:
        """Refuse what was made on other data or with other settings, naming what differs."""
        check_data(place, before, self.settings, self.data)
        if changes := differences(before, self.settings):
            raise UserError(
                f"{place} was begun with other settings ({changes}); resume with those, or choose another --out."
            )

    def _note(self) -> None:
        """Tell the next checkpoint whose it is, and what happened up to its epoch."""
        where = {**machine(), **spread(self._devices)}
        self.checkpoints.notes = {"run": self.settings, "machine": where, "history": self.history.text}

    def _write_history(self, notes: Mapping[str, Any]) -> None:
        # Made again from the checkpoint, should it not survive a power loss.
        write_whole(self.path / "history.csv", notes["history"], durable=False)

    def _write_settings(self) -> None:
        write_whole(self.path / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False))

    def _make_whole(self) -> None:
        """Make the files again that are missing or damaged, of those that follow from the history and the settings."""
        try:
            before = read_mapping(self.path / "config.yaml", yaml.safe_load)
            is_this = before.get("data_digest") == self.settings["data_digest"] and not differences(
                before, self.settings
            )
        except (FileNotFoundError, Damaged):
            is_this = False
        if not is_this:
            self._write_settings()
        if self.history.text:
            self.history.restore(self.path / "history.csv")
            if not _is_png(self.path / "curves.png"):
                draw_curves(self.history, self.path / "curves.png", self.config)


def _is_png(path: Path) -> bool:
    """Whether a file is an image that was written to its end."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content.startswith(b"\x89PNG") and b"IEND" in content[-12:]


def _warn(sentence: str) -> None:
    warnings.warn(sentence, UserWarning, stacklevel=4)


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a run's `config.yaml`.

    Raises:
        UserError: there is no run, or the file is missing, damaged or cannot be read now.
    """
    file = path / "config.yaml"
    try:
        return read_mapping(file, yaml.safe_load)
    except FileNotFoundError:
        if latest_epoch(path) is None:
            raise UserError(f"{path} holds no run (there is no config.yaml); give the directory of one.") from None
        reason = "is missing"
    except Damaged as damage:
        reason = f"is damaged ({damage})"
    raise UserError(f"{file} {reason}; repeat the command that trained the run with --resume, which writes it again.")
