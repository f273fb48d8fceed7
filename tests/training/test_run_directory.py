"""What a run's directory survives: files missing, damaged, unreadable, of another run or held by another process."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from mgrad_jax import files
from mgrad_jax.data.digests import digest
from mgrad_jax.errors import UserError
from mgrad_jax.files import locked
from mgrad_jax.training import checkpoint, identity, stored_state
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.fit import TrainingDiverged
from mgrad_jax.training.run import load_run, train_run

EPOCHS = 6


def config(out: Path, **changes: Any) -> RunConfig:
    values = {"model": "lightgcn", "data": "demo", "training": "plain", "epochs": EPOCHS, "seed": 7, "out": str(out)}
    values |= {"hyper_parameters": {"embedding_dim": 4}, "learning_rate": 0.02}
    return RunConfig(**{**values, "batch_size": 1800, **changes})  # four batches, none partial: one scan to compile


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose best epoch is not its last one."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train_run(config(out))["best_epoch"] < EPOCHS
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def unfinished(run: Path) -> Path:
    """As after a kill in the last epoch."""
    for name in ("result.json", "curves.png"):
        (run / name).unlink()
    return run


def history(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "history.csv", dtype=str).drop(columns=["seconds_train", "seconds_evaluate"])


def content(out: Path) -> dict[str, Any]:
    """What does not depend on the time of day."""
    result = json.loads((out / "result.json").read_text())
    del result["seconds"]
    names = sorted(str(path.relative_to(out)) for path in [*out.iterdir(), *(out / "checkpoint").iterdir()])
    return {"result": result, "files": names, "history": history(out).to_dict()}


def checkpoints(out: Path) -> list[Path]:
    """The best and the latest."""
    return sorted((out / "checkpoint").iterdir())


def spoil(path: Path) -> None:
    """Change a byte of a checkpoint's largest file."""
    file = max((p for p in path.rglob("*") if p.is_file() and "/d/" in str(p)), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# --- what is derived is made again ------------------------------------------------------------------------------------


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256))),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deep": lambda path: path.write_text("[" * 50_000),
    "no number": lambda path: path.write_bytes(path.read_bytes().replace(b": 6", b': "6"').replace(b"6,0", b"6,x")),
    "not finite": lambda path: path.write_bytes(
        path.read_bytes().replace(b": 0.", b": NaN, ").replace(b",0.", b",nan")
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"empty", "half"}))
def test_a_finished_run_is_completed(finished: Path, run: Path, damage: str) -> None:
    for name in ("history.csv", "result.json", "config.yaml"):
        DAMAGES[damage](run / name)
    before = [path.stat().st_ino for path in checkpoints(run)]
    train_run(config(run), resume=True)
    assert content(run) == content(finished)
    assert [path.stat().st_ino for path in checkpoints(run)] == before
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 7


@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_curves_that_are_missing_or_cut_short_are_drawn_again(finished: Path, run: Path, damage: str) -> None:
    DAMAGES[damage](run / "curves.png")
    train_run(config(run), resume=True)
    assert (run / "curves.png").read_bytes()[-12:].count(b"IEND") == 1
    assert content(run) == content(finished)


@pytest.mark.slow
def test_checkpoints_outlive_their_history(finished: Path, run: Path) -> None:
    (unfinished(run) / "history.csv").unlink()
    (run / "config.yaml").unlink()
    before = [path.stat().st_ino for path in checkpoints(run)]
    train_run(config(run), resume=True)
    assert [path.stat().st_ino for path in checkpoints(run)] == before
    assert content(run) == content(finished)


def test_rows_after_the_latest_checkpoint_are_trained_again(finished: Path, run: Path) -> None:
    shutil.rmtree(checkpoints(unfinished(run))[-1])
    train_run(config(run), resume=True)
    assert content(run) == content(finished)


@pytest.mark.parametrize("name", ["history.csv", "result.json", "config.yaml"])
def test_a_directory_or_pipe_in_place_of_a_file_is_named(run: Path, name: str) -> None:
    for make in (os.mkdir, os.mkfifo):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(UserError, match=f"{name} is not a file; move away"):
            train_run(config(run), resume=True)


def test_a_file_too_large_to_be_ours_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LARGEST", 20_000)
    with (run / "config.yaml").open("ab") as stream:
        stream.truncate(30_000)
    with pytest.raises(UserError, match=r"config\.yaml is damaged \(it has 30000 bytes\)"):
        load_run(run)


