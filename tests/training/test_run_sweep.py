"""What a sweep's directory survives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mgrad_jax.errors import UserError
from mgrad_jax.files import locked
from mgrad_jax.training import sweep_run
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.sweep_run import SweepConfig, train_sweep


def config(out: Path, seeds: tuple[int, ...] = (1, 2), **changes: Any) -> SweepConfig:
    values = {"model": "lightgcn", "data": "demo", "training": "plain", "epochs": 1, **changes}
    return SweepConfig(RunConfig(**values, hyper_parameters={"embedding_dim": 4}), {"seed": list(seeds)}, out=str(out))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    train_sweep(config(out))
    return out


@pytest.fixture
def swept(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which nothing may be trained again."""
    monkeypatch.setattr(sweep_run, "sweep", lambda *_, **__: pytest.fail("it trained"))
    return shutil.copytree(finished, tmp_path / "sweep")


def content(out: Path) -> dict[str, bytes]:
    names = ("results.csv", "summary.csv", "best.json", "config.yaml")
    assert {path.name for path in out.iterdir()} == {*names, "members"}
    return {name: (out / name).read_bytes() for name in names}


def test_everything_but_the_members_is_made_again(finished: Path, swept: Path) -> None:
    for name in ("results.csv", "summary.csv", "best.json"):
        (swept / name).write_bytes(b"\0\xff")
    (swept / "config.yaml").unlink()
    (swept / ".best.json.12.tmp").write_text("half")
    train_sweep(config(swept), resume=True)
    assert content(swept) == content(finished)


def test_a_sweep_is_resumed_on_another_number_of_devices(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    train_sweep(config(out), devices=2)
    shutil.rmtree(out / "members" / "0001")
    train_sweep(config(out), devices=1, resume=True)
    for name in ("summary.csv", "best.json", "config.yaml"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    with pytest.raises(UserError, match="9 devices were asked for, and there are 8 cpu devices"):
        train_sweep(config(out), devices=9, resume=True)


def test_members_of_another_sweep_are_refused_by_name(swept: Path) -> None:
    (swept / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"members/0000/result\.json is the result of another run; move it away"):
        train_sweep(config(swept, seeds=(5, 6)), resume=True)
    with pytest.raises(UserError, match=r"members/0000/result\.json is of a sweep to other epochs or patience"):
        train_sweep(config(swept, epochs=9), resume=True)
    with pytest.raises(UserError, match="already holds a sweep"):
        train_sweep(config(swept))


def test_what_the_training_does_not_use_may_change(swept: Path) -> None:
    train_sweep(config(swept, alpha1=0.5, interval=2), resume=True)
    with pytest.raises(UserError, match="optimizer was 'adam' and is 'sgd'"):
        train_sweep(config(swept, optimizer="sgd"), resume=True)


@pytest.mark.parametrize(
    "change", [{"epochs_run": "1"}, {"best_epoch": 9}, {"valid": []}, {"test": {"recall@5": None}}, {"diverged": 1}]
)
def test_a_member_of_wrong_types_is_damaged(swept: Path, change: dict[str, Any]) -> None:
    path = swept / "members" / "0001" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=f"{path} is damaged"):
        train_sweep(config(swept), resume=True)


def test_a_sweep_in_use_is_left_alone(finished: Path, swept: Path) -> None:
    with locked(swept), pytest.raises(UserError, match="is in use by process"):
        train_sweep(config(swept), resume=True)
    assert content(swept) == content(finished)
