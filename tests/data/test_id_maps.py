"""The maps of raw ids: what is written is read, and what is no map is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgrad_jax.data.id_maps import id_map_file, read_id_map, write_id_map
from mgrad_jax.errors import UserError

NAMES = ["u 1", '"quoted', "NA", "1", "01", "ü", 'a"b']


def test_names_come_back_in_the_order_of_their_ids(tmp_path: Path) -> None:
    write_id_map(id_map_file(tmp_path, "user"), NAMES)
    found = read_id_map(tmp_path, "user", len(NAMES))
    assert found is not None
    assert found.tolist() == NAMES
    (tmp_path / "x.inter").touch()
    assert read_id_map(tmp_path / "x.inter", "user").tolist() == NAMES
    assert read_id_map(tmp_path, "item") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its header is"),
        (b"user\tid\na\t0\n", "its header is"),
        (b"raw\tid\na\t0\nb\t2\n", "row 2 is"),
        (b"raw\tid\na\t0\nb\n", "row 2 is"),
        (b"raw\tid\na\t0\na\t1\n", "twice"),
        (b"raw\tid\n\xff\t0\n", "cannot be read"),
        (b"raw\tid\na\t0\n", "1 users and the dataset 2"),
    ],
)
def test_what_is_no_map_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "user_map.tsv").write_bytes(content)
    with pytest.raises(UserError, match=rf"user_map\.tsv is no map of raw ids: .*{reason}"):
        read_id_map(tmp_path, "user", 2)
