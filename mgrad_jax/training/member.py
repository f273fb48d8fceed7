"""A member of a finished sweep as a run of its own: a sweep keeps results, and no parameters.

Members equal single runs, so the parameters come from training the member once more, into `members/<id>/run`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mgrad_jax.declaration import marked
from mgrad_jax.errors import UserError, shown
from mgrad_jax.files import Damaged, read_mapping
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.grid import AXES, expand_grid


class Member(NamedTuple):
    """A member of a sweep: its id, its place in words, and its configuration as a run inside the sweep."""

    name: str
    description: str
    config: RunConfig


def find_member(directory: Path, data: str | None = None) -> Member | None:
    """The member that a directory stands for: a sweep for the first seed of its best setting, a member for itself.

    Args:
        directory: what may be a sweep or one of its members.
        data: where the sweep's data lie now, if not where the sweep found them.

    Returns:
        None where the directory is neither.

    Raises:
        UserError: a sweep that cannot be read, is not finished or has no such member.
    """
    if (settings := _read_sweep(directory)) is not None:
        name, what = _best(directory), "first seed of the best setting"
    elif directory.parent.name == "members" and (settings := _read_sweep(directory.parent.parent)) is not None:
        name, what = directory.name, f"of {directory.parent.parent}"
        directory = directory.parent.parent
    else:
        return None
    members = _members(directory, settings, data)
    if not (name.isascii() and name.isdigit() and int(name) < len(members)):
        raise UserError(f"{directory} has no member {shown(name)}; its members are 0000 to {len(members) - 1:04d}.")
    member = members[int(name)]
    hyper = {**dataclasses.asdict(member), **member.hyper_parameters}
    setting = ", ".join(f"{axis} {hyper[axis]}" for axis in settings["grid"])
    description = f"member {name} ({', '.join(filter(None, (setting, f'seed {member.seed}')))}), {what}"
    return Member(name, description, dataclasses.replace(member, out=str(directory / "members" / name / "run")))


def _read_sweep(directory: Path) -> dict[str, Any] | None:
    """The content of a sweep's `config.yaml`, None where there is none or it is that of a single run."""
    file = directory / "config.yaml"
    if not file.is_file():
        return None
    try:
        settings = read_mapping(file, yaml.safe_load)
    except Damaged as damage:
        raise UserError(f"{file} cannot be read ({damage}); restore it and start again.") from None
    if "grid" not in settings:
        return None
    seeds = settings.get("seeds")
    if not isinstance(settings["grid"], dict) or not isinstance(seeds, list) or not seeds:
        raise UserError(f"{file} is not a sweep's configuration; restore it and start again.")
    return settings


def _best(directory: Path) -> str:
    file = directory / "best.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["members"][0])
    except FileNotFoundError:
        raise UserError(
            f"{directory} is a sweep without a best setting yet; finish it with --resume, or give one of its members, "
            f"{directory / 'members' / '0000'}."
        ) from None
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{file} is damaged; `mgrad-jax sweep` with --resume writes it again, or give one of the sweep's members."
        ) from None


def _members(directory: Path, settings: dict[str, Any], data: str | None) -> list[RunConfig]:
    """The members of a sweep in their order, made of its configuration."""
    grid, seeds = settings["grid"], settings["seeds"]
    try:
        values = {name: value for name, value in settings.items() if name in marked(RunConfig)}
        # The file leaves out what the grid replaces, and the rest may be valid with a value of the grid only.
        values |= {name: given[0] for name, given in grid.items() if name in AXES}
        hyper = {name: given[0] for name, given in grid.items() if name not in AXES}
        values["hyper_parameters"] = {**values["hyper_parameters"], **hyper}
        base = RunConfig.of({**values, "seed": seeds[0], "data": data or values["data"]})
        return expand_grid(base, {**grid, "seed": seeds})
    except (LookupError, TypeError) as error:
        file = directory / "config.yaml"
        raise UserError(f"{file} is not a sweep's configuration ({error}); restore it and start again.") from None


def differs(directory: Path, result: dict[str, Any]) -> bool:
    """Whether a member trained again has other metrics than the sweep recorded, as on another machine it may."""
    try:
        recorded = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        return any(abs(recorded["valid"][name] - value) > 1e-6 for name, value in result["valid"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