@pytest.mark.parametrize(
    "settings",
    ["seed: [1]\n", "ks: 5\n", "learning_rate: .nan\n", "model: 5\n", "hyper_parameters: [1]\n", "seed: 1e400\n"],
)
def test_a_configuration_of_wrong_types_is_refused(run: Path, settings: str) -> None:
    before = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**before, **yaml.safe_load(settings)}))
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_run(run)
    train_run(config(run), resume=True)  # the checkpoint holds the configuration, too
    assert load_run(run).config.seed == 7


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "is_finished"), [("damaged", True), ("missing", False)])
def test_a_best_checkpoint_that_is_lost_is_trained_again(
    finished: Path, run: Path, how: str, is_finished: bool
) -> None:
    expected = load_run(finished)
    if not is_finished:
        unfinished(run)
    best = checkpoints(run)[0]
    shutil.rmtree(best) if how == "missing" else spoil(best)
    with pytest.raises(UserError, match="resume the run") as error:
        load_run(run)
    assert "delete" not in str(error.value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_run(config(run), resume=True)
    assert any("is trained again at the end" in str(warning.message) for warning in caught)
    assert content(run) == content(finished)
    assert (load_run(run).model.scores(np.array([0])) == expected.model.scores(np.array([0]))).all()


def test_a_damaged_latest_checkpoint_may_be_deleted_once_the_best_was_read(finished: Path, run: Path) -> None:
    latest = checkpoints(unfinished(run))[-1]
    spoil(latest)
    best = load_run(run).epoch
    with pytest.raises(UserError, match=f"{latest} is damaged; delete it to go on from epoch {best}"):
        train_run(config(run), resume=True)
    shutil.rmtree(latest)
    train_run(config(run), resume=True)
    assert content(run) == content(finished)


def test_what_cannot_be_read_now_is_not_called_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = checkpoints(unfinished(run))[0]
    original = Path.open

    def deny(path: Path, *arguments: Any, **options: Any) -> Any:
        if best in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); make it readable") as error:
        load_run(run)
    assert "delete" not in str(error.value)
    monkeypatch.undo()

    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "asarray", no_memory)
    with pytest.raises(UserError, match=r"cannot be read \(not enough memory\)"):
        checkpoint.Checkpoints(run / "checkpoint").restore({"x": np.zeros(1)})


