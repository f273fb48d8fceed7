"""How a configuration declares hyper-parameters: default, meaning, range, and whether a sweep may trace them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mgrad_jax.errors import UserError, shown

# What compiled programs can hold: 32 bits, as of the arrays; seeds are without a sign.
_LARGEST_WHOLE, _LARGEST = 2**32 - 1, float(np.finfo(np.float32).max)
MOST_LAYERS = 100  # a limit: each is written out in the program


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a hyper-parameter may be.

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
                return "be positive"
        if self.least is not None and self.most is not None:
            return f"be between {self.least} and {self.most}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return "be " + " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


def hyper(
    default: Any,
    help: str,
    *,
    traced: bool = False,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    limit: float | None = None,
) -> Any:
    """A field of a `ModelConfig`, under the name that the reference code gives the hyper-parameter.

    Args:
        default: its value unless given; its type is the type that is asked for (a whole number passes for a float).
        help: what it is, for tables.
        traced: whether the model holds it as a `TracedHyperParameter` of the same name, so that one compiled program
            serves a whole sweep of its values. Not for what decides shapes or the structure of the program.
        least, most, above, below: its range, see `Range`.
        limit: the largest number that a program can be made with, where that is less than what 32 bits hold.

    >>> hyper(0.3, "share dropped", least=0, below=1).metadata["range"].in_words()
    'be at least 0 and below 1'
    """
    numbers = {"range": Range(least, most, above, below), "limit": limit}
    return dataclasses.field(default=default, metadata={"help": help, "traced": traced, **numbers})


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value of another type, out of the declared range, or that no compiled program could hold.

    Raises:
        UserError: one sentence with the name, the value and what it must be.
    """
    kind = type(field.default)
    if kind in (bool, str):
        fits = isinstance(value, kind)
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if not fits:
        raise UserError(f"{field.name}={shown(value)} does not fit; {field.name} must be of type {kind.__name__}.")
    if kind in (bool, str):
        return
    numbers: Range = field.metadata.get("range", Range())
    if value not in numbers:
        raise UserError(f"{field.name} is {shown(value)}; it must {numbers.in_words()}.")
    limit = field.metadata.get("limit") or (_LARGEST_WHOLE if isinstance(value, int) else _LARGEST)
    if abs(value) > limit:
        most = limit if isinstance(limit, int) else format(limit, ".2g")
        raise UserError(f"{field.name} is {shown(value)}; it must be at most {most}.")
