"""How a setting is declared, once: its default, its meaning, its range or choices, and its option on the command line.

Settings are fields of dataclasses. Models' hyper-parameters, configurations of runs and the questions of the analyses
are declared and checked alike; the command line makes its options of the same fields.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mgrad_jax.errors import UserError, did_you_mean, shown

# What compiled programs can hold: 32 bits, as of the arrays, smaller numbers count as zero; seeds are without a sign.
INT32, UINT32 = 2**31 - 1, 2**32 - 1
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be.

    Attributes:
        least, most: bounds that belong to it.
        above, below: bounds that do not.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        """As tables show it: ">= 0, < 1"; empty where every number will do."""
        bounds = {">=": self.least, ">": self.above, "<=": self.most, "<": self.below}
        return ", ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)

    def in_words(self) -> str:
        """As it follows "it must" in a message: "be at least 0 and below 1"."""
        if (self.most, self.below) == (None, None):
            if self.least == 0:
                return "not be negative"
            if self.above == 0:
                return "be a positive number"
        if self.least is not None and self.most is not None:
            return f"be between {self.least} and {self.most}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return "be " + " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    kind: type | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    limit: float | None = None,
    choices: Collection[str] = (),
    option: Sequence[str] | None = None,
    metavar: str | None = None,
    **marks: bool,
) -> Any:
    """A field of a dataclass that is a setting.

    Args:
        default: its value unless given; without one it must be given. None stands for "not set".
        help: what it is, for the command line and for tables.
        kind: the type that is asked for, of each item in a tuple; by default that of the default (a whole number passes
            for a float).
        least, most, above, below: its range, see `Range`.
        limit: the largest number that a program can be made with, where that is less than what 32 bits hold.
        choices: what text may be; looked at when a value is checked.
        option: its spellings on the command line, `--` and its name by default; without any it has no option.
        metavar: what stands for its value in the command line's help.
        **marks: what else is to be known of it, in the words of those who ask (`marked`).

    >>> setting(0.3, "share dropped", least=0, below=1).metadata["range"].in_words()
    'be at least 0 and below 1'
    """
    sample = default[0] if isinstance(default, tuple) and default else default
    told = {
        "help": help,
        "kind": kind or (str if sample is dataclasses.MISSING else type(sample)),
        "range": Range(least, most, above, below),
        "limit": limit,
        "choices": choices,
        "option": option,
        "metavar": metavar,
        **marks,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=told)
    return dataclasses.field(default=default, metadata=told)


def spelling(field: dataclasses.Field[Any]) -> str:
    """The option of a setting on the command line; "" where there is none.

    >>> @dataclasses.dataclass
    ... class Example:
    ...     batch_size: int = setting(8, "Interactions per batch.")
    >>> spelling(dataclasses.fields(Example)[0])
    '--batch-size'
    """
    names = field.metadata.get("option")
    return f"--{field.name.replace('_', '-')}" if names is None else "".join(names[:1])


def marked(declared: Any, mark: str = "kind") -> tuple[str, ...]:
    """The names of the settings of a dataclass that were declared with a mark; of all by default."""
    return tuple(field.name for field in dataclasses.fields(declared) if field.metadata.get(mark))


def check_all(declared: Any, but: Collection[str] = (), *, as_options: bool = False) -> None:
    """Check all settings of a dataclass.

    Args:
        declared: an instance.
        but: names of settings that have no effect, and may be anything.
        as_options: whether messages name the options of the command line instead of the settings.

    Raises:
        UserError: one sentence with the name, the value and what it must be.
    """
    for field in dataclasses.fields(declared):
        if field.name not in but:
            value = getattr(declared, field.name)
            for item in value if isinstance(field.default, tuple) else (value,):
                check(field, item, spelling(field) if as_options else field.name)


def check(field: dataclasses.Field[Any], value: Any, name: str | None = None) -> None:
    """Refuse a value of another type, out of the declared range, or that no compiled program could hold.

    Args:
        field: declared with `setting`.
        value: what is given; of a tuple, one item.
        name: what the message calls it, the field's name by default.

    Raises:
        UserError: one sentence with the name, the value and what it must be.
    """
    told, name = field.metadata, name or field.name
    kind, choices = told.get("kind") or type(field.default), told.get("choices")
    if kind not in _KINDS or (value is None and field.default is None):
        return
    if choices:
        check_choice(f"{name} is" if name[:1] == "-" else f"unknown {name.replace('_', ' ')}", value, choices)
        return
    bounds: Range = told.get("range", Range())
    if not is_a(kind, value):
        words = bounds.in_words() if bounds.above == 0 else f"be {_KINDS[kind]}"
    elif kind in (bool, str):
        return
    elif value not in bounds:
        words = bounds.in_words()
    elif kind is float and bounds.above == 0 and not SMALLEST <= value <= LARGEST:
        words = f"be a number from {SMALLEST:.2g} to {LARGEST:.2g}"
    elif abs(value) > (limit := told.get("limit") or (UINT32 if isinstance(value, numbers.Integral) else LARGEST)):
        words = f"be at most {limit if isinstance(limit, int) else format(limit, '.2g')}"
    else:
        return
    raise UserError(f"{name} is {shown(value)}; it must {words}.")


def check_choice(said: str, value: Any, choices: Collection[str]) -> None:
    """Refuse what is not among the choices.

    Args:
        said: how the message begins; the value follows.
        value: what is given.
        choices: what it may be, in the order of the message.

    >>> check_choice("unknown split", "tset", ("valid", "test"))
    Traceback (most recent call last):
    mgrad_jax.errors.UserError: unknown split 'tset'; choose one of valid, test (did you mean test?).
    """
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{said} {shown(value)}; choose one of {', '.join(choices)}{did_you_mean(value, choices)}.")


def check_names(said: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse names that are not known.

    Args:
        said: how the message begins; the name follows.
        given: the names.
        known: what they may be, in the order of the message.

    >>> check_names("adam has no argument", {"beta": 1}, ("b1", "b2"))
    Traceback (most recent call last):
    mgrad_jax.errors.UserError: adam has no argument 'beta'; choose among b1, b2.
    """
    for name in given:
        if name not in known:
            raise UserError(f"{said} {shown(name)}; choose among {', '.join(known)}{did_you_mean(name, known)}.")


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it: mappings with names as keys, lists, and what these hold."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # NumPy's
        return value.item()
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_a(kind: type, value: Any) -> bool:
    """Whether a value is of a type; Python counts truth values among the numbers, and NaN is none."""
    if kind in (bool, str):
        return isinstance(value, kind)
    number = numbers.Integral if kind is int else numbers.Real
    return isinstance(value, number) and not isinstance(value, bool) and value == value
