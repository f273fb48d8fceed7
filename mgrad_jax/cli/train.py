"""`mgrad-jax train`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mgrad_jax.cli import stopping
from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.common import DevicesOption
from mgrad_jax.cli.console import print_metrics, progress
from mgrad_jax.cli.distributed import Crew, joined
from mgrad_jax.cli.options import takes_settings
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
    devices: DevicesOption = "1",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, or refused, and write nothing.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what --devices would hold and send, by compiling only.")
    ] = False,
) -> None:
    """Train a model to its best validation epoch."""
    from mgrad_jax.devices import parse_devices

    del config  # its settings have become options (`mgrad_jax.cli.arguments`)
    if plan:
        from mgrad_jax.cli.plan import show_plan

        show_plan(run, parse_devices(devices))
        return
    if dry_run:
        from mgrad_jax.cli.dry_run import show_run

        show_run(run, resume)
        return
    number = parse_devices(devices)
    use_compilation_cache()
    with joined(crew) as is_first:
        everywhere = "all" if crew.is_asked_for() and number == 1 else number
        result = train_and_tell(run, resume=resume, devices=everywhere)
        if is_first:
            _print_result(result, run.directory)


def train_and_tell(
    config: RunConfig,
    *,
    resume: bool,
    devices: int | Literal["all"] = 1,
    go_on: Callable[[], str] | None = None,
) -> dict[str, Any]:
    """Train and tell how far it is; a signal to stop leaves every finished epoch on disk.

    Args:
        config, resume, devices: see `mgrad_jax.training.run.train_run`.
        go_on: the sentence to show when it is stopped; by default how to resume with the same command.
    """
    from mgrad_jax.training.run import RunInterrupted, train_run

    early = "stopped before the first epoch was finished"
    stopping.say(go_on or (lambda: how_to_go_on(early, config.directory)))
    try:
        with _progress(config) as report:
            return train_run(config, resume=resume, progress=report, devices=devices)
    except RunInterrupted as stop:
        done = f"stopped after epoch {stop.epoch}" if stop.epoch else early
        raise stopping.Stopped(go_on() if go_on else how_to_go_on(done, stop.directory)) from None


def how_to_go_on(done: str, directory: Path, begun: str = "config.yaml") -> str:
    """The sentence of a training that was stopped: `done`, and how to go on with what its directory holds.

    Args:
        done, directory: how far it came, and where.
        begun: the file that is there once it can be resumed.
    """
    if not (directory / begun).exists():
        return f"{done}; repeat the command to begin again."
    return f"{done}; to go on, repeat the command with --out {shlex.quote(str(directory))} --resume."


@contextlib.contextmanager
def _progress(config: RunConfig) -> Iterator[Any]:
    """Tell how far the run is, of the epochs still to come if nothing improves any more; yields what to call."""
    from mgrad_jax.processes import is_first

    quiet = contextlib.nullcontext(lambda *_: None)
    with progress(f"{config.model} ({config.training})") if is_first() else quiet as tell:

        def report(epoch: EpochReport) -> None:
            stopping.complete_what_is_begun()
            total = min(config.epochs, epoch.best_epoch + config.patience + 1)
            state = (
                f"epoch {epoch.epoch}  loss {epoch.loss:.4g}  valid {config.metric} {epoch.valid[config.metric]:.4f}"
                f"  best {epoch.best_epoch}"
            )
            tell(state, epoch.epoch, max(total, epoch.epoch))
            stopping.repeat_if_lost()

        yield report


def _print_result(result: dict[str, Any], directory: Path) -> None:
    seconds = result["seconds"]
    data = result["data"]
    title = f"{result['model']} on {data['name']}, {result['training']}, seed {result['seed']}"
    times = "  ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    notes = [f"best epoch {result['best_epoch']} of {result['epochs_run']}   {times}", str(directory)]
    print_metrics(title, notes, result["valid"], result["test"])
