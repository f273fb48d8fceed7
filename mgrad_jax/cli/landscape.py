"""`mgrad-jax landscape`: surfaces of the training loss around trained models, and how flat it is there, in numbers."""

from __future__ import annotations

from dataclasses import asdict

from mgrad_jax.analysis.settings import LandscapeSettings
from mgrad_jax.cli import stopping
from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.compare import print_tables
from mgrad_jax.cli.console import run_progress
from mgrad_jax.cli.options import FinishedRuns, MovedData, NewDirectory, takes_settings
from mgrad_jax.errors import UserError


@takes_settings(settings=LandscapeSettings)
def landscape(runs: FinishedRuns, out: NewDirectory, *, data: MovedData = None, settings: LandscapeSettings) -> None:
    """Draw the loss around trained models and measure how flat it is, at the best epochs and at equal training loss."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    use_compilation_cache()
    from mgrad_jax.analysis.landscape_report import write_landscape
    from mgrad_jax.analysis.landscape_run import measure_landscapes
    from mgrad_jax.analysis.runs import group_runs

    groups = group_runs(runs)
    with run_progress("landscape", groups) as show:
        landscapes, name = measure_landscapes(groups, settings, data=data, progress=show)
    stopping.complete_what_is_begun()
    report = write_landscape(out, landscapes, groups, name, {"settings": asdict(settings)})
    print_tables(report.summary)
    for note in report.notes:
        print(note)
    print(f"Tables, tests, numbers and pictures: {out}")
