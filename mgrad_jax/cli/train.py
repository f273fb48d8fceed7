"""`mgrad-jax train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.console import print_metrics
from mgrad_jax.cli.distributed import Crew, joined
from mgrad_jax.cli.options import DevicesOption, DryRun, devices_of, takes_settings
from mgrad_jax.cli.training import told
from mgrad_jax.training.settings import RunSettings

if TYPE_CHECKING:
    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.fit import EpochReport


@takes_settings(run=RunSettings, crew=Crew)
def train(
    run: RunConfig,
    crew: Crew,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Take the settings of a run's config.yaml; options override them."),
    ] = None,
    devices: DevicesOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: DryRun = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what --devices would hold and send, by compiling only.")
    ] = False,
) -> None:
    """Train a model to its best validation epoch."""
    del config  # its settings have become options (`mgrad_jax.cli.arguments`)
    if plan:
        from mgrad_jax.cli.plan import show_plan

        show_plan(run, devices_of(devices))
        return
    if dry_run:
        from mgrad_jax.cli.dry_run import show_run

        show_run(run, resume)
        return
    number = devices_of(devices, "all" if crew.is_asked_for() else 1)
    use_compilation_cache()
    with joined(crew) as is_first:
        result = train_and_tell(run, resume=resume, devices=number)
        if is_first:
            _print_result(result, run.directory)


def train_and_tell(
    config: RunConfig, *, resume: bool, devices: int | Literal["all"] = 1, go_on: str | None = None
) -> dict[str, Any]:
    """Train, and tell how far it is, of the epochs still to come if nothing improves any more; `go_on` as in `told`."""
    from mgrad_jax.training.run import train_run

    def state(epoch: EpochReport) -> tuple[str, int, int]:
        total = min(config.epochs, epoch.best_epoch + config.patience + 1)
        valid = f"valid {config.metric} {epoch.valid[config.metric]:.4f}  best {epoch.best_epoch}"
        return f"epoch {epoch.epoch}  loss {epoch.loss:.4g}  {valid}", epoch.epoch, max(total, epoch.epoch)

    with told(f"{config.model} ({config.training})", config.directory, state, go_on=go_on) as report:
        return train_run(config, resume=resume, progress=report, devices=devices)


def _print_result(result: dict[str, Any], directory: Path) -> None:
    title = f"{result['model']} on {result['data']['name']}, {result['training']}, seed {result['seed']}"
    times = "  ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    notes = [f"best epoch {result['best_epoch']} of {result['epochs_run']}   {times}", str(directory)]
    print_metrics(title, notes, result["valid"], result["test"])
