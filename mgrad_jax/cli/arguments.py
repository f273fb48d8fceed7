"""What every command checks of the words it is given, before anything is made of them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperCommand

from mgrad_jax.cli.config_file import words_of
from mgrad_jax.errors import UserError, shown


class Command(TyperCommand):
    """A command that refuses an option given twice, an empty value, and a number that is not in plain digits."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check, then parse as typer does; that alone would take the last of two values in silence."""
        args = _with_config(self.params, args)
        seen: dict[str, str] = {}
        numbers = _number_options(self.callback)
        for option, parameter, values in _given(self.params, args):
            if parameter is not None and not parameter.multiple:
                before = seen.get(parameter.name)
                if before == option:
                    raise UserError(f"{option} is given twice; leave one of them out.")
                if before is not None:
                    raise UserError(f"{before} and {option} exclude each other; leave one of them out.")
                seen[parameter.name] = option
            for value in values:
                if not value.strip() and not (value and option == "--separator"):  # which may be a blank or a tab
                    raise UserError(f"{option} is {'blank' if value else 'empty'}; give it a value or leave it out.")
                if parameter is not None and parameter.name in numbers:
                    check_plain(option, value)
        return super().parse_args(ctx, args)


def _with_config(parameters: Sequence[Any], words: list[str]) -> list[str]:
    """The words, before them the settings of the file in `--config` that they do not give."""
    options = [(p, values) for _, p, values in _given(parameters, words) if p is not None]
    files = [values[0] for p, values in options if p.name == "config" and values and values[0]]
    if not files:
        return words
    keys = [f"{p.name} {value.partition('=')[0].strip()}" for p, values in options if p.multiple for value in values]
    given = {*(p.name for p, _ in options), *keys}
    return [*words_of(files[0], given), *words]


def check_plain(what: str, text: str) -> None:
    """Refuse what Python reads as a number and other programs do not: 1_000, or digits of other scripts."""
    if "_" in text or not text.isascii():
        raise UserError(f"{what} {shown(text)} is not a number in plain digits; write for example 1000 or 1e-3.")


def _given(parameters: Sequence[Any], words: Sequence[str]) -> Iterator[tuple[str, Any, Sequence[str]]]:
    """The options with their parameter and values, and the arguments, as typer's parser will tell them apart."""
    known = {spelling: p for p in parameters for spelling in (*p.opts, *p.secondary_opts) if spelling.startswith("-")}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            return
        option, separator, value = word.partition("=")
        parameter = known.get(option)
        if parameter is None:
            yield word or "an argument", None, [word]
            continue
        following = 0 if parameter.is_flag else parameter.nargs - bool(separator)
        yield option, parameter, [*([value] if separator else []), *words[position : position + following]]
        position += following


def _number_options(callback: Any) -> set[str]:
    """The names of a command's options that are numbers."""
    hints = typing.get_type_hints(inspect.unwrap(callback))
    return {name for name, hint in hints.items() if _kinds(hint) <= {int, float, type(None)}}


def _kinds(hint: Any) -> set[Any]:
    """The types a hint is made of: {float} of tuple[float, float], {int, None} of int | None."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union, tuple):
        return set().union(*(_kinds(part) for part in typing.get_args(hint)))
    return {hint}
