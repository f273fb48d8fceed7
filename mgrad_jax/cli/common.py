"""Options and arguments that several commands declare alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FinishedRuns = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs, or of a study of `compare`.")
]
NewDirectory = Annotated[Path, typer.Option(help="Directory to write; it must not exist.")]
MovedData = Annotated[str | None, typer.Option(help="Where the runs' data lie now, if they were moved.")]
HyperParameters = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A hyper-parameter of every model that has it, or of one: freedom.dropout=0.9.",
    ),
]
DevicesOption = Annotated[str, typer.Option("--devices", metavar="N", help="Devices to train on: a number, or all.")]
