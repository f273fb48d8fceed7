"""A sweep in its directory, which `mgrad_jax.training.sweep_directory` describes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mgrad_jax.data import load_interactions
from mgrad_jax.devices import mesh_or_none
from mgrad_jax.errors import Interrupted
from mgrad_jax.signals import held_back
from mgrad_jax.training.directories import held
from mgrad_jax.training.grid import SweepConfig
from mgrad_jax.training.sweep import MemberResult, SweepReport, check_sweep, sweep
from mgrad_jax.training.sweep_directory import SweepDirectory, is_begun
from mgrad_jax.training.sweep_tables import SweepOutcome

__all__ = ["SweepConfig", "SweepInterrupted", "SweepOutcome", "train_sweep"]


class SweepInterrupted(Interrupted):
    """The user stopped a sweep; `finished` of its `members` are on disk, in `directory`."""

    def __init__(self, directory: Path, finished: int, members: int) -> None:
        super().__init__(directory, f"stopped with {finished} of {members} members finished")
        self.finished, self.members = finished, members


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
    members = config.members()
    over = mesh_or_none(devices)
    with held(config.directory, "sweep", is_begun, resume) as check:
        data = load_interactions(config.base.data)
        check_sweep(data, members, slots)
        members[0].create_model(data)  # says what the data lack
        files = SweepDirectory(config, data, check)
        files.take_up()
        missing = [index for index in range(len(members)) if index not in files.records]

        def on_result(position: int, result: MemberResult) -> None:
            files.add(missing[position], result)

        def on_epoch(report: SweepReport) -> None:
            if progress is not None:
                progress(report._replace(finished=len(files.records), members=len(members)))

        try:
            if missing:
                left = [members[index] for index in missing]
                sweep(data, left, slots=slots, mesh=over, on_result=on_result, on_epoch=on_epoch)
        except KeyboardInterrupt:
            raise SweepInterrupted(config.directory, len(files.records), len(members)) from None
        with held_back(deliver=False):
            return files.conclude()
