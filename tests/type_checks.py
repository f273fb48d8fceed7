"""Where and how annotations are checked while tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype

# The modules that state shapes, and packages of them, under `mgrad_jax`.
CHECKED = (
    "analysis.flatness",
    "analysis.inputs",
    "analysis.landscape",
    "analysis.perturb",
    "analysis.robustness",
    "analysis.theory",
    "data.sampling",
    "devices",
    "dropout",
    "evaluation",
    "graph",
    "models",
    "selection",
    "training.entries",
    "training.epoch",
)

_Function = TypeVar("_Function", bound=Callable[..., object])
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too


def functions(function: _Function) -> _Function:
    """Check what a function is given and what it returns.

    Not what an object is made of: JAX fills pytrees with placeholders, and a hyper-parameter of the wrong type is
    answered by the configuration's own sentence.
    """
    return function if function.__name__ == "__init__" else _check(function)
