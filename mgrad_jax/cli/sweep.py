"""`mgrad-jax sweep`: a grid of settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.console import plus_minus, print_table
from mgrad_jax.cli.options import DevicesOption, DryRun, devices_of, scalar, takes_settings
from mgrad_jax.cli.training import told
from mgrad_jax.errors import UserError
from mgrad_jax.training.settings import Settings

if TYPE_CHECKING:
    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.sweep import SweepReport
    from mgrad_jax.training.sweep_run import SweepConfig, SweepOutcome

_SHOWN = 10


@takes_settings(base=Settings)
def sweep(
    base: RunConfig,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Values of an option or hyper-parameter, e.g. alpha1=0.1,0.5 (repeatable), or 'published': "
            "the grid of the model's published configuration.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per setting, counted upwards from --seed.")] = 1,
    slots: Annotated[
        int | None, typer.Option(help="The most members side by side on a device; 1 on a CPU, 16 else by default.")
    ] = None,
    devices: DevicesOption = None,
    out: Annotated[str | None, typer.Option(help="The sweep's directory; sweeps/<model>-<data> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train a grid of settings as one program and find the best on validation."""
    number = devices_of(devices)
    if not dry_run:
        use_compilation_cache()
    from mgrad_jax.training.sweep_run import SweepConfig

    config = SweepConfig(base, read_grid(base.model, grid or ()), seeds, out)
    if dry_run:
        from mgrad_jax.cli.dry_run import show_sweep
        from mgrad_jax.devices import mesh

        mesh(number)  # refuses more devices than there are
        show_sweep(config, resume, slots)
        return
    _print_outcome(_train(config, resume, slots, number), config)


def read_grid(model: str, arguments: Sequence[str]) -> dict[str, list[Any]]:
    """The lists of values in `--grid` arguments, by name; axes given by name replace those of the published grid."""
    from mgrad_jax.training.grid import published_grid

    axes: dict[str, list[Any]] = {}
    for argument in arguments:
        if argument == "published":
            if arguments.count(argument) > 1:
                raise UserError("--grid published is given twice; leave one of them out.")
            continue
        name, separator, values = (part.strip() for part in argument.partition("="))
        if not separator or not name or not all(value.strip() for value in values.split(",")):
            raise UserError(
                f"--grid {argument} is not of the form name=value,value; write for example --grid alpha1=0.1,0.5."
            )
        name = "training" if name == "method" else name  # as `--method` has it, and as files do
        if name in axes:
            raise UserError(f"--grid {name} is given twice; write all its values in one list.")
        axes[name] = [scalar(value.strip()) for value in values.split(",")]
    published = published_grid(model) if "published" in arguments else {}
    return {**{name: list(values) for name, values in published.items()}, **axes}


def _train(config: SweepConfig, resume: bool, slots: int | None, devices: int | Literal["all"]) -> SweepOutcome:
    """Train and tell how many members are finished."""
    from mgrad_jax.training.sweep_run import train_sweep

    def state(sweep: SweepReport) -> tuple[str, int, int]:
        epochs = ", ".join(map(str, sweep.running[:4])) + (" ..." if len(sweep.running) > 4 else "")
        text = f"{sweep.finished} of {sweep.members} members  group {sweep.group} of {sweep.groups}"
        return text + (f"  epoch {epochs}" if epochs else ""), sweep.finished, sweep.members

    with told(f"{config.base.model} sweep", config.directory, state) as report:
        return train_sweep(config, resume=resume, slots=slots, progress=report, devices=devices)


def _print_outcome(outcome: SweepOutcome, config: SweepConfig) -> None:
    """The best settings, one row each: mean and standard deviation of the selection metric over the seeds."""
    base, metric = config.base, config.base.metric
    training = "" if "training" in config.axes else f", {base.training}"
    headings = [*config.axes, f"valid\n{metric}", f"test\n{metric}", "diverged"]
    rows = [
        [
            *(_cell(row[axis]) for axis in config.axes),
            *(_mean(row[f"{split}_{metric}_mean"], row[f"{split}_{metric}_std"]) for split in ("valid", "test")),
            str(row["diverged"]) if row["diverged"] else "",
        ]
        for _, row in outcome.summary.head(_SHOWN).iterrows()
    ]
    notes = [f"selected by validation {metric}", str(config.directory)]
    more = len(outcome.summary) - _SHOWN
    if more > 0:
        notes.insert(0, f"{more} more settings in summary.csv")
    title = f"{base.model} on {base.data}{training}, seed {', '.join(map(str, config.seeds))}"
    print_table(title, headings, rows, notes)


def _cell(value: Any) -> str:
    if value is None or value != value:  # an axis without effect on the setting
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean(mean: float, std: float) -> str:
    if mean != mean:
        return "-"
    return f"{mean:.4f}" if std != std else f"{mean:.4f} {plus_minus()} {std:.4f}"
