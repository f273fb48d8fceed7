"""Two processes on one machine train the run of one, and end together whatever happens to one of them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax.sharding import Mesh, NamedSharding
from two_processes import Ended, address, start_two

from mgrad_jax import devices, models, processes
from mgrad_jax.cli.distributed import Crew
from mgrad_jax.errors import UserError
from mgrad_jax.training import entries, stored_state
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.checkpoint_directory import CheckpointLost
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.run import train_run

SETTINGS: dict[str, Any] = {"model": "vbpr", "data": "demo", "epochs": 3, "batch_size": 2400}
SETTINGS |= {"hyper_parameters": {"embedding_dim": 4}}
TRAIN = shlex.split("train --model vbpr --data demo --epochs 3 --batch-size 2400 --set embedding_dim=4")

IN_FLOAT64 = """
from functools import partial
import jax.numpy as jnp
from mgrad_jax import models
models.create = partial(models.create, dtype=jnp.float64)
"""

COMMAND = IN_FLOAT64 + "import sys\nfrom mgrad_jax.cli import main\nsys.exit(main(sys.argv[1:]))\n"

# Sends itself a signal while the second epoch is written down.
SIGNALLED = """
import os, signal
from mgrad_jax.training.history import History
append = History.append
def signalled(self, report):
    if report.epoch == 2:
        os.kill(os.getpid(), signal.{name})
    append(self, report)
History.append = signalled
"""

# What the second process has otherwise than the first: each time both are told, and can go on.
DIFFERENT = """
import sys
from dataclasses import replace
from mgrad_jax import processes
from mgrad_jax.cli.distributed import Crew, joined
from mgrad_jax.errors import UserError
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.run import train_run
address, number, out, tiny = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
processes._SHARING_SECONDS = 0.2
run = RunConfig("vbpr", "demo", epochs=1, hyper_parameters={"embedding_dim": 4}, out=out)
others = [{"data": "nowhere"}, {"data": tiny}, {"seed": 7}, {"out": out + "2"}, {"data": "nowhere"}]
with joined(Crew(False, address, 2, number)):
    for turn, other in enumerate(others):
        try:
            train_run(replace(run, **other) if number == 1 else run, devices="all")
        except UserError as error:
            if turn == len(others) - 1:
                raise
            print(error)
