"""What the tests of the analyses share: one small study, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_study import compare

from mgrad_jax.cli import main


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study: VBPR on the demo data, plain and mirror asked for, two seeds, two epochs, both kept."""
    out = tmp_path_factory.mktemp("studies") / "study"
    assert main(compare(out)) == 0
    return out
