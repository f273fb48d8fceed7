"""The pages of CONTRIBUTING.md do what they say: their files, changes and examples are tried out."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from mgrad_jax import models
from mgrad_jax.data import demo_interactions
from mgrad_jax.training.methods import METHODS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def page(heading: str) -> list[tuple[str, str]]:
    """Language and text of every code block under a heading."""
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def changed(diff: str) -> tuple[str, str]:
    """The module that a diff is of, and its text with the diff applied to what is there once."""
    header, *lines = diff.splitlines()
    file = ROOT / header.removeprefix("--- a/")
    assert file.is_file(), header
    text, before, after = file.read_text(), "", ""
    for line in [*lines, None]:
        # A run of kept and removed lines, and of added ones behind it, is one change.
        if line is None or (line[0] != "+" and after != before):
            assert text.count(before) == 1, f"{file} does not hold once:\n{before}"
            text, before, after = text.replace(before, after), "", ""
        if line is not None:
            before += f"{line[1:]}\n" if line[0] in " -" else ""
            after += f"{line[1:]}\n" if line[0] in " +" else ""
    assert not before
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("mgrad_jax") else f"mgrad_jax.{name}", text


def use(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Run a module's text in a module of its own, which stands in for the package's during the test."""
    module = types.ModuleType(name)
    module.__file__ = getattr(sys.modules.get(name), "__file__", None)
    module.__path__ = getattr(sys.modules.get(name), "__path__", [])
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(parent), last, module, raising=False)
    exec(compile(text, name, "exec"), module.__dict__)
    return module


def test_a_model_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, file), (_, registry), (_, example) = page("Add a model")
    before = models.names()
    changed_models = use(*changed(registry), monkeypatch)
    use("mgrad_jax.models.mf", file, monkeypatch)
    assert changed_models.names() == sorted([*before, "mf"])
    exec(compile(example, "CONTRIBUTING.md", "exec"), {})
    data = demo_interactions(n_users=20, n_items=16, n_groups=2, per_user=6)
    made = changed_models.create("mf", data, embedding_dim=2)
    assert made.scores(np.arange(3)).shape == (3, data.n_items)
    with pytest.raises(ValueError, match="reg_weight is -1; it must not be negative"):
        changed_models.create("mf", data, reg_weight=-1)


def test_a_method_is_added() -> None:
    (_, method), (_, example) = page("Add a method")
    names: dict[str, object] = {}
    try:
        exec(compile(method, "CONTRIBUTING.md", "exec"), names)
        exec(compile(example, "CONTRIBUTING.md", "exec"), names)
        assert METHODS["signed"].arguments == ("share",)
    finally:
        METHODS.pop("signed", None)


def test_a_metric_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, change), (_, example) = page("Add a metric")
    module = use(*changed(change), monkeypatch)
    assert module.METRICS[-1] == "hit"
    exec(compile(example, "CONTRIBUTING.md", "exec"), {})
