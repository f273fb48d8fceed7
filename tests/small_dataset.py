"""A dataset of a few rows, to be spoiled or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

INTER = "userID\titemID\tx_label\n"
ROWS = [(0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 1, 0), (1, 2, 0), (1, 3, 2), (2, 3, 0), (2, 0, 1), (2, 1, 2)]


def write(directory: Path, rows: list[tuple[Any, ...]] | None = None, header: str = INTER) -> Path:
    """A small dataset of three users and four items, without a flaw."""
    directory.mkdir(exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in (ROWS if rows is None else rows)]
    (directory / f"{directory.name}.inter").write_text(header + "\n".join(lines) + "\n")
    for modality in ("image", "text"):
        np.save(directory / f"{modality}_feat.npy", np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32))
    return directory