def test_a_note_that_was_changed_is_damage(run: Path) -> None:
    best = checkpoints(run)[0]
    text = (best / "run.json").read_text()
    (best / "run.json").write_text(text.replace("epoch,loss", "epoch,Loss"))
    with pytest.raises(UserError, match=f"{best} is damaged; resume"):
        load_run(run)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on(finished: Path, run: Path, tmp_path: Path) -> None:
    """Its checkpoints have a fingerprint among their arrays and no notes; its data a checksum."""
    ocp = stored_state.orbax()
    for path in checkpoints(unfinished(run)):
        leaves = stored_state.read_leaves(path)
        leaves["fingerprint"] = stored_state.fingerprint(leaves)
        shutil.rmtree(path)
        ocp.PyTreeCheckpointer().save(path, leaves)
    data = load_run(finished).data
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "data_digest": identity._checksum(data)}))
    load_run(run)
    train_run(config(run, epochs=EPOCHS), resume=True)
    assert content(run) == content(finished)
    unfinished(run)
    (run / "history.csv").write_bytes((run / "history.csv").read_bytes()[:-40])
    with pytest.warns(UserWarning, match="lacks epochs, of which checkpoints of earlier versions hold no copy"):
        train_run(config(run, epochs=EPOCHS + 1), resume=True)
    assert history(run)["epoch"].tolist() == ["1", "2", "3", "4", "5", "7"]


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another seed."""
    out = tmp_path_factory.mktemp("runs") / "other"
    train_run(config(out, seed=8, epochs=2))
    return out


def test_files_of_another_run_are_refused_by_name(run: Path, other: Path) -> None:
    shutil.copy(other / "result.json", run / "result.json")
    with pytest.raises(UserError, match=r"result\.json is the result of another run; move it away"):
        train_run(config(run), resume=True)
    shutil.rmtree(run / "checkpoint")
    shutil.copytree(other / "checkpoint", run / "checkpoint")
    with pytest.raises(
        UserError, match=r"checkpoint.* belongs to another run than .*config\.yaml \(seed was 8 and is 7\)"
    ):
        load_run(run)
    with pytest.raises(UserError, match=r"checkpoint.* was begun with other settings \(seed was 8 and is 7\)"):
        train_run(config(run), resume=True)


def test_a_best_checkpoint_of_another_run_is_refused(run: Path, other: Path) -> None:
    best = checkpoints(unfinished(run))[0]
    shutil.rmtree(best)
    shutil.copytree(checkpoints(other)[0], best)
    for use in (load_run, lambda out: train_run(config(out), resume=True)):
        with pytest.raises(UserError, match=f"{best} .*seed was 8 and is 7"):
            use(run)


def test_the_digest_sees_every_change_and_no_other() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    digests = {
        digest(arrays)
        for arrays in (
            {"x": rows},
            {"x": rows[::-1]},
            {"x": rows.reshape(3, 4)},
            {"x": rows.view(np.int32)},
            {"y": rows},
            {"x": rows[:2], "y": rows[2:]},
        )
    }
    assert len(digests) == 6
    assert digest({"x": rows}) == digest({"x": np.asfortranarray(rows)})


@pytest.mark.parametrize(
    ("training", "changes"),
    [
        ("plain", {"alpha1": 0.5, "interval": 2}),
        ("sam", {"alpha1": 0.5, "alpha2": 0.1, "interval": 2}),
        ("replay", {"alpha2": 0.1}),
        ("mirror", {"learning_rate_decay": (1.0, 20.0)}),
        ("ssam-f", {"epochs": 9}),
        ("mirror", {"patience": 3, "epochs": 9}),
    ],
)
def test_what_changes_no_number_does_not_tell_runs_apart(
    tmp_path: Path, training: str, changes: dict[str, Any]
) -> None:
    one, two = (config(tmp_path, training=training, **extra).to_dict() for extra in ({}, changes))
    assert identity.differences(one, two) == ""
    assert identity.identity(one) == identity.identity(two)


@pytest.mark.parametrize(
    ("training", "changes"),
    [
        ("mirror", {"alpha1": 0.5}),
        ("replay", {"interval": 2}),
        ("ssam-d", {"epochs": 9}),
        ("plain", {"learning_rate_decay": (0.9, 20.0)}),
        ("plain", {"hyper_parameters": {"embedding_dim": 8}}),
    ],
)
def test_what_changes_a_number_tells_runs_apart(tmp_path: Path, training: str, changes: dict[str, Any]) -> None:
    one, two = (config(tmp_path, training=training, **extra).to_dict() for extra in ({}, changes))
    assert identity.differences(one, two) != ""
    assert identity.identity(one) != identity.identity(two)


def test_another_machine_is_said(finished: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "machine", lambda: {"threads": 96})
    with pytest.warns(UserWarning, match="was trained elsewhere .*threads was .* and is 96.*last bits"):
        train_run(config(run), resume=True)


# --- how far to go ----------------------------------------------------------------------------------------------------


def test_more_patience_goes_on_and_less_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    out, unbroken = tmp_path / "run", tmp_path / "unbroken"
    stopped = train_run(config(out, epochs=12, patience=0))
    assert stopped["epochs_run"] < 12
    further = train_run(config(out, epochs=12, patience=2), resume=True)
    assert further["epochs_run"] > stopped["epochs_run"]
    train_run(config(unbroken, epochs=12, patience=2))
    assert content(out) == content(unbroken)
    before = (out / "result.json").stat().st_mtime_ns
    assert train_run(config(out, epochs=12, patience=0), resume=True) == further
    with pytest.warns(UserWarning, match="epochs, more than were asked for"):
        assert train_run(config(out, epochs=2, patience=2), resume=True) == further
    assert (out / "result.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_after_divergence_in_the_first_epoch_the_directory_can_be_used(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged):
        train_run(config(tmp_path / "run", learning_rate=1e30, optimizer="sgd"))
    assert train_run(config(tmp_path / "run", epochs=1))["epochs_run"] == 1


# --- the directory as a whole -----------------------------------------------------------------------------------------


def test_a_directory_in_use_is_left_alone(run: Path) -> None:
    before = content(run)
    with locked(run) as lock:
        for resume in (True, False):
            with pytest.raises(UserError, match=f"{run} is in use by process {os.getpid()};"):
                train_run(config(run, epochs=EPOCHS + 1), resume=resume)
        lock.check()
        assert load_run(run).epoch == before["result"]["best_epoch"]  # reading needs no lock
    assert content(run) == before


def test_what_a_killed_process_left_is_removed(finished: Path, run: Path) -> None:
    (run / ".history.csv.4711.tmp").write_text("x")
    (run / ".lock").write_text("4711 on here\n")
    shutil.copytree(checkpoints(run)[0], run / "checkpoint" / "000009-best-000002.unfinished")
    train_run(config(run), resume=True)
    assert content(run) == content(finished)


def test_a_lock_leaves_no_trace_where_nothing_was_written(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").read_text().split()[0] == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_directory_that_disappears_under_way_is_reported(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def remove(report: Any) -> None:
        if report.epoch == 3:
            out.rename(tmp_path / "elsewhere")

    with pytest.raises(UserError, match="removed"):
        train_run(config(out), progress=remove)
    assert history(tmp_path / "elsewhere")["epoch"].tolist() in (["1"], ["1", "2"])


@pytest.mark.slow
def test_a_best_checkpoint_that_disappears_under_way_is_reported(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    best = json.loads((finished / "result.json").read_text())["best_epoch"]

    def remove(report: Any) -> None:
        if report.epoch == EPOCHS:
            shutil.rmtree(next((out / "checkpoint").glob(f"{best:06d}-*")))

    with pytest.raises(UserError, match="lacks the checkpoint of epoch"):
        train_run(config(out), progress=remove)
    with pytest.warns(UserWarning, match="trained again"):
        train_run(config(out), resume=True)
    assert content(out) == content(finished)


def test_the_space_for_checkpoints_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 1, 512

    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda _: Full)
        with pytest.raises(UserError, match="free space, and the run's checkpoints need"):
            train_run(config(tmp_path / "run"), progress=lambda report: pytest.fail("it trained"))
    assert train_run(config(tmp_path / "run", epochs=1), resume=True)["epochs_run"] == 1


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_finished_epoch(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    original, written = checkpoint.write_whole, []

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        original(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free space"):
        train_run(config(out))
    assert history(out)["epoch"].tolist() == ["1", "2", "3"]
    train_run(config(out), resume=True)
    assert content(out) == content(finished)
    assert capfd.readouterr().err == ""
