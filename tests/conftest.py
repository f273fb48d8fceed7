"""Settings every test runs under."""

from __future__ import annotations

import jax
import pytest
from jaxtyping import install_import_hook

# Annotations, shapes included, are checked wherever the tests call the mathematics. The models stay out: the hook would
# answer a hyper-parameter of the wrong type before the configuration's own sentence does.
install_import_hook(["mgrad_jax.losses", "mgrad_jax.dropout", "mgrad_jax.evaluation.metrics"], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield
