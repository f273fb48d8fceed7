"""A sweep and its directory: what was asked for, what came of every member, which setting is best.

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

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import yaml
from jax.sharding import Mesh

from mgrad_jax.data import Interactions, load_interactions
from mgrad_jax.devices import mesh
from mgrad_jax.errors import UserError, shown
from mgrad_jax.files import Damaged, Lock, locked, read_mapping, remove_leftovers, write_whole, written_whole
from mgrad_jax.signals import held_back
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import check_size, expand_grid
from mgrad_jax.training.identity import check_data, data_digest
from mgrad_jax.training.methods import unused
from mgrad_jax.training.numerics import UNSAID
from mgrad_jax.training.record import nothing_left, read_record, result_record
from mgrad_jax.training.settings import dataset_name
from mgrad_jax.training.sweep import MemberResult, SweepReport, check_sweep, sweep


class SweepInterrupted(KeyboardInterrupt):
    """The user stopped a sweep; `finished` of its `members` are on disk, in `directory`."""

    def __init__(self, directory: Path, finished: int, members: int) -> None:
        super().__init__(f"{directory}: stopped with {finished} of {members} members finished")
        self.directory = directory
        self.finished = finished
        self.members = members


@dataclass(frozen=True)
class SweepConfig:
    """Everything that determines a sweep.

    Attributes:
        base: what the grid does not vary; its `out` is not used.
        grid: lists of values by name, see `mgrad_jax.training.sweep.expand_grid`.
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


class SweepOutcome(NamedTuple):
    """What a sweep found: `summary`, best setting first, and the content of `best.json`."""

    summary: pd.DataFrame
    best: dict[str, Any]


