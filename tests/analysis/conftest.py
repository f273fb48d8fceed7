"""What the tests of the analyses share: one small study, trained once."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from small_study import compare

from mgrad_jax.cli import main


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study: VBPR on the demo data, plain and mirror asked for, two seeds, two epochs, both kept.

    The first process to ask trains it for all; nobody writes to it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out, finished = shared / "study", shared / "study is finished"
    with (shared / "study.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            assert main(compare(out)) == 0
            finished.touch()
    return out
