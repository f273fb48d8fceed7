"""What the tests of the analyses share: one small study, trained once, and compiled programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from small_study import compare

from mgrad_jax.cli import main


@pytest.fixture(scope="package")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile the same programs once, as the command line does."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture(scope="package")
def study(compilation_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study: VBPR on the demo data, plain and mirror asked for, two seeds, two epochs."""
    out = tmp_path_factory.mktemp("studies") / "study"
    assert main(compare(out)) == 0
    return out
