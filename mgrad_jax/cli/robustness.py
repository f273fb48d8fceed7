"""`mgrad-jax robustness`: what is left of a trained model when its item tables or its features change at inference."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgrad_jax.analysis.settings import RobustnessSettings
from mgrad_jax.cli import stopping
from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.compare import print_tables
from mgrad_jax.cli.console import run_progress
from mgrad_jax.cli.options import FinishedRuns, MovedData, NewDirectory, names, takes_settings
from mgrad_jax.errors import UserError

if TYPE_CHECKING:
    from mgrad_jax.data import Interactions


@takes_settings(settings=RobustnessSettings)
def robustness(
    runs: FinishedRuns,
    out: NewDirectory,
    *,
    data: MovedData = None,
    metrics: Annotated[str, typer.Option(metavar="NAME,...", help="What is measured.")] = "recall@5,recall@20,ndcg@20",
    settings: RobustnessSettings,
) -> None:
    """Change trained models at inference and tell what is lost, with bands over users, draws and seeds."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    asked = names("--metrics", metrics)
    use_compilation_cache()
    from mgrad_jax.analysis.robustness_report import write_robustness
    from mgrad_jax.analysis.robustness_run import changes_of, check_metric_names, measure_runs
    from mgrad_jax.analysis.runs import group_runs

    check_metric_names(asked)
    groups = group_runs(runs)
    interactions = _data_of(groups, data)
    changes, split = changes_of(settings, interactions), settings.split
    with run_progress("robustness", groups) as show:
        experiments = measure_runs(groups, changes, asked, split, seed=settings.seed, data=data, progress=show)
    told = {**asdict(settings), "noise": settings.adds_noise, "metrics": asked}
    stopping.complete_what_is_begun()
    report = write_robustness(out, experiments, asked, split, interactions, {"settings": told, "runs": groups})
    print_tables(report.summary, *([report.differences] if report.differences.rows else []))
    print(f"Tables, draws and pictures: {out}")


def _data_of(groups: dict[str, dict[str, dict[int, Path]]], data: str | None) -> Interactions:
    """The dataset of the runs, which is one."""
    from mgrad_jax.training.run import load_run

    trainings = next(iter(groups.values()))
    return load_run(next(iter(next(iter(trainings.values())).values())), data).data
