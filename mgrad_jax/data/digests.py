"""A digest of arrays, by which data are known that a run began with, and a state that was written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np

# Bytes at a time: of a table that stays in its file no more is in memory at once.
_BLOCK = 1 << 24


def digest(
    arrays: Mapping[str, np.ndarray], text: str = "", look: Callable[[str, np.ndarray], None] | None = None
) -> str:
    """A digest that changes with any name, shape, type or byte, and with the order of rows.

    Args:
        arrays: by name.
        text: what else it is of.
        look: called with a name and each block of its numbers, (n,), as it is read.
    """
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        total.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode())
        flat = np.ascontiguousarray(array).reshape(-1)
        size = max(1, _BLOCK // array.dtype.itemsize)
        for block in (flat[start : start + size] for start in range(0, len(flat), size)):
            if look is not None:
                look(name, block)
            total.update(block.view(np.uint8).data)
    return total.hexdigest()
