"""`mgrad-jax sweep`: a grid of settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mgrad_jax.cli.console import Stopped, console, progress_bar, terminable, use_compilation_cache
from mgrad_jax.cli.options import TrainingOptions, scalar, takes_training_options
from mgrad_jax.errors import UserError

if TYPE_CHECKING:
    from mgrad_jax.training.sweep import SweepReport
    from mgrad_jax.training.sweep_run import SweepConfig, SweepOutcome

_SHOWN = 10


@takes_training_options
def sweep(
    options: TrainingOptions,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Values of an option or hyper-parameter, e.g. alpha1=0.1,0.5 (repeatable), or 'published': "
            "the grid of the model's published configuration.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds a setting, counted upwards from --seed.")] = 1,
    slots: Annotated[
        int | None, typer.Option(help="The most members side by side in one program; 1 on a CPU, 16 else by default.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The sweep's directory; sweeps/<model>-<data> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out.")] = False,
) -> None:
    """Train a grid of settings as one program and find the best on validation."""
    use_compilation_cache()
    from mgrad_jax.training.sweep_run import SweepConfig

    config = SweepConfig(options.config(None), read_grid(options.model, grid or ()), seeds, out)
    _print_outcome(_train(config, resume, slots), config)


def read_grid(model: str, arguments: Sequence[str]) -> dict[str, list[Any]]:
    """The lists of values in `--grid` arguments, by name; axes given by name replace those of the published grid."""
    from mgrad_jax.training.grid import published_grid

    axes: dict[str, list[Any]] = {}
    for argument in arguments:
        if argument == "published":
            continue
        name, separator, values = (part.strip() for part in argument.partition("="))
        if not separator or not name or not all(value.strip() for value in values.split(",")):
            raise UserError(
                f"--grid {argument} is not of the form name=value,value; write for example --grid alpha1=0.1,0.5."
            )
        if name in axes:
            raise UserError(f"--grid {name} is given twice; write all its values in one list.")
        axes[name] = [scalar(value.strip()) for value in values.split(",")]
    published = published_grid(model) if "published" in arguments else {}
    return {**{name: list(values) for name, values in published.items()}, **axes}


def _train(config: SweepConfig, resume: bool, slots: int | None) -> SweepOutcome:
    """Train with a progress bar; a signal to stop leaves every finished member on disk."""
    from mgrad_jax.training.sweep_run import SweepInterrupted, train_sweep

    try:
        with terminable(), _progress(config) as progress:
            return train_sweep(config, resume=resume, slots=slots, progress=progress)
    except SweepInterrupted as stop:
        raise Stopped(
            f"stopped with {stop.finished} of {stop.members} members finished; to go on, repeat the command with "
            f"--out {stop.directory} --resume."
        ) from None


@contextlib.contextmanager
def _progress(config: SweepConfig) -> Iterator[Any]:
    """A bar over the members; yields what to call after every epoch."""
    with progress_bar() as bar:
        task = bar.add_task(f"{config.base.model} sweep", total=None, state="loading and compiling")

        def show(report: SweepReport) -> None:
            epochs = ", ".join(map(str, report.running[:4])) + (" ..." if len(report.running) > 4 else "")
            state = f"{report.finished} of {report.members} members  group {report.group} of {report.groups}"
            state += f"  epoch {epochs}" if epochs else ""
            bar.update(task, total=report.members, completed=report.finished, state=state)

        yield show


def _print_outcome(outcome: SweepOutcome, config: SweepConfig) -> None:
    """The best settings, one row each: mean and standard deviation of the selection metric over the seeds."""
    base, metric = config.base, config.base.metric
    more = len(outcome.summary) - _SHOWN
    training = "" if "training" in config.axes else f", {base.training}"
    table = Table(
        title=f"{base.model} on {base.data}{training}, seed {', '.join(map(str, config.seeds))}",
        caption=f"selected by validation {metric}   {config.directory}"
        + (f"   {more} more settings" if more > 0 else ""),
    )
    for axis in config.axes:
        table.add_column(axis, justify="right")
    table.add_column(f"valid\n{metric}", justify="right")
    table.add_column(f"test\n{metric}", justify="right")
    table.add_column("diverged", justify="right")
    for _, row in outcome.summary.head(_SHOWN).iterrows():
        cells = [_cell(row[axis]) for axis in config.axes]
        cells += [_mean(row[f"{split}_{metric}_mean"], row[f"{split}_{metric}_std"]) for split in ("valid", "test")]
        table.add_row(*cells, str(row["diverged"]) if row["diverged"] else "")
    console().print(table)


def _cell(value: Any) -> str:
    if value is None or value != value:  # an axis without effect on the setting
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean(mean: float, std: float) -> str:
    if mean != mean:
        return "-"
    return f"{mean:.4f}" if std != std else f"{mean:.4f} ± {std:.4f}"