"""


def train_two(out: Path, cache: Path, *options: str, before: str = "") -> list[Ended]:
    common = [*TRAIN, "--out", str(out), *options, "--coordinator", address(), "--processes", "2", "--process"]
    return start_two(COMMAND, [[*common, "0"], [*common, "1"]], cache, before)


def history(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "history.csv").drop(columns=["seconds_train", "seconds_evaluate"])


def saved(out: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.name: stored_state.read_leaves(path) for path in (out / "checkpoint").iterdir()}


@pytest.fixture
def float64(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process in float64, too."""
    monkeypatch.setattr(models, "create", partial(models.create, dtype=jnp.float64))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, list[Ended]]:
    """The directory of two processes' run, and how they ended."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, train_two(out, cache)


def assert_within_rounding(left: Path, right: Path) -> None:
    """The same run in float64, but for the order of sums."""
    pd.testing.assert_frame_equal(history(left), history(right), rtol=1e-12, atol=0)
    ours, theirs = saved(left), saved(right)
    assert ours.keys() == theirs.keys()
    for name, leaves in ours.items():
        for leaf, value in leaves.items():
            np.testing.assert_allclose(value, theirs[name][leaf], rtol=0, atol=1e-10, err_msg=leaf)


def test_two_processes_train_the_run_of_one(unbroken: tuple[Path, list[Ended]], tmp_path: Path, float64: None) -> None:
    out, (first, second) = unbroken
    assert [first.code, second.code] == [0, 0], first.error + second.error
    assert first.error == second.error == second.out == ""
    assert "epoch 3" in first.out
    assert str(out) in first.out
    assert sorted(os.listdir(out)) == ["checkpoint", "config.yaml", "curves.png", "history.csv", "result.json"]
    train_run(RunConfig(**SETTINGS, out=str(tmp_path / "one")))
    assert_within_rounding(out, tmp_path / "one")
    ours, theirs = (json.loads((place / "result.json").read_text()) for place in (out, tmp_path / "one"))
    assert (ours["devices"], ours["processes"], ours["platform"]) == (4, 2, "cpu")
    assert (theirs["devices"], theirs["processes"], theirs["platform"]) == (1, 1, "cpu")
    assert (ours["run"], ours["best_epoch"]) == (theirs["run"], theirs["best_epoch"])


@pytest.mark.slow
def test_a_run_goes_on_after_a_process_is_killed_and_after_one_is_stopped(
    unbroken: tuple[Path, list[Ended]], tmp_path: Path, cache: Path, float64: None
) -> None:
    out = tmp_path / "run"
    first, second = train_two(out, cache, before=SIGNALLED.format(name="SIGKILL"))
    assert (first.code, second.code) == (3, -signal.SIGKILL), first.error
    assert first.error.startswith(f"{out}: another process is gone")
    assert first.error.endswith("epoch 1 is on disk, start all processes again with --resume.\n")
    assert first.error.count("\n") == 1
    assert Checkpoints(out / "checkpoint").latest_epoch() == 1

    alone = tmp_path / "alone"
    shutil.copytree(out, alone)
    with pytest.warns(UserWarning, match="devices was 4 and is 1, processes was 2 and is 1.*the last bits"):
        train_run(RunConfig(**SETTINGS, out=str(alone)), resume=True)
    assert_within_rounding(unbroken[0], alone)

    for ended in train_two(out, cache, "--resume", before=SIGNALLED.format(name="SIGTERM")):
        assert ended.code == 130
        assert ended.error == f"stopped after epoch 2; to go on, repeat the command with --out {out} --resume.\n"
    assert len(history(out)) == Checkpoints(out / "checkpoint").latest_epoch() == 2

    for ended in train_two(out, cache, "--resume"):
        assert (ended.code, ended.error) == (0, "")
    pd.testing.assert_frame_equal(history(unbroken[0]), history(out), check_exact=True)
    ours, theirs = saved(unbroken[0]), saved(out)
    assert ours.keys() == theirs.keys()
    for name, leaves in ours.items():
        assert {leaf: x.tobytes() for leaf, x in leaves.items()} == {
            leaf: x.tobytes() for leaf, x in theirs[name].items()
        }


@pytest.mark.slow
def test_what_one_process_lacks_or_has_otherwise_ends_both(tmp_path: Path, cache: Path) -> None:
    tiny = Path(__file__).parent.parent / "golden" / "tiny"
    common = [address(), str(tmp_path / "run"), str(tiny)]
    arguments = [[common[0], number, *common[1:]] for number in ("0", "1")]
    first, second = start_two(DIFFERENT, arguments, cache)
    assert (first.code, second.code) == (2, 2), first.error + second.error
    missing, data, seed, shared = first.out.splitlines()
    assert "process 1 on " in missing
    assert "nowhere" in missing
    assert "data with the digest" in data
    assert "process 1" in seed
    assert "has seed 7, and process 0" in seed
    assert "a file system that all hosts share" in shared
    assert "nowhere" in first.error
    assert "nowhere" in second.error
    assert first.error.count("\n") == second.error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, bool, jnp.bfloat16])
@pytest.mark.usefixtures("x64")
def test_a_digest_of_entries_does_not_depend_on_how_they_are_split(dtype: Any) -> None:
    table = np.random.default_rng(0).normal(size=(6, 8)).astype(dtype)
    over = devices.mesh(4)
    split = jax.device_put(jnp.asarray(table), NamedSharding(over, devices.COLUMNS))
    np.testing.assert_array_equal(entries._program_of(over)(split), entries._sums(table))


@pytest.mark.parametrize("change", ["flipped", "swapped", "renamed", "typed"])
def test_a_digest_of_entries_changes_with_every_bit_and_place(change: str) -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    other = {"x": table.copy()}
    if change == "flipped":
        other["x"].view(np.uint32)[2, 1] ^= 1
    elif change == "swapped":
        other["x"][0], other["x"][1] = table[1], table[0]
    elif change == "renamed":
        other = {"y": table}
    else:
        other = {"x": table.view(np.int32)}
    assert entries.entries_digest(other) != entries.entries_digest({"x": table})


def test_damage_to_what_several_processes_wrote_is_noticed_by_one(tmp_path: Path) -> None:
    state, path = {"x": np.arange(5.0)}, tmp_path / "000001-best-000001"
    leaves = {"['x']": state["x"]}
    stored_state.write_leaves(path, leaves)

    def describe(written: dict[str, np.ndarray]) -> None:
        content = {"notes": {}, "state": entries.entries_digest(written)}
        text = json.dumps({**content, "digest": stored_state.seal(content)})
        (path / stored_state.SIDECAR).write_text(text)

    describe(leaves)
    epoch, read = Checkpoints(tmp_path).restore(state)
    assert epoch == 1
    np.testing.assert_array_equal(read["x"], state["x"])
    describe({"['x']": state["x"][::-1]})
    with pytest.raises(CheckpointLost, match="is damaged"):
        Checkpoints(tmp_path).restore(state)


@pytest.mark.parametrize(
    ("crew", "part"),
    [
        (Crew(True, "host:1", 2, 0), "--distributed finds the others by itself"),
        (Crew(False, "host:1", 2, None), "belong together"),
        (Crew(False, None, None, 0), "belong together"),
        (Crew(False, "host", 2, 0), "HOST:PORT"),
        (Crew(False, "host:0", 2, 0), "HOST:PORT"),
        (Crew(False, "host:99999", 2, 0), "HOST:PORT"),
        (Crew(False, "host:1", 2, 2), "--process is 2 of 2"),
    ],
)
def test_options_of_processes_that_do_not_go_together_are_refused(crew: Crew, part: str) -> None:
    with pytest.raises(UserError, match=part):
        crew.is_asked_for()


def test_a_port_that_is_in_use_is_refused() -> None:
    with socket.socket() as used:
        used.bind(("", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be used on this host .*; choose another"):
            processes._check_free(port)
    processes._check_free(port)


def test_one_process_needs_no_options_and_no_others() -> None:
    assert not Crew(False, None, None, None).is_asked_for()
    assert Crew(True, None, None, None).is_asked_for()
    assert not processes.several()
    assert processes.is_first()
    assert processes.by_first(lambda: {1: (2,)}) == {1: (2,)}  # as it is, not as JSON would make it
    assert processes.any_of(True)
    assert not processes.any_of(False)


def test_devices_are_shared_by_processes_evenly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Device:
        id: int
        process_index: int
        platform: str = "cpu"

    there = [Device(number, number // 5) for number in range(8)]
    monkeypatch.setattr(jax, "devices", lambda platform=None: there)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_mesh", lambda shape, names, axis_types, devices: Mesh(np.array(devices), names))
    assert [device.id for device in devices.mesh(4).devices.flat] == [0, 1, 5, 6]
    with pytest.raises(UserError, match="7 devices cannot be shared evenly by 2 processes"):
        devices.mesh(7)
    with pytest.raises(UserError, match="process 1 has 3 devices and was to give 4"):
        devices.mesh("all")
