"""`--config FILE`: the settings that a run's `config.yaml` holds, as the words of a command line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mgrad_jax.errors import UserError, did_you_mean, shown

# Settings whose option has another name, and tables of settings, each with the option for one of its entries.
_OPTIONS = {"training": "method"}
_TABLES = {"hyper_parameters": "hyper", "optimizer_args": "optimizer_arg", "flat_minima_args": "method_arg"}
# What tells where a run lies and what its data were.
_NOT_TAKEN = ("out", "data_digest")
_METHOD = ("method", "mirror", "replay", "flat_minima")


def words_of(file: str, spellings: Mapping[str, str], given: Collection[str]) -> list[str]:
    """The settings in a file as options, those left out that the command line gives itself.

    Args:
        file: what a run's `config.yaml` writes, also a part of it.
        spellings: of the command's options, by the names of their parameters.
        given: the parameters that the command line gives, and of tables "parameter key". Who names a method there takes
            neither the file's nor its arguments.

    Raises:
        UserError: a file that cannot be read, or a setting in it that there is no option for.
    """
    settings = _read(file)
    words: list[str] = []
    for name, value in settings.items():
        option = _TABLES.get(name, _OPTIONS.get(name, name))
        if name in _NOT_TAKEN or value is None or (option in given and name not in _TABLES):
            continue
        if name in ("training", "flat_minima_args") and set(_METHOD) & set(given):
            continue
        if name == "ks" and value == [5, 10, 20, 50]:  # of which there is no option
            continue
        if option not in spellings:
            known = sorted({*spellings, *_OPTIONS, *_TABLES} - {"config", "hyper", *_METHOD, *_TABLES.values()})
            raise UserError(
                f"{file} has the setting {shown(name)}, of which there is no option{did_you_mean(name, known)}."
            )
        words += _words(file, name, value, spellings[option], option, given)
    return words


def _words(file: str, name: str, value: Any, spelling: str, option: str, given: Collection[str]) -> list[str]:
    if name in _TABLES or name == "adversarial":
        if not isinstance(value, Mapping):
            raise UserError(f"{file} has {name} {shown(value)}; it must be a table of names and values.")
        if name == "adversarial":
            return [f"{spelling}={','.join(f'{key}={_text(item)}' for key, item in value.items())}"]
        own = {key: item for key, item in value.items() if f"{option} {key}" not in given and item is not None}
        return [f"{spelling}={key}={_text(item)}" for key, item in own.items()]
    if isinstance(value, bool):
        return [spelling] if value else []
    if isinstance(value, list):
        return [spelling, *map(str, value)]
    return [f"{spelling}={value}"]


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
