"""`mgrad-jax prepare`, `info` and `models`: what there is to train, and on what."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mgrad_jax.cli.console import console
from mgrad_jax.cli.options import takes_settings
from mgrad_jax.errors import UserError
from mgrad_jax.preparation import Preparation

if TYPE_CHECKING:
    from mgrad_jax.data import Interactions
    from mgrad_jax.data.preprocess import Prepared

# What `prepare` reads where it makes the user graph only; the other options are of raw ratings.
_OF_AMR = ("amr", "source", "destination", "name", "seed", "overwrite")
_OF_USER_GRAPH = ("source", "user_graph", "user_k", "published_user_graph")


@takes_settings(how=Preparation)
def prepare(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="Raw ratings: CSV, TSV or JSON lines, plain or .gz; or a dataset, whose split is kept, and which "
            "alone is enough without DESTINATION."
        ),
    ],
    destination: Annotated[
        Path | None, typer.Argument(help="Directory to write; leave it out to make only a dataset's user graph.")
    ] = None,
    *,
    how: Preparation,
    user_graph: Annotated[
        bool,
        typer.Option("--user-graph", help="Build the user graph of dualgnn and dragon and store it in the dataset."),
    ] = False,
    user_k: Annotated[int, typer.Option(min=1, help="Neighbours a user in it (`user_k` of the models).")] = 40,
    published_user_graph: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Store a dataset's user graph from a published user_graph_dict.npy instead."),
    ] = None,
    amr: Annotated[
        bool,
        typer.Option("--amr", help="SOURCE is a directory of AMR's authors: pos.txt, neg.txt, f_resnet.npy."),
    ] = False,
) -> None:
    """Filter, split and re-index raw ratings into a dataset directory; store its user graph."""
    if amr:
        _prepare_amr(context, source, destination, how)
        return
    _check_preparation(context, source, destination, user_graph, published_user_graph)
    if destination is None:
        _store_user_graph(source, user_k, published_user_graph)
        return
    from mgrad_jax.data import preprocess

    prepared = preprocess.prepare(source, destination, how)
    _print_values(str(destination), _told(prepared))
    if user_graph:
        _store_user_graph(prepared.file, user_k)


def _prepare_amr(context: typer.Context, source: Path, destination: Path | None, how: Preparation) -> None:
    """`prepare --amr`: its dataset has ids, a test split and features already."""
    if destination is None:
        raise UserError("DESTINATION is missing; name the directory to write.")
    said = _options_given(context)
    for parameter, option in said.items():
        if parameter not in _OF_AMR:
            raise UserError(f"{option} is for raw ratings, and --amr reads none; leave {option} out.")
    from mgrad_jax.data.amr import prepare_amr

    prepared = prepare_amr(source, destination, name=how.name, seed=how.seed, overwrite=how.overwrite)
    candidates = prepared.file.with_name("candidates.npy")
    _print_values(str(destination), {**_told(prepared), "candidates": candidates})


def _told(prepared: Prepared) -> dict[str, Any]:
    """What was read, what was left out and why, and what was written."""
    values: dict[str, Any] = {f"{role} taken from": column for role, column in prepared.columns.items()}
    values["rows read"] = f"{prepared.rows_read:,}"
    for reason, rows in prepared.left_out.items():
        values[f"left out: rows {reason}"] = f"{rows:,}"
    values["interactions"] = f"{prepared.interactions:,}"
    values |= {"users": f"{prepared.users:,}", "items": f"{prepared.items:,}", "split": prepared.split}
    for modality, items in prepared.without_features.items():
        values[f"items without {modality} features"] = f"{items:,}"
    return {**values, "file": prepared.file}


def _check_preparation(
    context: typer.Context, source: Path, destination: Path | None, user_graph: bool, published: Path | None
) -> None:
    """What is asked for must fit together: raw ratings have a destination, a dataset that exists has none."""
    if destination is None and not user_graph and published is None:
        raise UserError(
            "DESTINATION is missing; name the directory to write, or add --user-graph where SOURCE is a dataset."
        )
    if destination is not None and published is not None:
        raise UserError(
            "--published-user-graph is for a dataset that exists; give its directory and leave DESTINATION out."
        )
    if destination is not None and user_graph and source.is_dir():
        raise UserError(f"{source} is a directory; leave DESTINATION out to store the user graph in it.")
    said = _options_given(context)
    if "user_k" in said and not user_graph and published is None:
        raise UserError("--user-k is of the user graph, which is not asked for; add --user-graph.")
    of_ratings = [option for name, option in said.items() if name not in _OF_USER_GRAPH]
    if destination is None and of_ratings:
        raise UserError(
            f"{of_ratings[0]} is for raw ratings, which need a DESTINATION; name one, or leave {of_ratings[0]} out."
        )


def _options_given(context: typer.Context) -> dict[str, str]:
    """The parameters that stand on the command line: name in the code -> spelling there."""
    given = {}
    for parameter in context.command.params:
        origin = context.get_parameter_source(str(parameter.name))
        # By name: the class of the origins depends on typer's version.
        if origin is not None and origin.name == "COMMANDLINE":
            given[str(parameter.name)] = parameter.opts[0]
    return given


def _store_user_graph(source: Path, k: int, published: Path | None = None) -> None:
    """Store the user graph of a dataset, a directory or its .inter file, where the models look for it."""
    from mgrad_jax.data import load_interactions
    from mgrad_jax.data.dataset_files import writing
    from mgrad_jax.data.user_graph import build_user_graph, cache_directory, read_published_user_graph

    data = load_interactions(source)
    cache = cache_directory(data)
    if cache is None:
        raise UserError(f"{source} is not on disk, so that nothing can be stored with it; give a dataset's directory.")
    if not os.access(cache, os.W_OK):
        raise UserError(f"{cache} cannot be written; copy the dataset to a place where its user graph can be stored.")
    with writing(cache):
        if published is None:
            graph = build_user_graph(data, k, cache=cache)
        else:
            graph = read_published_user_graph(published, data, k, cache=cache)
    counts = (graph.shared > 0).sum(axis=1)
    values = {
        "user graph": f"stored in {cache}",
        "users": data.n_users,
        f"users with {k} neighbours": int((counts == k).sum()),
        "users without neighbours": int((counts == 0).sum()),
    }
    _print_values(f"user graph, user_k={k}", values)


def _print_values(title: str, values: Mapping[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for key, value in values.items():
        table.add_row(key, str(value))
    console().print(table)


def info(data: Annotated[str, typer.Argument(metavar="DATA", help="Directory in MMRec format, or 'demo'.")]) -> None:
    """Show a dataset's statistics, what is noteworthy in it, and which models cannot train on it."""
    from mgrad_jax.data import load_interactions
    from mgrad_jax.data.mmrec import remarks

    interactions = load_interactions(data)
    _print_values(interactions.name, {name: _shown(value) for name, value in interactions.statistics().items()})
    for note in [*remarks(interactions), *_refusals(interactions)]:
        console().print(f"note: {note}", soft_wrap=True)


