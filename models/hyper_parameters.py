"""How a configuration declares hyper-parameters: default, meaning, range, and whether a sweep may trace them."""

from __future__ import annotations

from typing import Any

from mgrad_jax.declaration import Range, check, setting

__all__ = ["MOST_LAYERS", "Range", "check", "hyper"]
MOST_LAYERS = 100  # a limit: each is written out in the program


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
        least, most, above, below, limit: its range, see `mgrad_jax.declaration.setting`.

    >>> hyper(0.3, "share dropped", least=0, below=1).metadata["range"].in_words()
    'be at least 0 and below 1'
    """
    return setting(default, help, least=least, most=most, above=above, below=below, limit=limit, traced=traced)
