"""`mgrad-jax prepare`, `info` and `models`: what there is to train, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mgrad_jax.cli.console import console

_Features = Annotated[
    tuple[Path, Path] | None,
    typer.Option(metavar="NPY IDS", help="Features (rows, dim), and a text file with the raw item id of each row."),
]


def prepare(
    source: Annotated[Path, typer.Argument(help="Raw ratings: CSV, TSV or JSON lines, plain or .gz.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    name: Annotated[str | None, typer.Option(help="Of the dataset; the directory's name by default.")] = None,
    user: Annotated[str | None, typer.Option(help="Column of the users; found by common names by default.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of the items.")] = None,
    rating: Annotated[str | None, typer.Option(help="Column of the ratings.")] = None,
    min_rating: Annotated[float | None, typer.Option(help="Leave lower ratings out.")] = None,
    k_core: Annotated[int, typer.Option(help="Fewest interactions of every user and item.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the shuffle before the split.")] = 999,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether a table has a header line; told by its looks.")
    ] = None,
    image_features: _Features = None,
    text_features: _Features = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")] = False,
) -> None:
    """Filter, split and re-index raw ratings into a dataset directory."""
    from mgrad_jax.data import preprocess

    given = {"image": image_features, "text": text_features}
    prepared = preprocess.prepare(
        source,
        destination,
        name=name,
        user=user,
        item=item,
        rating=rating,
        min_rating=min_rating,
        k_core=k_core,
        seed=seed,
        header=header,
        features={modality: files for modality, files in given.items() if files is not None},
        overwrite=overwrite,
    )
    table = Table(title=str(destination), show_header=False)
    for key, value in vars(prepared).items():
        table.add_row(key, str(value))
    console().print(table)


def info(data: Annotated[str, typer.Argument(metavar="DATA", help="Directory in MMRec format, or 'demo'.")]) -> None:
    """Show a dataset's statistics and what is noteworthy in it."""
    from mgrad_jax.data import load_interactions, problems

    interactions = load_interactions(data)
    table = Table(title=interactions.name, show_header=False)
    for name, value in interactions.statistics().items():
        table.add_row(name, _shown(value))
    terminal = console()
    terminal.print(table)
    for note in problems(data):
        terminal.print(f"note: {note}", markup=False, highlight=False)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{x:.2f}" for x in value)
    return f"{value:.4%}" if isinstance(value, float) else f"{value:,}"


def list_models() -> None:
    """List the models, what they need, and their hyper-parameters."""
    import dataclasses

    from mgrad_jax import models

    table = Table("model", "needs", "hyper-parameter", "default", "meaning")
    for name in models.names():
        cls = models.model_class(name)
        heading = (name, ", ".join(cls.needs) or "no features")
        for field in dataclasses.fields(cls.config_class):
            table.add_row(*heading, field.name, str(field.default), field.metadata.get("help", ""))
            heading = ("", "")
        table.add_section()
    console().print(table)
