"""Options and arguments that several commands declare alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

FinishedRuns = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs, or of a study of `compare`.")
]
NewDirectory = Annotated[Path, typer.Option(help="Directory to write; it must not exist.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, or refused, and write nothing.")]
MovedData = Annotated[str | None, typer.Option(help="Where the runs' data lie now, if they were moved.")]
HyperParameters = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A hyper-parameter of every model that has it, or of one: freedom.dropout=0.9.",
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="N",
        help="Devices to train on: a number, or all; 1 by default, and all where several processes train.",
    ),
]
SharedBy = Annotated[
    str | None,
    typer.Option("--devices", metavar="N", help="Devices that share the run's tables: a number, or all; 1 by default."),
]


def devices_of(option: str | None, by_default: int | Literal["all"] = 1) -> int | Literal["all"]:
    """How many devices `--devices` asks for.

    Raises:
        UserError: it is neither a number nor "all".
    """
    from mgrad_jax.devices import parse_devices

    return by_default if option is None else parse_devices(option)
