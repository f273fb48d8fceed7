"""Runs grouped for a comparison, and one sentence where they do not compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mgrad_jax.analysis.runs import group_runs
from mgrad_jax.errors import UserError
from mgrad_jax.training.config import RunConfig


def run(directory: Path, *, digest: str = "1", finished: bool = True, checkpoint: bool = True, **settings: Any) -> Path:
    """The directory of a run as far as grouping reads it."""
    values = {"model": "vbpr", "data": "demo", "training": "plain", "seed": 1, "out": str(directory), **settings}
    directory.mkdir(parents=True)
    content = {**RunConfig(**values).to_dict(), "data_digest": digest}
    (directory / "config.yaml").write_text(yaml.safe_dump(content))
    if finished:
        (directory / "result.json").write_text("{}")
    if checkpoint:
        (directory / "checkpoint" / "000001-best-000001").mkdir(parents=True)
    return directory


def test_runs_are_grouped_by_model_and_training_and_paired_by_seed(tmp_path: Path) -> None:
    plain = [run(tmp_path / f"p{seed}", seed=seed) for seed in (2, 1)]
    replay = run(tmp_path / "r", training="replay")
    mirror = run(tmp_path / "m", training="mirror")
    other = run(tmp_path / "b", model="bm3", alpha1=0.5)
    groups = group_runs([*plain, replay, mirror, other])
    assert groups == {
        "vbpr": {"plain": {1: plain[1], 2: plain[0]}, "replay": {1: replay}, "mirror": {1: mirror}},
        "bm3": {"plain": {1: other}},
    }


def test_intervals_and_optimizers_are_told_where_they_differ(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"{n}", training="replay", interval=n) for n in (1, 3)]
    runs.append(run(tmp_path / "p", training="plain", optimizer="sgd", learning_rate=0.1))
    assert list(group_runs(runs)["vbpr"]) == ["replay every 1, adam", "replay every 3, adam", "plain, sgd"]


def test_what_has_no_effect_in_a_training_may_differ(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", seed=1, alpha1=0.5), run(tmp_path / "b", seed=2, interval=7)]
    assert group_runs(runs) == {"vbpr": {"plain": {1: runs[0], 2: runs[1]}}}


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "data": ([{}, {"digest": "2"}], "were trained on different data; give runs of one dataset"),
    "twice": ([{}, {}], "are the same training and seed; give one of them"),
    "epochs": ([{}, {"training": "replay", "epochs": 5}], "do not compare: epochs is 1000 and 5"),
    "hyper-parameter": ([{}, {"seed": 2, "hyper_parameters": {"reg_weight": 0.5}}], "reg_weight is 0.001 and 0.5"),
    "of the training": (
        [{"training": "replay"}, {"training": "replay", "seed": 2, "learning_rate": 0.1}],
        "learning_rate is 0.001 and 0.1",
    ),
    "no replay": ([{}, {"training": "mirror"}], "has runs of mirror and plain and none of replay"),
    "unfinished": ([{"finished": False}], "is a run that has not finished; go on with it with train --resume"),
    "no checkpoint": ([{"checkpoint": False}], "has no checkpoint, so that its model is lost; train the run anew"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_runs_that_do_not_compare(case: str, tmp_path: Path) -> None:
    settings, part = BAD[case]
    with pytest.raises(UserError, match=part):
        group_runs([run(tmp_path / str(number), **values) for number, values in enumerate(settings)])


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        group_runs([tmp_path / "none"])


def test_mirror_alone_needs_no_replay(tmp_path: Path) -> None:
    mirror = run(tmp_path / "m", training="mirror")
    assert group_runs([mirror]) == {"vbpr": {"mirror": {1: mirror}}}
