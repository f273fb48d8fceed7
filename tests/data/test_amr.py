"""`mgrad-jax prepare --amr`: the layout of AMR's authors becomes a dataset, and its candidates keep their meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgrad_jax.cli import main
from mgrad_jax.data import load_interactions
from mgrad_jax.data.amr import prepare_amr
from mgrad_jax.data.id_maps import read_id_map
from mgrad_jax.evaluation.candidates import read_candidates

# Item 6 is a candidate only, and the largest; user 0 repeats a pair, user 1 trains on the item held out of it.
POS = "0 0\n0 1\n0 1\n0 2\n1 3\n1 0\n1 4\n2 2\n"
NEG = "3 6 5\n4 6 5\n5 0 1\n"
FEATURES = np.arange(-7, 14, dtype=np.float64).reshape(7, 3)


def layout(directory: Path, pos: str = POS, neg: str = NEG, features: np.ndarray = FEATURES) -> Path:
    directory.mkdir()
    (directory / "pos.txt").write_text(pos)
    (directory / "neg.txt").write_text(neg)
    np.save(directory / "f_resnet.npy", features)
    return directory


def raw_pairs(pairs: np.ndarray, items: np.ndarray) -> list[tuple[int, int]]:
    return sorted((int(user), int(items[item])) for user, item in pairs)


def test_every_row_keeps_its_meaning(tmp_path: Path) -> None:
    prepared = prepare_amr(layout(tmp_path / "raw"), tmp_path / "pin")
    data = load_interactions(tmp_path / "pin")
    items = read_id_map(tmp_path / "pin", "item", data.n_items)
    assert items is not None
    assert (data.n_users, data.n_items) == (3, 7)
    assert raw_pairs(data.test, items) == [(0, 3), (1, 4), (2, 5)]
    (valid,) = raw_pairs(data.valid, items)  # the one user with three different training items
    assert valid[0] == 0
    train = raw_pairs(data.train, items)
    assert sorted({*train, valid}) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 3), (2, 2)]
    assert valid not in train
    assert prepared.left_out["of held-out items in training"] == 1
    np.testing.assert_allclose(data.features["image"], (FEATURES / 13)[[int(i) for i in items]], rtol=1e-6)
    found = read_candidates(tmp_path / "pin" / "candidates.npy", data)
    assert [[int(items[i]) for i in row] for row in found.items] == [[3, 6, 5], [4, 6, 5], [5, 0, 1]]


def test_ids_stay_where_the_largest_item_has_an_interaction(tmp_path: Path) -> None:
    prepare_amr(layout(tmp_path / "raw", neg="3 5 1\n4 5 1\n6 0 1\n"), tmp_path / "pin")
    items = read_id_map(tmp_path / "pin", "item", 7)
    assert list(items) == [str(i) for i in range(7)]


def test_the_draw_follows_the_seed_and_overwriting_replaces_the_candidates(tmp_path: Path) -> None:
    source = layout(tmp_path / "raw")
    drawn = set()
    for seed in range(6):
        prepare_amr(source, tmp_path / "pin", seed=seed, overwrite=seed > 0)
        drawn.add(tuple(map(tuple, load_interactions(tmp_path / "pin").valid.tolist())))
    assert len(drawn) > 1
    assert (tmp_path / "pin" / "candidates.npy").exists()


def test_a_shorter_list_of_candidates_is_filled_up(tmp_path: Path) -> None:
    prepare_amr(layout(tmp_path / "raw", neg="3 6 5\n4 6\n5 0 1\n"), tmp_path / "pin")
    data = load_interactions(tmp_path / "pin")
    found = read_candidates(tmp_path / "pin" / "candidates.npy", data)
    assert found.items[1, 2] == -1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no number": ({"pos": "0 0\n0 x\n"}, "pos.txt line 2 holds 'x', no whole number"),
    "negative": ({"pos": "0 -1\n"}, "pos.txt line 1 holds '-1'"),
    "three numbers": ({"pos": "0 1 2\n"}, "pos.txt line 1 has 3 numbers; a line is a user and an item"),
    "empty": ({"pos": ""}, "pos.txt is empty"),
    "blank line": ({"neg": "3 6 5\n\n5 0 1\n"}, "neg.txt line 2 is empty"),
    "no candidates": ({"neg": "3\n4 6\n5 0\n"}, "neg.txt line 1 has no candidates"),
    "held out and candidate": ({"neg": "3 3 1\n4 1 2\n5 0 1\n"}, "neg.txt line 1 has the held-out item 3 among"),
    "few features": ({"features": FEATURES[:5]}, "f_resnet.npy has 5 rows and there are 7 items"),
    "nobody for validation": ({"pos": "0 0\n1 1\n2 2\n"}, "no user has 3 different training items"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_layout(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes, part = BAD[case]
    source = layout(tmp_path / "raw", **changes)
    assert main(["prepare", str(source), str(tmp_path / "pin"), "--amr"]) == 2
    error = capfd.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "pin").glob("*.inter"))


def test_what_amr_does_not_read_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = layout(tmp_path / "raw")
    assert main(["prepare", str(source), str(tmp_path / "pin"), "--amr", "--k-core", "3"]) == 2
    assert "--k-core is for raw ratings, and --amr reads none" in capfd.readouterr().err
    assert main(["prepare", str(tmp_path), str(tmp_path / "pin"), "--amr"]) == 2
    assert "pos.txt does not exist; --amr reads a directory with pos.txt, neg.txt" in capfd.readouterr().err
    (tmp_path / "pin").mkdir()
    np.save(tmp_path / "pin" / "candidates.npy", np.zeros((1, 2)))
    assert main(["prepare", str(source), str(tmp_path / "pin"), "--amr"]) == 2
    assert "candidates.npy follows other ids" in capfd.readouterr().err
    assert main(["prepare", str(source), str(tmp_path / "pin"), "--amr", "--overwrite"]) == 0
