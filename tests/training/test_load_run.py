"""A finished run on one device or several: evaluated, recommended from, read back, and gone on with."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_lines import assert_one_sentence

from mgrad_jax.cli import main
from mgrad_jax.cli import train as command
from mgrad_jax.devices import mesh
from mgrad_jax.training import run as module
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.engine import Engine
from mgrad_jax.training.run import load_run, train_run


def config(out: Path, model: str = "lightgcn", dim: int = 16, **settings: object) -> RunConfig:
    values = {"epochs": 1, "batch_size": 2400, "hyper_parameters": {"embedding_dim": dim}, **settings}
    return RunConfig(model, "demo", out=str(out), **values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vectors are equal to the bit on any number of devices: they are sums over edges, and of columns alone."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train_run(config(out))
    return out


def shown(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a table, without the time."""
    return [line.split("   ")[0] for line in capfd.readouterr().out.splitlines()]


def test_evaluation_on_several_devices_shows_the_table_of_one(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = load_run(finished).data
    candidates = tmp_path / "candidates.npy"
    np.save(candidates, np.random.default_rng(0).integers(0, data.n_items, (data.n_users, 9)).astype(np.int32))
    tables, files = [], []
    for option in ([], ["--devices", "8"]):
        file = tmp_path / f"users{len(files)}.csv"
        asked = ["--per-user", str(file), "--candidates", str(candidates)]
        assert main(["evaluate", str(finished), *asked, *option]) == 0
        tables.append(shown(capfd))
        files.append(file.read_bytes())
    assert tables[0] == tables[1]
    assert files[0] == files[1]


def test_lists_on_several_devices_are_those_of_one(finished: Path, tmp_path: Path) -> None:
    users = tmp_path / "users.txt"
    users.write_text("7\n3\n599\n")
    for name, asked in {"every": [], "some": ["--users", str(users)]}.items():
        files = [tmp_path / f"{name}-{devices}.csv" for devices in ("1", "all")]
        for file in files:
            options = ["--output", str(file), "--top-k", "5", "--devices", file.stem.partition("-")[2]]
            assert main(["recommend", str(finished), *asked, *options]) == 0
        assert files[0].read_bytes() == files[1].read_bytes()
    assert pd.read_csv(files[1])["user"].tolist() == [7] * 5 + [3] * 5 + [599] * 5


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["--devices", "9"], "9 devices were asked for, and there are 8 cpu devices"),
        (["--devices", "3"], "3 devices cannot share tables of width 16"),
        (["--devices", "few"], "--devices is 'few'"),
    ],
)
def test_devices_that_cannot_share_a_run_are_refused(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: list[str], part: str
) -> None:
    assert_one_sentence(main(["evaluate", str(finished), *command]), capfd.readouterr(), part)
    output = ["--output", str(tmp_path / "lists.csv")]
    assert_one_sentence(main(["recommend", str(finished), *output, *command]), capfd.readouterr(), part)


def test_what_has_no_tables_needs_no_devices(capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["evaluate", "popularity", "--data", "demo", "--devices", "8"])
    assert_one_sentence(code, capfd.readouterr(), "popularity has no tables to be shared by devices")


def test_a_run_read_over_a_mesh_is_split_and_scores_alike(tmp_path: Path) -> None:
    train_run(config(tmp_path, "vbpr", evaluate="stale"))
    one, several = load_run(tmp_path), load_run(tmp_path, mesh=mesh(8))
    assert one.layout is None
    table = several.model.user_embedding.get_value()
    assert {shard.data.shape for shard in table.addressable_shards} == {(table.shape[0], table.shape[1] // 8)}
    np.testing.assert_array_equal(table, one.model.user_embedding.get_value())
    for ours, theirs in zip(several.vectors(), one.vectors(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", ["history.csv", "result.json"])
def test_a_run_that_is_over_is_completed_without_compiling(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    for name in {"history.csv", "result.json"} - {kept}:
        (out / name).write_bytes(b"\0")
    monkeypatch.setattr(Engine, "compile", lambda *_: pytest.fail("it compiled"))
    result = train_run(config(out), resume=True)
    assert result["epochs_run"] == 1
    assert (out / "history.csv").read_bytes() == (finished / "history.csv").read_bytes()


@pytest.mark.parametrize(
    ("options", "devices"),
    [([], 1), (["--devices", "2"], 2), (["--distributed"], "all"), (["--distributed", "--devices", "1"], 1)],
)
def test_one_device_that_is_asked_for_is_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch, options: list[str], devices: object
) -> None:
    asked = []
    monkeypatch.setattr(module, "train_run", lambda config, **how: asked.append(how["devices"]))
    monkeypatch.setattr(command, "joined", lambda crew: nullcontext(False))
    assert main(["train", "--model", "vbpr", "--data", "demo", *options]) == 0
    assert asked == [devices]


def test_a_directory_in_which_no_epoch_was_finished_is_free_to_begin(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("model: vbpr\n")
    command = ["train", "--model", "lightgcn", "--data", "demo", "--dry-run", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "(free)" in "".join(capfd.readouterr().out.split())
    assert main([*command, "--resume"]) == 0
    assert "wouldbegoneonwith" in "".join(capfd.readouterr().out.split())
