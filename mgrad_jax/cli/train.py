"""`mgrad-jax train`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgrad_jax.cli.console import Stopped, print_metrics, progress_bar, terminable, use_compilation_cache
from mgrad_jax.cli.options import TrainingOptions, takes_training_options

if TYPE_CHECKING:
    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.fit import EpochReport


@takes_training_options
def train(
    options: TrainingOptions,
    out: Annotated[
        str | None, typer.Option(help="The run's directory; runs/<model>-<data>-<training>-s<seed> by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train a model to its best validation epoch."""
    use_compilation_cache()
    config = options.config(out)
    result = _train(config, resume)
    _print_result(result, config.directory)


def _train(config: RunConfig, resume: bool) -> dict[str, Any]:
    """Train with a progress bar; a signal to stop leaves every finished epoch on disk."""
    from mgrad_jax.training.run import RunInterrupted, train_run

    try:
        with terminable(), _progress(config) as progress:
            return train_run(config, resume=resume, progress=progress)
    except RunInterrupted as stop:
        done = f"after epoch {stop.epoch}" if stop.epoch else "before the first epoch was finished"
        raise Stopped(f"stopped {done}; to go on, repeat the command with --out {stop.directory} --resume.") from None


@contextlib.contextmanager
def _progress(config: RunConfig) -> Iterator[Any]:
    """A bar over the epochs still to come if nothing improves any more; yields what to call after every epoch."""
    with progress_bar() as bar:
        task = bar.add_task(f"{config.model} ({config.training})", total=None, state="loading and compiling")

        def show(report: EpochReport) -> None:
            total = min(config.epochs, report.best_epoch + config.patience + 1)
            state = (
                f"epoch {report.epoch}  loss {report.loss:.4g}  valid {config.metric} {report.valid[config.metric]:.4f}"
                f"  best {report.best_epoch}"
            )
            bar.update(task, total=max(total, report.epoch), completed=report.epoch, state=state)

        yield show


def _print_result(result: dict[str, Any], directory: Path) -> None:
    seconds = result["seconds"]
    data = result["data"]
    title = f"{result['model']} on {data['name']}, {result['training']}, seed {result['seed']}"
    times = "  ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    caption = f"best epoch {result['best_epoch']} of {result['epochs_run']}   {times}   {directory}"
    print_metrics(title, caption, result["valid"], result["test"])
