"""`mgrad-jax landscape`: surfaces of the training loss around trained models, and how flat it is there, in numbers."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated

import typer

from mgrad_jax.cli import stopping
from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.common import FinishedRuns, MovedData, NewDirectory
from mgrad_jax.cli.compare import print_tables
from mgrad_jax.cli.console import run_progress
from mgrad_jax.errors import UserError


def landscape(
    runs: FinishedRuns,
    out: NewDirectory,
    data: MovedData = None,
    directions: Annotated[
        str,
        typer.Option(
            help="Of the surface: 'filter' (every row of a table and every output of a kernel in units of its norm), "
            "'table' (of the whole table), or 'raw' (standard normal)."
        ),
    ] = "filter",
    points: Annotated[int, typer.Option(help="Points of the surface along each direction.")] = 21,
    reach: Annotated[float, typer.Option("--range", help="The surface goes from minus this to this.")] = 1.0,
    sample: Annotated[int, typer.Option(help="Training pairs the loss is taken over, in one batch.")] = 8192,
    scale_per: Annotated[
        str, typer.Option(help="Unit of scale-corrected numbers: root mean square of the 'table', or of each 'row'.")
    ] = "table",
    probes: Annotated[int, typer.Option(help="Random directions of the smoothed rise and of the trace.")] = 16,
    kept_epochs: Annotated[
        int, typer.Option(help="How many kept epochs of a run are measured at most (`train --keep-every`); 0: none.")
    ] = 12,
    seed: Annotated[int, typer.Option(help="Of pairs, negatives, dropout and directions.")] = 0,
) -> None:
    """Draw the loss around trained models and measure how flat it is, at the best epochs and at equal training loss."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    for option, value, known in (
        ("--directions", directions, ("filter", "table", "raw")),
        ("--scale-per", scale_per, ("table", "row")),
    ):
        if value not in known:
            raise UserError(f"{option} is '{value}'; choose one of {', '.join(known)}.")
    for option, number, least, most in (
        ("--points", points, 2, 1000),
        ("--sample", sample, 1, 2**31 - 1),
        ("--probes", probes, 1, 10_000),
        ("--kept-epochs", kept_epochs, 0, 2**31 - 1),
        ("--seed", seed, 0, 2**32 - 1),
    ):
        if not least <= number <= most:
            raise UserError(f"{option} is {number}; it must be between {least} and {most}.")
    if not 0 < reach < math.inf:
        raise UserError(f"--range is {reach}; it must be a positive number.")
    use_compilation_cache()
    from mgrad_jax.analysis.landscape_report import write_landscape
    from mgrad_jax.analysis.landscape_run import Asked, measure_landscapes
    from mgrad_jax.analysis.runs import group_runs

    asked = Asked(
        directions,  # type: ignore[arg-type]  # checked above
        points,
        reach,
        sample,
        scale_per,  # type: ignore[arg-type]
        probes,
        kept_epochs,
        seed,
    )
    groups = group_runs(runs)
    with run_progress("landscape", groups) as show:
        landscapes, name = measure_landscapes(groups, asked, data=data, progress=show)
    stopping.complete_what_is_begun()
    report = write_landscape(out, landscapes, groups, name, {"settings": asdict(asked)})
    print_tables(report.summary)
    for note in report.notes:
        print(note)
    print(f"Tables, tests, numbers and pictures: {out}")
