"""`prepare --user-graph`: the user graph stored where training finds it, and one clear sentence for every mistake."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mgrad_jax import models
from mgrad_jax.cli import main
from mgrad_jax.data import load_interactions, user_graph
from mgrad_jax.data.user_graph import build_user_graph
from mgrad_jax.graph import UserGraph

TINY = Path(__file__).parent / "golden" / "tiny"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "tiny")


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    pairs = np.argwhere(np.random.default_rng(0).random((30, 20)) < 0.6)
    file = tmp_path / "raw.csv"
    pd.DataFrame({"user": pairs[:, 0], "item": pairs[:, 1]}).to_csv(file, index=False)
    return file


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*_: Any) -> UserGraph:
        raise AssertionError("the user graph was built")

    monkeypatch.setattr(user_graph, "nearest_users", built)


def stored(directory: Path) -> list[str]:
    return [file.name for file in directory.glob("user_graph-*.npz")]


def assert_same(a: UserGraph, b: UserGraph) -> None:
    np.testing.assert_array_equal(a.neighbours, b.neighbours)
    np.testing.assert_array_equal(a.shared, b.shared)


def write_published(dataset: Path, file: Path) -> None:
    """A published file of a dataset, with equals by falling id."""
    data = load_interactions(dataset)
    graph = build_user_graph(data, data.n_users)
    lists = {}
    for user, (ids, counts) in enumerate(zip(graph.neighbours, graph.shared, strict=True)):
        n = np.count_nonzero(counts)
        order = np.lexsort((-ids[:n], -counts[:n]))
        lists[user] = [ids[:n][order].tolist(), counts[:n][order].astype(float).tolist()]
    np.save(file, np.array(lists, dtype=object), allow_pickle=True)


# The graph of a dataset that exists


@pytest.mark.parametrize("source", [".", "tiny.inter"])
def test_the_models_find_what_was_stored(
    dataset: Path, source: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(dataset.iterdir())
    assert main(["prepare", str(dataset / source), "--user-graph"]) == 0
    assert "users without neighbours" in capfd.readouterr().out
    (name,) = stored(dataset)
    assert sorted(dataset.iterdir()) == sorted([*before, dataset / name])
    data = load_interactions(dataset)
    expected = build_user_graph(data, 40)
    forbid_building(monkeypatch)
    for model in ("dualgnn", "dragon"):
        assert_same(models.create(model, data, embedding_dim=4).user_graph.get_value(), expected)
    assert main(["prepare", str(dataset), "--user-graph"]) == 0  # stored already


def test_training_finds_what_was_stored(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "--model", "dualgnn", "--data", str(dataset), "--epochs", "1", "--set", "embedding_dim=4"]
    assert main(["prepare", str(dataset), "--user-graph"]) == 0
    forbid_building(monkeypatch)
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    with pytest.raises(AssertionError, match="was built"):
        main([*command, "--set", "user_k=3", "--out", str(tmp_path / "other")])


def test_another_number_of_neighbours_is_another_file(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ([], ["--user-k", "3"]):
        assert main(["prepare", str(dataset), "--user-graph", *options]) == 0
    assert len(stored(dataset)) == 2
    forbid_building(monkeypatch)
    model = models.create("dualgnn", load_interactions(dataset), embedding_dim=4, user_k=3)
    assert model.user_graph.get_value().shared.shape == (40, 3)


def test_a_published_graph_is_what_the_models_use(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "user_graph_dict.npy"
    write_published(dataset, file)
    assert main(["prepare", str(dataset), "--published-user-graph", str(file), "--user-k", "3"]) == 0
    data = load_interactions(dataset)
    own = build_user_graph(data, 3)
    forbid_building(monkeypatch)
    used = models.create("dualgnn", data, embedding_dim=4, user_k=3).user_graph.get_value()
    np.testing.assert_array_equal(used.shared, own.shared)
    assert not np.array_equal(used.neighbours, own.neighbours)


# The graph of a dataset just written


def test_raw_ratings_and_their_graph_in_one_command(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prepare", str(ratings), str(tmp_path / "small"), "--k-core", "3"]
    assert main([*command, "--user-graph", "--user-k", "5"]) == 0
    data = load_interactions(tmp_path / "small")
    expected = build_user_graph(data, 5)
    forbid_building(monkeypatch)
    assert_same(build_user_graph(data, 5, cache=tmp_path / "small"), expected)
    assert main([*command, "--overwrite"]) == 0  # without the option, nothing is built


def test_what_was_read_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [f"i{(u + k) % 9};u{u};x" for u in range(12) for k in range(6)]
    (tmp_path / "raw.dat").write_text("\n".join(rows) + "\n", encoding="utf-16")
    command = ["prepare", str(tmp_path / "raw.dat"), str(tmp_path / "new"), "--separator", ";", "--encoding", "utf-16"]
    assert main([*command, "--columns", "item,user,-"]) == 0
    out = capfd.readouterr().out
    for words in ("user taken from", "column 2 (as --columns says)", "rows read", "drawn"):
        assert words in out
    assert load_interactions(tmp_path / "new").n_users == 12


def test_info_names_the_models_that_cannot_train(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (dataset / "image_feat.npy").unlink()
    table = np.load(dataset / "text_feat.npy")
    table[2] = 0
    np.save(dataset / "text_feat.npy", table)
    assert main(["info", str(dataset)]) == 0
    notes = [
        line
        for line in " ".join(capfd.readouterr().out.split()).split("note: ")[1:]
        if "needs" in line or "compares" in line
    ]
    assert [note.split()[0] for note in notes] == ["dragon", "freedom", "slmrec"]
    assert "row 2 of text_feat.npy is all zero" in notes[1]
    assert "needs image and text features and there are no image features; add image_feat.npy" in notes[2]
    assert main(["models"]) == 0
    assert "image or text" in capfd.readouterr().out


# Mistakes

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no destination": (["raw.csv"], "DESTINATION is missing; name the directory to write, or add --user-graph"),
    "only a dataset": (["tiny"], "DESTINATION is missing"),
    "raw ratings without destination": (["raw.csv", "--user-graph"], "raw.csv is not a directory"),
    "no dataset": (["empty", "--user-graph"], "empty holds no .inter file"),
    "missing dataset": (["absent", "--user-graph"], "absent does not exist"),
    "demo": (["demo", "--user-graph"], "demo is not on disk"),
    "dataset and destination": (["tiny", "new", "--user-graph"], "tiny is a directory; leave DESTINATION out"),
    "published and destination": (
        ["raw.csv", "new", "--published-user-graph", "x.npy"],
        "--published-user-graph is for a dataset that exists",
    ),
    "missing published": (["tiny", "--published-user-graph", "x.npy"], "x.npy cannot be read as a user graph"),
    "option of raw ratings": (["tiny", "--user-graph", "--k-core", "5"], "--k-core is for raw ratings"),
    "flag of raw ratings": (["tiny", "--user-graph", "--overwrite"], "--overwrite is for raw ratings"),
    "k without graph": (["raw.csv", "new", "--user-k", "5"], "--user-k is of the user graph, which is not asked for"),
    "a name outside": (["raw.csv", "new", "--name", "../x"], "--name '../x' cannot name a dataset"),
    "a negative seed": (["raw.csv", "new", "--seed", "-1"], "seed is -1; it must be a whole number from 0"),
    "no core": (["raw.csv", "new", "--k-core", "0"], "k_core is 0; it must be at least 3"),
    "an unknown encoding": (["raw.csv", "new", "--encoding", "rot13"], "encoding 'rot13' is unknown"),
    "k of zero": (["tiny", "--user-graph", "--user-k", "0"], "--user-k"),
}


def assert_one_sentence(code: int, captured: Any, part: str) -> None:
    assert code == 2
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.usefixtures("dataset", "ratings")
@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    arguments, part = MISTAKES[case]
    assert_one_sentence(main(["prepare", *arguments]), capfd.readouterr(), part)
    assert not (tmp_path / "new").exists()
    assert not stored(tmp_path / "tiny")


def test_a_dataset_that_cannot_be_written(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # By a stand-in, for the superuser may write anywhere.
    monkeypatch.setattr("mgrad_jax.cli.data.os.access", lambda path, mode: mode != os.W_OK)
    assert_one_sentence(main(["prepare", str(dataset), "--user-graph"]), capfd.readouterr(), "tiny cannot be written")


def test_a_directory_in_the_place_of_the_file(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(dataset), "--user-graph"]) == 0
    (name,) = stored(dataset)
    (dataset / name).unlink()
    (dataset / name / "full").mkdir(parents=True)
    capfd.readouterr()
    code = main(["prepare", str(dataset), "--user-graph"])
    assert_one_sentence(code, capfd.readouterr(), "tiny cannot hold the user graph")
