"""Lowering for a GPU that is not there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import pytest


@pytest.fixture
def for_cuda() -> Callable[..., str]:
    """The program of a jitted function for CUDA, as text: nothing is compiled, so no GPU is needed."""
    # From JAX 0.11 on a Pallas kernel is lowered for a card; without one it has to be told which.
    card: Any = contextlib.nullcontext()
    with contextlib.suppress(AttributeError, TypeError):
        device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
        card = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))

    def lower(function: Any, *arguments: Any) -> str:
        with card, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")  # from JAX 0.12 on
            return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    return lower
