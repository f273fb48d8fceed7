"""docs/api.md, the reference: what it names is there, and what packages export and documents import is in it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import mgrad_jax

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
MODULES = set(re.findall(r"^\.\. automodule:: (\S+)$", REFERENCE, re.MULTILINE))
FUNCTIONS = set(re.findall(r"^\.\. autofunction:: (\S+)$", REFERENCE, re.MULTILINE))


def test_everything_named_is_there_and_says_what_it_does() -> None:
    assert MODULES
    for name in MODULES:
        assert importlib.import_module(name).__doc__, name
    for name in FUNCTIONS:
        module, _, function = name.rpartition(".")
        assert getattr(importlib.import_module(module), function).__doc__, name


def test_every_package_that_exports_names_is_in_it() -> None:
    packages = [package.name for package in pkgutil.walk_packages(mgrad_jax.__path__, "mgrad_jax.") if package.ispkg]
    exporting = {name for name in packages if hasattr(importlib.import_module(name), "__all__")}
    assert {"mgrad_jax.models", "mgrad_jax.training"} <= exporting
    assert exporting | {"mgrad_jax"} <= MODULES


def test_what_the_documents_import_is_in_it() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents)
    imported = {
        (module, name)
        for module, names in re.findall(r"^from (mgrad_jax[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
        for name in names.split(", ")
    }
    assert ("mgrad_jax", "mirror_gradient") in imported
    absent = {
        f"{module}.{name}"
        for module, name in imported
        if module not in MODULES and f"{module}.{name}" not in MODULES | FUNCTIONS
    }
    assert absent == set()
