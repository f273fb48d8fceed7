"""Every example in a docstring of the library does what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples_by_module() -> dict[str, int]:
    """How many examples stand in the source of each module that has some."""
    found = {}
    for package, folder in (("mgrad_jax", ROOT / "mgrad_jax"), ("mgrad_jax.models", ROOT / "models")):
        for file in sorted(folder.rglob("*.py")):
            name = ".".join((package, *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
            found[name] = file.read_text(encoding="utf-8").count(">>> ")
    return {name: count for name, count in found.items() if count}


EXAMPLES = examples_by_module()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_module_are_right(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted == EXAMPLES[name]
    assert results.failed == 0


def test_mirror_gradient_is_shown_at_work() -> None:
    assert EXAMPLES["mgrad_jax.mirror"] > 30
