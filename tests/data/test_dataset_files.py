"""A dataset directory is the old one, the new one or refused, whenever the process that replaces it is stopped."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mgrad_jax.cli import main
from mgrad_jax.data import load_interactions, prepare
from mgrad_jax.data.dataset_files import writing
from mgrad_jax.data.id_maps import read_id_map
from mgrad_jax.data.user_graph import build_user_graph
from mgrad_jax.errors import UserError


def ratings(folder: Path, prefix: str, n_users: int) -> Path:
    lines = [f"{prefix}u{u:02},{prefix}i{(u + k) % 9}" for u in range(n_users) for k in range(6)]
    file = folder / f"{prefix}.csv"
    file.write_text("\n".join(["user_id,item_id", *lines]) + "\n")
    return file


class Killed(BaseException):
    pass


def die_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Stop at the n-th removal or renaming of a file, as a kill does: nothing is tidied up."""
    calls = 0

    def counted(real):
        def stopping(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= call:
                raise Killed
            return real(*args, **kwargs)

        return stopping

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr("mgrad_jax.data.dataset_files.shutil.rmtree", lambda *args, **kwargs: None)


@pytest.mark.parametrize("call", range(1, 9))
def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    out = tmp_path / "out"
    prepare(ratings(tmp_path, "a", 12), out)
    build_user_graph(load_interactions(out), 3, cache=out)
    second = ratings(tmp_path, "b", 11)
    with monkeypatch.context() as patch:
        die_at(patch, call)
        with pytest.raises(Killed):
            prepare(second, out, overwrite=True)
    if (out / ".replacing").exists():
        with pytest.raises(UserError, match="out is half replaced"):
            load_interactions(out)
        # Nor can a reader that does not know the mark take new maps for those of old interactions.
        old = (
            (out / "out.inter").exists()
            and (out / "user_map.tsv").exists()
            and not (out / ".incoming/out.inter").exists()
        )
        assert not old or read_id_map(out, "user", 11) is not None
    else:
        n_users = load_interactions(out).n_users
        names = read_id_map(out, "user", n_users)
        assert names is not None
        assert {name[0] for name in names} == {"a" if n_users == 12 else "b"}
    assert prepare(second, out, overwrite=True).users == 11
    assert sorted(path.name for path in out.iterdir()) == ["item_map.tsv", "out.inter", "user_map.tsv"]


def test_two_writers_of_one_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        writing(out),
        pytest.raises(UserError, match=rf"out is in use by process {os.getpid()}"),
    ):
        prepare(ratings(tmp_path, "a", 12), out)
    assert not out.exists()


def dataset(folder: Path, rows: list[tuple[int, int, int]]) -> Path:
    folder.mkdir()
    lines = ["userID\titemID\tx_label", *("\t".join(map(str, row)) for row in rows)]
    (folder / f"{folder.name}.inter").write_text("\n".join(lines) + "\n")
    return folder


ROWS = [(u, 3 * ((u + k) % 7), max(0, k - 3)) for u in range(11) for k in range(6)]


def test_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    old = dataset(tmp_path / "d", ROWS)
    (tmp_path / "link").symlink_to(old / "d.inter")
    for source in (old, old / "d.inter", tmp_path / "link"):
        with pytest.raises(UserError, match="is read and would be replaced; choose another destination"):
            prepare(source, old, overwrite=True)
    np.save(old / "image_feat.npy", np.ones((12, 2)))
    (tmp_path / "ids.txt").write_text("\n".join(f"ai{n}" for n in range(12)))
    raw, pair = ratings(tmp_path, "a", 12), (old / "image_feat.npy", tmp_path / "ids.txt")
    with pytest.raises(UserError, match=r"image_feat\.npy is read and would be replaced"):
        prepare(raw, old, overwrite=True, features={"image": pair})
    (old / "image_feat.npy").unlink()
    assert load_interactions(old).n_users == 11


def test_a_dataset_keeps_its_split_features_and_names(tmp_path: Path) -> None:
    old = dataset(tmp_path / "d", ROWS)
    np.save(old / "text_feat.npy", np.arange(19.0)[:, None])
    done = prepare(old, tmp_path / "new")
    data, names = load_interactions(tmp_path / "new"), read_id_map(tmp_path / "new", "item")
    assert names is not None
    assert (done.split, data.n_items) == ("kept", 7)
    assert list(names) == [str(3 * n) for n in range(7)]
    np.testing.assert_array_equal(data.features["text"][:, 0], 3 * np.arange(7))
    assert {(u, int(names[i])) for u, i in data.test} == {row[:2] for row in ROWS if row[2] == 2}
    prepare(tmp_path / "new", tmp_path / "newer")
    assert read_id_map(tmp_path / "newer", "item").tolist() == names.tolist()
    assert prepare(old, tmp_path / "drawn", new_split=True).split == "drawn"


def test_repairs_mend_what_they_are_named_for(tmp_path: Path) -> None:
    old = dataset(tmp_path / "d", [*ROWS, *((u, 3 * (u % 7), 2) for u in range(4)), ROWS[0]])
    with pytest.raises(UserError, match=r"\(such pairs: 4\).*--drop-duplicates"):
        prepare(old, tmp_path / "new")
    done = prepare(old, tmp_path / "new", drop_duplicates=True)
    assert done.left_out == {"that repeat an earlier row": 1, "of pairs that stand in an earlier split": 4}
    assert done.rows_read == done.interactions + 5
    assert len(load_interactions(tmp_path / "new").train) == 44

    table = np.ones((19, 2))
    table[3] = 0
    table[6] = 4
    np.save(old / "image_feat.npy", table)
    assert prepare(old, tmp_path / "zero", drop_duplicates=True).without_features == {"image": 1}
    prepare(old, tmp_path / "full", drop_duplicates=True, fill_features=True)
    np.testing.assert_array_equal(load_interactions(tmp_path / "full").features["image"][1], [1.5, 1.5])


def test_rows_read_are_those_kept_and_those_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = ["user,item,stars"] + [f"u{u},i{i},{1 + (u + i) % 5}" for u in range(12) for i in range(9)]
    (tmp_path / "r.csv").write_text("\n".join([*lines, lines[2], "rare,i1,5"]) + "\n")
    done = prepare(tmp_path / "r.csv", tmp_path / "out", min_rating=2)
    assert done.rows_read == 110
    assert done.rows_read == done.interactions + sum(done.left_out.values())
    assert len(done.left_out) == 3
    assert main(["prepare", str(tmp_path / "r.csv"), str(tmp_path / "again"), "--min-rating", "2"]) == 0
    out = capfd.readouterr().out
    assert "rows read" in out
    assert "left out: rows with a rating below 2" in out
    assert "column 3, 'stars'" in out


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".", "", " ", "/abs", "a\nb", "\x01", "x" * 200, "a\\b"])
def test_a_name_stays_inside_of_the_destination(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a dataset"):
        prepare(ratings(tmp_path, "a", 12), tmp_path / "out", name=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv"]


@pytest.mark.parametrize(
    "options",
    [{"seed": -1}, {"seed": 10**30}, {"k_core": 0}, {"k_core": 10**30}, {"min_rating": float("nan")}],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} is"):
        prepare(ratings(tmp_path, "a", 12), tmp_path / "out", **options)
