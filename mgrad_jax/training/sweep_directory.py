"""The directory of a sweep: what was asked for, what came of every member, which setting is best.

| file | holds |
|---|---|
| `config.yaml` | the base configuration, the grid, the seeds, and a digest of the data |
| `members/<id>/result.json` | a member's result, as of a single run; there as soon as the member has stopped |
| `results.csv` | one row per member |
| `summary.csv` | one row per setting: mean and standard deviation over its seeds |
| `best.json` | the setting with the best mean selection metric on validation |
| `heatmap.png` | that metric over alpha1 and alpha2, where both vary (as the paper's Fig. 5) |
| `.lock` | the process that writes, while it does |

The members' results are what is precious: tables, best setting and heat map are made anew from them at every end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError, shown
from mgrad_jax.files import Damaged, read_mapping, remove_leftovers, write_whole
from mgrad_jax.signals import held_back
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import SweepConfig
from mgrad_jax.training.identity import check_data, identity
from mgrad_jax.training.methods import unused
from mgrad_jax.training.numerics import UNSAID
from mgrad_jax.training.record import nothing_left, read_record, result_record
from mgrad_jax.training.sweep import MemberResult
from mgrad_jax.training.sweep_tables import SweepOutcome, draw_heatmap, outcome_of


def is_begun(path: Path) -> bool:
    """Whether a directory holds a sweep."""
    return (path / "config.yaml").exists() or any(path.glob("members/*/result.json"))


class SweepDirectory:
    """The files of a sweep that is trained, in a directory that this process holds.

    Args:
        config, data: the sweep, and what it trains on.
        check: called before anything is written; from `mgrad_jax.training.directories.held`.

    Attributes:
        records: the results of the members that have stopped, by their place in the sweep.
    """

    def __init__(self, config: SweepConfig, data: Interactions, check: Callable[[], None]) -> None:
        self.path, self.config, self._data, self._check = config.directory, config, data, check
        self._digest = data.digest
        self.records: dict[int, dict[str, Any]] = {}

    def take_up(self) -> None:
        """Read the results of the members that have stopped, and write down what is going to be trained.

        Raises:
            UserError: what is there is another sweep's, damaged, or cannot be read now.
        """
        settings = {**self.config.to_dict(), "data_digest": self._digest}
        if (self.path / "config.yaml").exists():
            self._check_same(settings)
        # Without a configuration the members tell by their own digests whether they are of this sweep.
        found = {index: self._read(index, member) for index, member in enumerate(self.config.members())}
        self.records = {index: record for index, record in found.items() if record is not None}
        write_whole(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    def add(self, index: int, result: MemberResult) -> None:
        """Write the result of a member that has stopped."""
        record = result_record(result.config, self._data, self._run(result.config), result, result.seconds)
        record["diverged"] = result.diverged
        with held_back():  # a member that is finished is written down
            self._check()
            place = self._member(index)
            remove_leftovers(place)
            write_whole(place / "result.json", json.dumps(record, indent=2) + "\n")
            self.records[index] = record

    def conclude(self) -> SweepOutcome:
        """Write the tables, the best setting and the heat map, once all members have stopped."""
        self._check()
        outcome = outcome_of(self.config, [self.records[index] for index in range(len(self.config.members()))])
        write_whole(self.path / "results.csv", outcome.results.to_csv(index=False))
        write_whole(self.path / "summary.csv", outcome.summary.to_csv(index=False))
        if outcome.summary["diverged"].eq(outcome.summary["seeds"]).all():
            raise UserError(f"{self.path}: every member diverged; lower the learning rate or alpha1 and alpha2.")
        write_whole(self.path / "best.json", json.dumps(outcome.best, indent=2) + "\n")
        if all(len(self.config.grid.get(name, ())) > 1 for name in ("alpha1", "alpha2")):
            draw_heatmap(outcome.summary, self.path / "heatmap.png", self.config)
        return outcome

    def _member(self, index: int) -> Path:
        return self.path / "members" / f"{index:04d}"

    def _run(self, member: RunConfig) -> str:
        return identity({**member.to_dict(), "data_digest": self._digest})

    def _read(self, index: int, member: RunConfig) -> dict[str, Any] | None:
        """The result of a member, None where it has not stopped yet."""
        path = self._member(index) / "result.json"
        try:
            record = read_record(path, self._run(member))
            if not isinstance(record.get("diverged"), bool):
                raise Damaged("it does not say whether the member diverged")
        except FileNotFoundError:
            return None
        except Damaged as damage:
            raise UserError(
                f"{path} is damaged; delete it and resume, which trains the member anew ({damage})."
            ) from None
        if not (record["diverged"] or nothing_left(record, member)):
            raise UserError(
                f"{path} is of a sweep to other epochs or patience; move it away and resume, which trains the member "
                "anew."
            )
        return record

    def _check_same(self, settings: dict[str, Any]) -> None:
        """Refuse to resume with another grid, base or data, naming what differs."""
        path = self.path / "config.yaml"
        remedy = "move it away and resume, or choose another --out; the members say themselves which sweep they are of"
        try:
            before = read_mapping(path, yaml.safe_load)
        except Damaged as damage:
            raise UserError(f"{path} is damaged and cannot be read ({damage}); {remedy}.") from None
        if not isinstance(before.get("grid"), dict):
            raise UserError(f"{path} is not a sweep's configuration; {remedy}.")
        check_data(self.path, before, settings, self._data)
        old, new = _flat(before), _flat(settings)
        ignored = ("data", "data_digest", *_without_effect(settings))
        differing = [key for key in {**old, **new} if key not in ignored and old.get(key) != new.get(key)]
        if differing:
            changes = ", ".join(f"{key} was {shown(old.get(key))} and is {shown(new.get(key))}" for key in differing)
            raise UserError(
                f"{self.path} was begun with another grid ({changes}); resume with that, or choose another --out."
            )


def _without_effect(settings: Mapping[str, Any]) -> set[str]:
    """What changes nothing in any of the sweep's trainings, unless it is an axis."""
    trainings = settings["grid"].get("training") or [settings["training"]]
    return set.intersection(*(set(unused(training)) for training in trainings)) - set(settings["grid"])


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, hyper-parameters and axes side by side; an axis takes its setting's place."""
    nested = ("hyper_parameters", "grid")
    flat = {**UNSAID, **{key: value for key, value in settings.items() if key not in nested}}
    hyper = settings.get("hyper_parameters")
    return {**flat, **(hyper if isinstance(hyper, dict) else {}), **settings["grid"]}
