"""`mgrad-jax theory`: what Theorem 3.2 and Lemma 3.1 say, in numbers of a model or of finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgrad_jax.analysis.settings import TheorySettings
from mgrad_jax.cli import stopping
from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.compare import print_tables
from mgrad_jax.cli.console import progress
from mgrad_jax.cli.options import NewDirectory, names, pairs, takes_settings
from mgrad_jax.errors import UserError

if TYPE_CHECKING:
    from mgrad_jax.analysis.report import Table
    from mgrad_jax.analysis.theory_run import Subject


@takes_settings(settings=TheorySettings)
def theory(
    out: NewDirectory,
    *,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN...]", help="Directories of finished runs, or of a study of `compare`."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Instead of runs: models to train here for a few epochs.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data of --model; or where the runs' data lie now, if they were moved.")
    ] = None,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Lemma 3.1 and Eq. 8 instead: how the loss answers to the features.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter of --model; repeatable.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(metavar="NAME,...", help="What --inputs measures under worst-case changes.")
    ] = "recall@20,recall@5",
    settings: TheorySettings,
) -> None:
    """Measure what the theorem and the lemma of Mirror Gradient say about a model."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    if bool(runs) == (model is not None):
        raise UserError("give either directories of runs or --model with --data, one of the two.")
    if model is not None and data is None:
        raise UserError("--model needs --data, a directory in MMRec format or 'demo'.")
    if set_ and model is None:
        raise UserError("--set is for --model, and runs have hyper-parameters of their own; leave it out.")
    use_compilation_cache()
    from mgrad_jax.analysis.robustness_run import check_metric_names
    from mgrad_jax.optimizers import make_optimizer

    asked = names("--metrics", metrics)
    models = () if model is None else names("--model", model)
    for option, given in (("--model", models), ("--optimizers", settings.optimizers), ("--metrics", asked)):
        if len(set(given)) < len(given):
            raise UserError(f"{option} names one of {', '.join(given)} twice; name each once.")
    check_metric_names(asked)
    for name in settings.optimizers:
        make_optimizer(name, 1e-3)
    _measure(out, runs or [], models, data, pairs("--set", set_ or ()), settings, asked, inputs=inputs)


def _measure(
    out: Path,
    runs: list[Path],
    models: tuple[str, ...],
    data: str | None,
    hyper: dict[str, Any],
    settings: TheorySettings,
    metrics: tuple[str, ...],
    *,
    inputs: bool,
) -> None:
    from mgrad_jax.analysis import theory_run
    from mgrad_jax.analysis.runs import group_runs
    from mgrad_jax.analysis.theory_report import write_inputs, write_theory
    from mgrad_jax.training.config import RunConfig

    if models:
        configs = [RunConfig(name, str(data), seed=settings.seed, hyper_parameters=hyper) for name in models]
        subjects: Iterable[tuple[Any, Subject]] = (
            (config.model, theory_run.fresh_subject(config, settings.epochs)) for config in configs
        )
        n_subjects, groups = len(configs), {}
    else:
        groups = group_runs(runs)
        n_subjects = sum(len(by_seed) for trainings in groups.values() for by_seed in trainings.values())
        subjects = theory_run.run_subjects(groups, data)

    def told() -> Iterator[Subject]:
        with progress("theory") as tell:
            for number, (what, subject) in enumerate(subjects):
                tell(str(what), number, n_subjects)
                yield subject

    own = {"metrics": metrics, "models": models, "data": data}
    made_with = {"settings": {**asdict(settings), **own}, "runs": groups}
    tables: Sequence[Table]
    if inputs:
        inputs_found = [theory_run.examine_inputs(subject, settings, metrics) for subject in told()]
        stopping.complete_what_is_begun()
        tables = write_inputs(out, inputs_found, made_with)
    else:
        found = [theory_run.examine(subject, settings) for subject in told()]
        stopping.complete_what_is_begun()
        tables = write_theory(out, found, settings, made_with)
    print_tables(*tables)
    print(f"Tables, numbers and pictures: {out}")
