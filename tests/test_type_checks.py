"""The tests run with the annotations of the mathematics checked."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from type_checks import CHECKED

from mgrad_jax.graph import propagate, sparse_graph
from mgrad_jax.models.losses import cosine

ROOT = Path(__file__).parent.parent


def test_every_module_that_states_shapes_is_checked() -> None:
    packages = {"mgrad_jax": ROOT / "mgrad_jax", "mgrad_jax.models": ROOT / "models"}
    stating = {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removeprefix("mgrad_jax.")
        for package, folder in packages.items()
        for path in folder.rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    }
    assert {name for name in stating if not name.startswith(CHECKED)} == set()
    assert {name for name in CHECKED if not any(f"{module}.".startswith(f"{name}.") for module in stating)} == set()


def test_what_has_another_shape_or_type_than_annotated_is_an_error() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'b'"):
        cosine(jnp.ones((2, 3)), jnp.ones((2, 4)))
    graph = sparse_graph(np.array([0]), np.array([1]), np.array([1.0]), (2, 2))
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        propagate(graph, jnp.ones((2, 1), jnp.int32))
