"""Parameters of every N-th epoch on disk: those of the run, the same after a kill, refused where they are another's."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from command_lines import assert_one_sentence
from flax import nnx

from mgrad_jax.cli import main
from mgrad_jax.errors import UserError
from mgrad_jax.training import stored_state
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.identity import identity
from mgrad_jax.training.kept import KeptParams
from mgrad_jax.training.run import LoadedRun, load_run, train_run


def config(out: Path, **changes: Any) -> RunConfig:
    values = {"model": "lightgcn", "data": "demo", "training": "plain", "epochs": 6, "seed": 7, "out": str(out)}
    values |= {"hyper_parameters": {"embedding_dim": 4}, "learning_rate": 0.02}
    return RunConfig(**{**values, "batch_size": 1800, **changes})  # four batches, none partial: one scan to compile


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept epochs 2, 4 and 6."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train_run(config(out, keep_every=2))
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "kept").iterdir())}


def params(loaded: LoadedRun) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(loaded.model, nnx.Param))]


def test_every_second_epoch_is_kept_and_holds_what_the_run_had(run: Path) -> None:
    loaded = load_run(run)
    assert loaded.kept.epochs() == [2, 4, 6]
    latest = next(path for path in (run / "checkpoint").iterdir() if path.name.startswith("000006"))
    saved = [x for name, x in stored_state.read_leaves(latest).items() if ".params" in name]
    loaded.kept.load(6, loaded.model)
    assert len(saved) == 2
    for ours, theirs in zip(params(loaded), saved, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    loaded.kept.load(2, loaded.model)
    assert (params(loaded)[0] != saved[0]).any()


def test_keeping_changes_no_number_and_no_digest(run: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    result = train_run(config(without))
    keeping = json.loads((run / "result.json").read_text())
    assert {k: v for k, v in result.items() if k != "seconds"} == {k: v for k, v in keeping.items() if k != "seconds"}
    assert "keep_every" not in yaml.safe_load((without / "config.yaml").read_text())
    assert not (without / "kept").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["keep_every"] == 2


def test_a_run_resumed_to_more_epochs_has_the_files_of_an_unbroken_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_run(config(out, epochs=3, keep_every=2))
    leftover = out / "kept" / ".000004.npz.1.tmp"
    leftover.write_bytes(b"half")
    train_run(config(out, keep_every=2), resume=True)
    assert contents(out) == contents(run)


def test_another_number_on_resume_keeps_other_epochs_and_removes_none(run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    train_run(config(out, epochs=8, keep_every=4), resume=True)
    assert list(contents(out)) == ["000002.npz", "000004.npz", "000006.npz", "000008.npz"]
    train_run(config(out, epochs=9), resume=True)  # not asked for any more
    assert len(contents(out)) == 4
    assert load_run(out).kept.epochs() == [2, 4, 6, 8]


def test_narrow_tables_come_back_as_they_were(tmp_path: Path) -> None:
    model = nnx.Linear(2, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    store = KeptParams(tmp_path, 1, "x")
    store.save(1, nnx.state(model, nnx.Param))
    model.kernel.set_value(jnp.zeros((2, 3), jnp.bfloat16))
    store.load(1, model)  # type: ignore[arg-type]
    assert model.kernel[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(model.kernel[...]), before)


def test_files_that_are_damaged_missing_or_of_another_run_are_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    loaded = load_run(out)
    file = out / "kept" / "000004.npz"
    data = bytearray(file.read_bytes())
    for damaged in (data[: len(data) // 2], b"", b"text"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"000004.npz is damaged; delete it"):
            loaded.kept.load(4, loaded.model)
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"000004.npz is damaged; delete it"):
        loaded.kept.load(4, loaded.model)
    file.unlink()
    with pytest.raises(UserError, match=r"000004.npz does not exist; keep parameters with"):
        loaded.kept.load(4, loaded.model)
    other = KeptParams(out, None, identity({**loaded.config.to_dict(), "seed": 8}))
    with pytest.raises(UserError, match=r"000006.npz belongs to another run than .*; move .*kept away"):
        other.load(6, loaded.model)


def test_the_space_they_take_is_asked_for_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 600 users and 400 items of 4 floats; the parameters and two moments of Adam's make a checkpoint.
    size = 1000 * 4 * 4
    free = namedtuple("Free", "f_bavail f_frsize")(2 * 3 * size + 1000, 1)
    monkeypatch.setattr(os, "statvfs", lambda place: free)
    assert train_run(config(tmp_path / "none", epochs=1))["epochs_run"] == 1
    with pytest.raises(UserError, match=r"MiB of free space, and the run's checkpoints need 0\.2;"):
        train_run(config(tmp_path / "kept", keep_every=1))
    assert not (tmp_path / "kept" / "checkpoint").exists()
    # What is certain is counted: until the patience ends.
    store = KeptParams(tmp_path, 5, "x")
    params = nnx.State({"table": nnx.Param(jnp.zeros(10))})
    assert store.least_bytes(config(tmp_path, epochs=100, patience=20), params, 0, 0) == 4 * 40
    assert store.least_bytes(config(tmp_path, epochs=100, patience=20), params, 23, 12) == 2 * 40
    assert store.least_bytes(config(tmp_path, epochs=11, patience=20), params, 0, 0) == 2 * 40
    assert KeptParams(tmp_path, None, "x").least_bytes(config(tmp_path), params, 0, 0) == 0


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_number_that_keeps_nothing_is_refused(value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--model", "vbpr", "--data", "demo", "--out", str(tmp_path / "run"), "--keep-every", value]
    assert_one_sentence(main(command), capfd.readouterr(), f"keep_every is {value}; it must be at least 1")
    assert not (tmp_path / "run").exists()