def train_sweep(
    config: SweepConfig,
    *,
    resume: bool = False,
    slots: int | None = None,
    progress: Callable[[SweepReport], None] | None = None,
    devices: int | Literal["all"] = 1,
) -> SweepOutcome:
    """Train all members of a grid and keep the sweep's directory.

    Args:
        config: what to train, and where the directory is.
        resume: go on with the sweep that is there; members with a result are not trained again.
        slots: the most members side by side on a device.
        progress: called after every epoch of a group; counts finished members of an earlier process as well.
        devices: over how many members are spread; no setting of the sweep, which may be resumed on another number.

    Raises:
        UserError: bad input, a sweep already there, another grid than the one to be resumed, a damaged result, an
            output that cannot be written, or no member that did not diverge.
        SweepInterrupted: Ctrl-C; every member that had stopped is on disk.
    """
    directory = config.directory
    if resume and not directory.is_dir():
        raise _no_sweep(directory)
    over = None if devices == 1 else mesh(devices)
    with locked(directory) as lock:
        began = (directory / "config.yaml").exists()
        if not resume and (began or _members_on_disk(directory)):
            raise UserError(
                f"{directory} already holds a sweep; add --resume to go on with it, or choose another --out."
            )
        if resume and not began and not _members_on_disk(directory):
            raise _no_sweep(directory)
        data = load_interactions(config.base.data)
        members = config.members()
        check_sweep(data, members, slots)
        settings = {**config.to_dict(), "data_digest": data_digest(data)}
        if began:
            _check_same(directory, settings, data)
        members[0].create_model(data)  # says what the data lack
        # Without a configuration the members tell by their own digests whether they are of this sweep.
        found = {i: _read_member(directory, i, member, settings["data_digest"]) for i, member in enumerate(members)}
        records = {i: record for i, record in found.items() if record is not None}
        write_whole(directory / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        _train_missing(config, data, settings["data_digest"], members, records, lock, slots, progress, over)
        with held_back(deliver=False):
            lock.check()
            return _conclude(config, members, [records[i] for i in range(len(members))])


def _no_sweep(directory: Path) -> UserError:
    return UserError(f"{directory} holds no sweep (there is no config.yaml); leave --resume out.")


def _members_on_disk(directory: Path) -> bool:
    return any(directory.glob("members/*/result.json"))


def _train_missing(
    config: SweepConfig,
    data: Interactions,
    digest: str,
    members: Sequence[RunConfig],
    records: dict[int, dict[str, Any]],
    lock: Lock,
    slots: int | None,
    progress: Callable[[SweepReport], None] | None,
    mesh: Mesh | None,
) -> None:
    """Train the members without a record, and write each record as soon as there is one."""
    missing = [i for i in range(len(members)) if i not in records]
    before = len(records)

    def on_result(position: int, result: MemberResult) -> None:
        index = missing[position]
        record = _record(data, digest, result)
        with held_back():  # a member that is finished is written down
            lock.check()
            place = _member_directory(config.directory, index)
            remove_leftovers(place)
            write_whole(place / "result.json", json.dumps(record, indent=2) + "\n")
            records[index] = record

    def on_epoch(report: SweepReport) -> None:
        if progress is not None:
            progress(report._replace(finished=report.finished + before, members=len(members)))

    if not missing:
        return
    try:
        left = [members[i] for i in missing]
        sweep(data, left, slots=slots, mesh=mesh, on_result=on_result, on_epoch=on_epoch)
    except KeyboardInterrupt:
        raise SweepInterrupted(config.directory, len(records), len(members)) from None


def _member_directory(directory: Path, index: int) -> Path:
    return directory / "members" / f"{index:04d}"


def _record(data: Interactions, digest: str, result: MemberResult) -> dict[str, Any]:
    """The content of a member's `result.json`; `digest` is the data's."""
    record = result_record(
        result.config,
        data,
        {**result.config.to_dict(), "data_digest": digest},
        result,
        result.seconds,
    )
    return {**record, "diverged": result.diverged}


def _read_member(directory: Path, index: int, member: RunConfig, digest: str) -> dict[str, Any] | None:
    """The result of a member, None where it has not stopped yet.

    Raises:
        UserError: it is damaged, cannot be read now, or belongs to another sweep.
    """
    path = _member_directory(directory, index) / "result.json"
    try:
        record = read_record(path, {**member.to_dict(), "data_digest": digest})
        if not isinstance(record.get("diverged"), bool):
            raise Damaged("it does not say whether the member diverged")
    except FileNotFoundError:
        return None
    except Damaged as damage:
        raise UserError(f"{path} is damaged; delete it and resume, which trains the member anew ({damage}).") from None
    if not (record["diverged"] or nothing_left(record, member)):
        raise UserError(
            f"{path} is of a sweep to other epochs or patience; move it away and resume, which trains the member anew."
        )
    return record


def _check_same(directory: Path, settings: dict[str, Any], data: Interactions) -> None:
    """Refuse to resume with another grid, base or data, naming what differs."""
    path = directory / "config.yaml"
    remedy = "move it away and resume, or choose another --out; the members say themselves which sweep they are of"
    try:
        before = read_mapping(path, yaml.safe_load)
    except Damaged as damage:
        raise UserError(f"{path} is damaged and cannot be read ({damage}); {remedy}.") from None
    if not isinstance(before.get("grid"), dict):
        raise UserError(f"{path} is not a sweep's configuration; {remedy}.")
    check_data(directory, before, settings, data)
    old, new = _flat(before), _flat(settings)
    ignored = ("data", "data_digest", *_without_effect(settings))
    differing = [key for key in {**old, **new} if key not in ignored and old.get(key) != new.get(key)]
    if differing:
        changes = ", ".join(f"{key} was {shown(old.get(key))} and is {shown(new.get(key))}" for key in differing)
        raise UserError(
            f"{directory} was begun with another grid ({changes}); resume with that, or choose another --out."
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


def _conclude(config: SweepConfig, members: Sequence[RunConfig], records: Sequence[dict[str, Any]]) -> SweepOutcome:
    """Write the tables, the best setting and the heat map."""
    directory, names = config.directory, config.base.metric_names
    results = _results(config, members, records)
    summary = _summary(config, results)
    write_whole(directory / "results.csv", results.to_csv(index=False))
    write_whole(directory / "summary.csv", summary.to_csv(index=False))
    if summary["diverged"].eq(summary["seeds"]).all():
        raise UserError(f"{directory}: every member diverged; lower the learning rate or alpha1 and alpha2.")
    top = summary.iloc[0]
    chosen = results[_same_setting(results, top, config.axes)]
    best = {
        "setting": {axis: _plain(top[axis]) for axis in config.axes},
        "metric": config.base.metric,
        "seeds": [int(seed) for seed in chosen["seed"]],
        "members": chosen["member"].tolist(),
        **{
            split: {name: {k: _plain(top[f"{split}_{name}_{k}"]) for k in ("mean", "std")} for name in names}
            for split in ("valid", "test")
        },
    }
    write_whole(directory / "best.json", json.dumps(best, indent=2) + "\n")
    if all(len(config.grid.get(name, ())) > 1 for name in ("alpha1", "alpha2")):
        draw_heatmap(summary, directory / "heatmap.png", config)
    return SweepOutcome(summary, best)


def _results(config: SweepConfig, members: Sequence[RunConfig], records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per member."""
    names = config.base.metric_names
    rows = [
        {
            "member": f"{index:04d}",
            **config.setting(member),
            "seed": member.seed,
            "epochs_run": record["epochs_run"],
            "best_epoch": record["best_epoch"],
            "diverged": record["diverged"],
            **{f"{split}_{name}": record[split].get(name) for split in ("valid", "test") for name in names},
            "seconds": round(sum(record["seconds"].values()), 3),
        }
        for index, (member, record) in enumerate(zip(members, records, strict=True))
    ]
    return pd.DataFrame(rows)


def _summary(config: SweepConfig, results: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, the best first; a setting with a member that diverged comes after those without."""
    metrics = [f"{split}_{name}" for split in ("valid", "test") for name in config.base.metric_names]
    rows = []
    for _, part in results.groupby(config.axes or (lambda _: 0), sort=False, dropna=False):
        values = part[metrics].astype(float)
        row = {**part.iloc[0][config.axes].to_dict(), "seeds": len(part), "diverged": int(part["diverged"].sum())}
        for name in metrics:
            row[f"{name}_mean"], row[f"{name}_std"] = values[name].mean(), values[name].std()
        rows.append(row)
    table = pd.DataFrame(rows)
    order = np.lexsort((-table[f"valid_{config.base.metric}_mean"].fillna(-1.0), table["diverged"] > 0))
    return table.iloc[order].reset_index(drop=True)


def _same_setting(results: pd.DataFrame, setting: pd.Series, axes: Sequence[str]) -> np.ndarray:
    same = np.ones(len(results), bool)
    for axis in axes:
        value = setting[axis]
        same &= results[axis].isna().to_numpy() if pd.isna(value) else (results[axis] == value).to_numpy()
    return same


def _plain(value: Any) -> Any:
    """A cell as JSON has it: no NaN, no numpy."""
    if isinstance(value, (float, np.floating)) and np.isnan(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def draw_heatmap(summary: pd.DataFrame, path: Path, config: SweepConfig) -> None:
    """Draw the mean selection metric on validation over alpha1 and alpha2; other axes take their best value."""
    from matplotlib.figure import Figure

    metric = f"valid_{config.base.metric}_mean"
    table = summary.pivot_table(index="alpha2", columns="alpha1", values=metric, aggfunc="max")
    values = table.to_numpy()
    figure = Figure(figsize=(1.6 + 0.9 * values.shape[1], 1.6 + 0.6 * values.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            is_best = value == np.nanmax(values)
            axes.text(
                column,
                row,
                f"{value:.4f}",
                ha="center",
                va="center",
                color="black" if value > middle else "white",
                fontweight="bold" if is_best else "normal",
            )
    axes.set(xlabel="alpha1", ylabel="alpha2", title=f"{config.base.model}, validation {config.base.metric}")
    axes.set_xticks(range(values.shape[1]), [f"{x:g}" for x in table.columns])
    axes.set_yticks(range(values.shape[0]), [f"{x:g}" for x in table.index])
    figure.colorbar(image)
    with written_whole(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)
