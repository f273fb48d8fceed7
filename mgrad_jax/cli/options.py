"""The options of commands: those that several declare alike, those made of declared settings; `key=value` arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, get_origin, get_type_hints

import typer

from mgrad_jax.declaration import check_choice, marked, spelling
from mgrad_jax.errors import UserError
from mgrad_jax.training.methods import METHODS
from mgrad_jax.training.settings import RunSettings, Settings

if TYPE_CHECKING:
    from mgrad_jax.training.config import RunConfig

_Number = TypeVar("_Number", int, float)

# What `--flat-minima` takes, from before there was `--method`.
_FLAT_MINIMA = ("mirror", *(name for name, method in METHODS.items() if method.record == "flat_minima"))
# Other ways to give `--method`.
METHOD_ALIASES = {
    "mirror": typer.Option("--mirror/--no-mirror", help="--method mirror, or plain."),
    "replay": typer.Option("--replay", help="--method replay."),
    "flat_minima": typer.Option("--flat-minima", hidden=True, help=f"--method, one of {', '.join(_FLAT_MINIMA)}."),
}

# What several commands declare.
FinishedRuns = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs, or of a study of `compare`.")
]
NewDirectory = Annotated[Path, typer.Option(help="Directory to write; it must not exist.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, or refused, and write nothing.")]
MovedData = Annotated[str | None, typer.Option(help="Where the runs' data lie now, if they were moved.")]
HyperParameters = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A hyper-parameter of every model that has it, or of one: freedom.dropout=0.9.",
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="N",
        help="Devices to train on: a number, or all; 1 by default, and all where several processes train.",
    ),
]
SharedBy = Annotated[
    str | None,
    typer.Option("--devices", metavar="N", help="Devices that share the run's tables: a number, or all; 1 by default."),
]


class Part(NamedTuple):
    """Some of the settings that a dataclass declares, by name."""

    group: Any
    names: tuple[str, ...]


def takes_settings(**groups: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command take settings, each as an option of its own.

    Args:
        **groups: the names of those parameters of the command that stand for several options, and the dataclass that
            declares these (`mgrad_jax.declaration`). The command is given an instance, of settings of a training
            (`Settings`, `RunSettings`) a `RunConfig`, and of a `Part` their values by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # `RunConfig`, which waits for JAX, is imported for type checkers only.
        own = inspect.signature(command, eval_str=True, locals={"RunConfig": Any}).parameters
        shown: list[inspect.Parameter] = []
        for name, parameter in own.items():
            shown += _options(groups[name]) if name in groups else [parameter.replace(kind=parameter.KEYWORD_ONLY)]

        def spread(**values: Any) -> None:
            command(**{name: _made(values, groups[name]) if name in groups else values[name] for name in own})

        # Not by `functools.wraps`, which would show the parameters of the command.
        spread.__name__, spread.__doc__ = command.__name__, command.__doc__
        spread.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        spread.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return spread

    return decorate


def config_of(values: Mapping[str, Any], group: Any = RunSettings) -> RunConfig:
    """The configuration that options ask for, by the names of the group's settings and of the aliases of `--method`.

    XLA is told of it where it has to be before JAX computes.
    """
    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.numerics import make_deterministic

    config = RunConfig(**{**_given(values, group), "training": _method(values)})
    if config.deterministic:
        make_deterministic()
    return config


def _made(values: Mapping[str, Any], group: Any) -> Any:
    """What a command is given for a group of settings."""
    if isinstance(group, Part):
        given = _given(values, group.group)
        return {name: given.get(name) for name in group.names}
    return config_of(values, group) if issubclass(group, Settings) else group(**_given(values, group))


def _options(group: Any) -> Iterator[inspect.Parameter]:
    """The parameters of a command that are the settings of a group."""
    group, chosen = group if isinstance(group, Part) else (group, marked(group))
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        if field.name not in chosen:
            continue
        told, hint = field.metadata, hints[field.name]
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        metavar, names = told["metavar"], told["option"] or (spelling(field),)
        if isinstance(default, tuple) and is_list(field):
            items = [f"{item:g}" if told["kind"] is float else item for item in default]
            hint, default = str | None, ",".join(items) or None
        elif told["kind"] is dict:
            several = default is inspect.Parameter.empty
            hint, default = (list[str] | None if several else str | None), None
            metavar = "KEY=VALUE" if several else "KEY=VALUE,..."
        elif field.name == "training":  # whose default holds where no alias is given
            hint, default = str | None, None
        elif get_origin(hint) is Literal:  # whose choices are checked with all else
            hint = str
        if spelling(field):
            yield _parameter(field.name, hint, default, typer.Option(*names, metavar=metavar, help=told["help"]))
        if field.name == "training":
            for name, option in METHOD_ALIASES.items():
                yield _parameter(name, str | None if name == "flat_minima" else bool | None, None, option)


def _parameter(name: str, hint: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])


def _given(values: Mapping[str, Any], group: Any) -> dict[str, Any]:
    """The settings of a group that the command line gives."""
    given = {}
    for field in dataclasses.fields(group):
        value, kind = values.get(field.name), field.metadata["kind"]
        if value is None:
            continue
        if kind is dict:
            value = pairs(spelling(field), value.split(",") if isinstance(value, str) else value)
        elif is_list(field):
            option = spelling(field)
            value = numbers(option, value, kind) if kind in (int, float) else names(option, value)
        given[field.name] = value
    return given


def is_list(field: dataclasses.Field[Any]) -> bool:
    """Whether a setting's option is a list with commas."""
    return isinstance(field.default, tuple) and "," in (field.metadata["metavar"] or "")


