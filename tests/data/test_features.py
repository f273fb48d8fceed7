"""Feature files: damaged headers, other kinds of arrays, and items without a feature."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mgrad_jax.data.features import fill_zero_rows, read_features, zero_rows
from mgrad_jax.errors import UserError

HEADERS = [
    "{[]: 1}",
    "{1: 2, 'a': 3, 'shape': 1}",
    "{'descr': ('<f4',), 'fortran_order': False, 'shape': (20, 6)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 6)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-20, 6)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000)}",
    "{'descr': '<f999', 'fortran_order': False, 'shape': (20, 6)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (20, 6)}",
    "{" * 90 + "}" * 90,
    "(" * 300,
    "1" * 9000,
    "__import__('os').system('true')",
    "\0" * 20,
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
@pytest.mark.parametrize("version", [1, 2])
def test_a_damaged_header_is_one_sentence(tmp_path: Path, header: str, version: int) -> None:
    file = tmp_path / "image_feat.npy"
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    file.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + bytes(480))
    with pytest.raises(UserError, match=r"image_feat\.npy is damaged or not a plain .npy array") as caught:
        read_features(file, 20)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 200
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "i1", "u8", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_of_every_type_are_read(tmp_path: Path, dtype: str, order: str) -> None:
    table = np.asarray(np.arange(12).reshape(4, 3), dtype, order=order)
    np.save(tmp_path / "a.npy", table)
    np.testing.assert_array_equal(read_features(tmp_path / "a.npy", 4), table.astype(np.float32))


def test_bytes_that_follow_the_array_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 3)))
    with (tmp_path / "a.npy").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match="promises 96 bytes and 97 follow"):
        read_features(tmp_path / "a.npy", 4)


def test_rows_of_zeros_are_items_without_a_feature() -> None:
    table = np.zeros((5, 12), np.float32)
    table[1, 11], table[2, 0], table[4, :] = 1, -1, 3
    assert zero_rows(table).tolist() == [0, 3]
    filled = fill_zero_rows(table)
    np.testing.assert_allclose(filled[[0, 3]], np.tile(table[[1, 2, 4]].mean(axis=0), (2, 1)))
    np.testing.assert_array_equal(filled[[1, 2, 4]], table[[1, 2, 4]])
    np.testing.assert_array_equal(fill_zero_rows(np.zeros((2, 2))), np.zeros((2, 2)))


def test_a_link_to_nowhere_is_no_missing_feature(tmp_path: Path) -> None:
    (tmp_path / "image_feat.npy").symlink_to(tmp_path / "annex")
    with pytest.raises(UserError, match=r"image_feat\.npy cannot be read \(No such file"):
        read_features(tmp_path / "image_feat.npy", 4)
    assert read_features(tmp_path / "text_feat.npy", 4) is None
