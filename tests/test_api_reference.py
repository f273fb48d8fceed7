"""docs/api.md, the reference: what it names is there, and what packages export and documents import is in it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import mgrad_jax

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
MODULES = set(re.findall(r"^\.\. automodule:: (\S+)$", REFERENCE, re.MULTILINE))
FUNCTIONS = set(re.findall(r"^\.\. autofunction:: (\S+)$", REFERENCE, re.MULTILINE))


def named(path: str) -> Any:
    """What a module has by that name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def members(name: str) -> list[Any]:
    """What Sphinx shows of a module: what it exports, or else what it defines."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return [getattr(module, member) for member in module.__all__]
    return [found for _, found in inspect.getmembers(module) if getattr(found, "__module__", None) == name]


def test_everything_named_is_there_and_says_what_it_does() -> None:
    assert MODULES
    for name in MODULES:
        assert importlib.import_module(name).__doc__, name
    for name in FUNCTIONS:
        assert named(name).__doc__, name


def test_every_package_that_exports_names_is_in_it() -> None:
    packages = [package.name for package in pkgutil.walk_packages(mgrad_jax.__path__, "mgrad_jax.") if package.ispkg]
    exporting = {name for name in packages if hasattr(importlib.import_module(name), "__all__")}
    assert {"mgrad_jax.models", "mgrad_jax.training"} <= exporting
    assert exporting | {"mgrad_jax"} <= MODULES


def test_what_the_documents_import_is_in_it() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents)
    imported = {
        f"{module}.{name}"
        for module, names in re.findall(r"^from (mgrad_jax[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
        for name in names.split(", ")
    }
    assert "mgrad_jax.mirror_gradient" in imported
    shown = [*map(named, FUNCTIONS), *(member for module in MODULES for member in members(module))]
    absent = {path for path in imported - MODULES if not any(named(path) is one for one in shown)}
    assert absent == set()
