"""`--config FILE`: the settings that a run's `config.yaml` holds, as the words of a command line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mgrad_jax.cli.options import METHOD_ALIASES
from mgrad_jax.declaration import plain, spelling
from mgrad_jax.errors import UserError, did_you_mean, shown
from mgrad_jax.training.settings import RunSettings

# What tells where a run lies and what its data were.
_NOT_TAKEN = ("out", "data_digest")


def words_of(file: str, given: Collection[str]) -> list[str]:
    """The settings in a file as options, those left out that the command line gives itself.

    Args:
        file: what a run's `config.yaml` writes, also a part of it.
        given: the settings that the command line gives, and of tables "setting key". Who names a method there takes
            neither the file's nor its arguments.

    Raises:
        UserError: a file that cannot be read, or a setting in it that there is no option for.
    """
    declared = {field.name: field for field in fields(RunSettings)}
    has_method = not {"training", *METHOD_ALIASES}.isdisjoint(given)
    words: list[str] = []
    for name, value in _read(file).items():
        if name in _NOT_TAKEN or value is None or (has_method and name in ("training", "flat_minima_args")):
            continue
        field = declared.get(name)
        if field is not None and (option := spelling(field)):
            if field.metadata["kind"] is dict:
                words += _table(file, name, value, option, given, repeated=field.default is MISSING)
            elif name not in given:
                words += _words(value, option)
        elif field is None or value != plain(field.default):
            known = sorted(name for name, field in declared.items() if spelling(field))
            raise UserError(
                f"{file} has the setting {shown(name)}, of which there is no option{did_you_mean(name, known)}."
            )
    return words


def _words(value: Any, option: str) -> list[str]:
    if isinstance(value, bool):
        return [option] if value else []
    return [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]


def _table(file: str, name: str, table: Any, option: str, given: Collection[str], *, repeated: bool) -> list[str]:
    """A table of arguments: one option for each entry, or one for all."""
    if not isinstance(table, Mapping):
        raise UserError(f"{file} has {name} {shown(table)}; it must be a table of names and values.")
    if not repeated:
        entries = ",".join(f"{key}={_text(item)}" for key, item in table.items())
        return [] if name in given else [f"{option}={entries}"]
    own = {key: item for key, item in table.items() if f"{name} {key}" not in given and item is not None}
    return [f"{option}={key}={_text(item)}" for key, item in own.items()]


def _text(value: Any) -> str:
    """A value as `key=value` reads it: text in quotes, lest it be taken for a number."""
    return f"'{value}'" if isinstance(value, str) else str(value)


def _read(file: str) -> dict[str, Any]:
    import yaml

    from mgrad_jax.files import Damaged, read_mapping

    try:
        return read_mapping(Path(file), yaml.safe_load)
    except FileNotFoundError:
        raise UserError(f"--config {file} does not exist; give the config.yaml of a run.") from None
    except Damaged as damage:
        raise UserError(
            f"--config {file} is no run's configuration ({damage}); give the config.yaml of a run."
        ) from None