def _refusals(data: Interactions) -> list[str]:
    """Why models cannot train on a dataset with their default settings, one sentence per model that cannot."""
    from mgrad_jax import models

    found = []
    for name in models.names():
        cls = models.model_class(name)
        sentence = cls.obstacle(data, cls.config_class())
        if sentence is not None:
            sentence = sentence.removeprefix(f"{data.source}: ")
            found.append(sentence if sentence.startswith(name) else f"{name} cannot train: {sentence}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{x:.2f}" for x in value)
    return f"{value:.4%}" if isinstance(value, float) else f"{value:,}"


def list_models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show this model's hyper-parameters alone.")
    ] = None,
) -> None:
    """List the models, what they need, and their hyper-parameters, and what `evaluate` ranks by without training.

    Of one model its hyper-parameters are shown with types, ranges and the published grid.
    """
    if name is not None:
        _show_model(name)
        return

    from mgrad_jax import models
    from mgrad_jax.analysis.baselines import BASELINES

    table = Table("model", "needs", "hyper-parameter", "default", "meaning")
    for name in models.names():
        cls = models.model_class(name)
        heading = (name, cls.needs_in_words())
        for field in dataclasses.fields(cls.config_class):
            table.add_row(*heading, field.name, str(field.default), field.metadata.get("help", ""))
            heading = ("", "")
        table.add_section()
    for name, meaning in BASELINES.items():
        needs = "no training, image or text" if name == "itemknn-features" else "no training"
        table.add_row(name, needs, "", "", f"ranks by {meaning}")
    console().print(table)


def _show_model(name: str) -> None:
    """One model: where it is from, what it needs, and all there is to know of every hyper-parameter."""
    from mgrad_jax import models
    from mgrad_jax.analysis.baselines import BASELINES

    if name in BASELINES:
        console().print(f"{name} ranks by {BASELINES[name]}; it has no hyper-parameters.", soft_wrap=True)
        return
    cls = models.model_class(name)
    grid = {axis: ", ".join(map(str, values)) for axis, values in cls.grid.items()}
    table = Table("hyper-parameter", "type", "default", "range", "traced", "published grid", "meaning")
    for field in dataclasses.fields(cls.config_class):
        hyper = field.metadata
        limit = "" if hyper["limit"] is None else f"<= {hyper['limit']}"
        table.add_row(
            field.name,
            type(field.default).__name__,
            str(field.default),
            ", ".join(part for part in (str(hyper["range"]), limit) if part),
            "yes" if hyper.get("traced") else "no",
            grid.pop(field.name, ""),
            hyper["help"],
        )
    terminal = console()
    terminal.print(f"{name} needs {cls.needs_in_words()}. {cls.paper}.", soft_wrap=True)
    terminal.print(table)
    for axis, values in grid.items():
        terminal.print(f"published grid of {axis}: {values}", soft_wrap=True)
    terminal.print(
        "traced: a sweep trains all values in one compiled program; otherwise one per value.", soft_wrap=True
    )
