"""`mgrad-jax compare`: does a training help, and is it more than extra updates?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.console import print_table
from mgrad_jax.cli.options import HyperParameters, Part, names, numbers, pairs, scalar, takes_settings
from mgrad_jax.cli.training import told
from mgrad_jax.errors import UserError
from mgrad_jax.training.methods import METHODS
from mgrad_jax.training.settings import RunSettings

if TYPE_CHECKING:
    from mgrad_jax.analysis.report import Table
    from mgrad_jax.analysis.study import Outcome, Study
    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.fit import EpochReport


# What all runs of a study have in common.
_SHARED = Part(
    RunSettings,
    (
        *("alpha1", "alpha2", "adversarial", "learning_rate", "weight_decay", "max_norm"),
        *("epochs", "patience", "batch_size", "metric", "keep_every"),
    ),
)


@takes_settings(settings=_SHARED)
def compare(
    *,
    data: Annotated[str, typer.Option(help="Directory in MMRec format, or 'demo'.")],
    models: Annotated[str, typer.Option(metavar="NAME,...", help="Models; `mgrad-jax models` lists them.")],
    out: Annotated[str, typer.Option(help="The study's directory.")],
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help=f"How to train: {', '.join(METHODS)}. replay, the control with as many updates, is always there.",
        ),
    ] = "plain,replay,mirror",
    optimizers: Annotated[str, typer.Option(metavar="NAME,...", help="Optimizers, as in `train`.")] = "adam",
    intervals: Annotated[str, typer.Option(metavar="N,...", help="Intervals of mirror and replay.")] = "3",
    seeds: Annotated[
        str, typer.Option(metavar="N", help="How many, counted upwards from --seed, or a list such as 999,42,2024.")
    ] = "5",
    seed: Annotated[int, typer.Option(help="The first seed.")] = 999,
    hyper: HyperParameters = None,
    metrics: Annotated[
        str, typer.Option(metavar="NAME,...", help="Test metrics in the tables, besides --metric.")
    ] = "recall@5,recall@20,ndcg@20",
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Try a setting that only some methods have, alpha2=0.1,0.2,0.3, and keep the best on validation; "
            "replay is tried as often with other seeds.",
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="As in `train`; of a study, the plain run of the same model and seed."),
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(metavar="NPY", help="Also rank held-out items among sampled candidates, as AMR does.")
    ] = None,
    settings: dict[str, Any],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs with an estimate of the time.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in --out, or extend it.")] = False,
) -> None:
    """Compare trainings of models over seeds: tables, paired tests, convergence; one resumable run each."""
    if not dry_run:
        use_compilation_cache()
    from mgrad_jax.analysis.compare_report import check_metrics, write_report
    from mgrad_jax.analysis.study import Study

    study = Study(
        data=data,
        models=names("--models", models),
        out=out,
        methods=names("--methods", methods),
        optimizers=names("--optimizers", optimizers),
        intervals=numbers("--intervals", intervals, int),
        seeds=seeds_of(seeds, seed),
        hyper_parameters=pairs("--set", hyper or ()),
        settings=settings,
        tune=values_by_name("--tune", tune or ()),
        candidates=candidates,
        start_from=start_from,
    )
    shown = names("--metrics", metrics)
    check_metrics(shown, next(iter(study.configs().values())))
    if dry_run:
        _print_estimate(study)
        return
    report = write_report(study, train_outcome(study, resume), shown)
    print_tables(report.means, *(() if report.tried is None else (report.tried,)), report.equal, report.convergence)
    for sentence in report.verdicts:
        print(sentence)
    print(f"Tables, tests and pictures: {study.directory}")


def values_by_name(option: str, arguments: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The lists of numbers in `name=value,value` arguments."""
    found: dict[str, tuple[float, ...]] = {}
    for argument in arguments:
        name, separator, values = (part.strip() for part in argument.partition("="))
        given = tuple(scalar(value.strip()) for value in values.split(","))
        if not separator or not name or not all(type(number) in (int, float) for number in given):
            raise UserError(
                f"{option} {argument} is not of the form name=number,number; write for example {option} alpha2=0.1,0.2."
            )
        if name in found:
            raise UserError(f"{option} {name} is given twice; write all its values in one list.")
        found[name] = given
    return found


def seeds_of(text: str, first: int) -> tuple[int, ...]:
    """The seeds that `--seeds` names: so many from the first on, or a list."""
    found = numbers("--seeds", text, int)
    if len(found) > 1:
        return found
    if found[0] < 1:
        raise UserError(f"--seeds is {found[0]}; it must be at least 1, and 5 for a test to go by.")
    return tuple(range(first, first + found[0]))


def train_outcome(study: Study, resume: bool) -> Outcome:
    """Train and tell which run it is at, as it starts and after every epoch."""
    from mgrad_jax.analysis.study import STUDY_FILE, train_study

    total = len(study.configs())

    def state(done: int, config: RunConfig, report: EpochReport | None) -> tuple[str, int, int]:
        text = "starting" if report is None else f"epoch {report.epoch}  best {report.best_epoch}"
        return f"run {done + 1} of {total}  {config.directory.name}  {text}", done, total

    with told("compare", study.directory, state, begun=STUDY_FILE) as report:
        return train_study(study, resume=resume, progress=report)


def _print_estimate(study: Study) -> None:
    from mgrad_jax.analysis.estimate import estimate

    headings = ("model", "method", "optimizer", "interval", "runs to train", "seconds per epoch", "at least", "at most")
    rows, total = [], [0.0, 0.0]
    for row in estimate(study):
        interval = "" if row.cell.interval is None else str(row.cell.interval)
        times = map(duration, (row.least, row.most))
        rows.append([*row.cell[:3], interval, str(row.runs), f"{row.epoch:.3g}", *times])
        total = [total[0] + row.least, total[1] + row.most]
    rows.append(["all", "", "", "", "", "", *map(duration, total)])
    notes = [
        "at least: every run stops after patience + 1 epochs; at most: every run trains all --epochs",
        *(str(config.directory) for config in study.configs().values()),
    ]
    print_table(f"{len(study.configs())} runs in {study.directory / 'runs'}", headings, rows, notes)


def duration(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_tables(*tables: Table) -> None:
    """Show tables of an analysis, captions below."""
    from mgrad_jax.analysis.report import texts

    for table in tables:
        print_table("", [column.name for column in table.columns], texts(table), [table.caption])
