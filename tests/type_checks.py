"""How annotations are checked while tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype

_Function = TypeVar("_Function", bound=Callable[..., object])
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too


def functions(function: _Function) -> _Function:
    """Check what a function is given and what it returns.

    Not what a dataclass is made of: JAX fills pytrees with placeholders, and a hyper-parameter of the wrong type is
    answered by the configuration's own sentence.
    """
    return function if function.__name__ == "__init__" else _check(function)
