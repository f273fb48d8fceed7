"""Tables that stay in their files are read once, checked, and digested as all others are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mgrad_jax.data import digests, features, load_interactions
from mgrad_jax.errors import UserError

TINY = Path(__file__).parent.parent / "golden" / "tiny"
DIGEST = "f802c3af8f643a4206c9ebdef6a9dc92"  # as runs on disk have it


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_BLOCK", 400)


def test_a_digest_is_the_same_in_blocks_and_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_interactions(TINY).digest == DIGEST
    monkeypatch.setattr(features, "MAPPED", 1)
    data = load_interactions(TINY)
    assert all(features.is_mapped(table) for table in data.features.values())
    assert data.digest == DIGEST


def test_what_stays_in_its_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MAPPED", 1)
    looked, square = [], features._square
    monkeypatch.setattr(features, "_square", lambda flat: looked.append(len(flat)) or square(flat))
    data = load_interactions(TINY)
    assert data.digest == DIGEST
    assert sum(looked) == sum(table.size for table in data.features.values())
    assert max(looked) == 100


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_stays_in_its_file_is_finite(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    table = np.load(folder / "image_feat.npy")
    table[:, 3] = 1e30  # finite, though its square is not
    np.save(folder / "image_feat.npy", table)
    monkeypatch.setattr(features, "MAPPED", 1)
    load_interactions(folder)
    table[17, 5] = value
    np.save(folder / "image_feat.npy", table)
    with pytest.raises(UserError, match="tiny: the image feature table: row 17, column 5 is NaN or infinite"):
        load_interactions(folder)
