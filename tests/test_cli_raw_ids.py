"""`evaluate` and `recommend` speak the names of the raw data where `prepare` left its maps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from command_lines import assert_one_sentence
from small_dataset import write

from mgrad_jax.cli import main
from mgrad_jax.data.id_maps import id_map_file, write_id_map


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset of three users and four items with maps from raw ids, and a run on it."""
    place = tmp_path_factory.mktemp("prepared")
    data, out = write(place / "data"), place / "run"
    write_id_map(id_map_file(data, "user"), ["ann", "bob", "cleo"])
    write_id_map(id_map_file(data, "item"), [f"B{i}" for i in range(4)])
    train = ["train", "--model", "vbpr", "--set", "embedding_dim=8", "--data", str(data), "--epochs", "1"]
    assert main([*train, "--out", str(out)]) == 0
    return data, out


def test_recommend_says_how_long_the_lists_are(
    prepared: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "lists.csv"
    assert main(["recommend", str(prepared[1]), "--output", str(output)]) == 0
    rows = len(pd.read_csv(output))
    assert capfd.readouterr().out == f"{output}: 3 users, {rows} items, 2 to 3 each, in raw ids.\n"


def test_raw_ids_in_and_out(prepared: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output, users, per_user = tmp_path / "lists.csv", tmp_path / "users.txt", tmp_path / "users.csv"
    users.write_text("cleo\nann\n")
    command = ["recommend", str(prepared[1]), "--output", str(output), "--top-k", "2", "--users", str(users)]
    assert main(command) == 0
    table = pd.read_csv(output)
    assert table["user"].tolist() == ["cleo", "cleo", "ann", "ann"]
    users.write_text("2\n0\n")
    assert main([*command, "--internal-ids"]) == 0
    internal = pd.read_csv(output)
    assert internal["user"].tolist() == [2, 2, 0, 0]
    assert table["item"].tolist() == [f"B{item}" for item in internal["item"]]
    assert main(["evaluate", str(prepared[1]), "--per-user", str(per_user)]) == 0
    assert pd.read_csv(per_user)["user"].tolist() == ["bob", "cleo"]
    capfd.readouterr()
    assert_one_sentence(main(command), capfd.readouterr(), "'2' is not a raw id of the dataset's user_map.tsv (with")


def test_metrics_of_users_need_no_names_of_items(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    data, per_user = shutil.copytree(prepared[0], tmp_path / "data"), tmp_path / "users.csv"
    (data / "item_map.tsv").write_text("damaged")
    assert main(["evaluate", str(prepared[1]), "--data", str(data), "--per-user", str(per_user)]) == 0
    assert pd.read_csv(per_user)["user"].tolist() == ["bob", "cleo"]