def _method(given: Mapping[str, Any]) -> str:
    """The name of the method; what excludes each other is an error."""
    name, mirror, flat_minima = (given.get(key) for key in ("training", "mirror", "flat_minima"))
    for what, value, choices in (("", name, METHODS), ("flat-minima ", flat_minima, _FLAT_MINIMA)):
        if value is not None:
            check_choice(f"unknown {what}method", value, choices)
    said = {
        f"--method {name}": name,
        "--mirror": "mirror" if mirror else None,
        "--no-mirror": "plain" if mirror is False else None,
        "--replay": "replay" if given.get("replay") else None,
        f"--flat-minima {flat_minima}": flat_minima,
    }
    options = [option for option, method in said.items() if method is not None]
    methods = {method for method in said.values() if method is not None}
    if len(methods) > 1:
        raise UserError(f"{' and '.join(options)} exclude each other; leave one of them out.")
    return methods.pop() if methods else Settings.training


def names(option: str, text: str) -> tuple[str, ...]:
    """The names in a list with commas."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise UserError(f"{option} {text} has an empty place; write names with commas between them.")
    return found


def numbers(option: str, text: str, kind: type[_Number]) -> tuple[_Number, ...]:
    """The numbers of a type in a list with commas."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what, example = ("whole numbers", "1,3,5") if kind is int else ("numbers", "0,0.5,1")
        raise UserError(f"{option} {text} is no list of {what}; write for example {option} {example}.") from None


def pairs(option: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a dictionary, the values read as numbers, booleans or text."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = (part.strip() for part in argument.partition("="))
        if not separator or not key or not text:
            raise UserError(
                f"{option} {argument} is not of the form key=value; write for example {option} dropout=0.8."
            )
        if key in values:
            raise UserError(f"{option} {key} is given twice; leave one of them out.")
        values[key] = scalar(text)
    return values


# As YAML 1.1 has them.
_TRUTH_VALUES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def scalar(text: str) -> Any:
    """A number in plain digits, a truth value, or text, with or without quotes."""
    if "_" not in text and text.isascii():
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    if text in (text.lower(), text.capitalize(), text.upper()) and text.lower() in _TRUTH_VALUES:
        return _TRUTH_VALUES[text.lower()]
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text


def devices_of(option: str | None, by_default: int | Literal["all"] = 1) -> int | Literal["all"]:
    """How many devices `--devices` asks for.

    Raises:
        UserError: it is neither a number nor "all".
    """
    from mgrad_jax.devices import parse_devices

    return by_default if option is None else parse_devices(option)
