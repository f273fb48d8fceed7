"""`mgrad-jax`: train, evaluate, recommend, prepare, info, models. Each command is a thin call into the library."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mgrad_jax.errors import UserError

if TYPE_CHECKING:
    from mgrad_jax.training.fit import EpochReport

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mirror Gradient for JAX: train multimodal recommenders with and without it.",
)
console = Console()
_DATA = "a directory in MMRec format (<name>.inter, image_feat.npy, text_feat.npy), or 'demo'"


def main() -> None:
    """Entry point: a user's mistake is one sentence on standard error and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except typer.TyperException as error:
        _fail(_usage_sentence(error))
    except (KeyboardInterrupt, typer.Abort):
        _stop("stopped; the epochs finished so far are kept, go on with the same command and --resume.", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str) -> None:
    _stop(sentence, 2)


def _stop(sentence: str, code: int) -> None:
    print(f"mgrad-jax: {sentence}", file=sys.stderr)
    sys.exit(code)


def _usage_sentence(error: typer.TyperException) -> str:
    """What is wrong with the command line, with the valid options where one is unknown."""
    sentence = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
    context = getattr(error, "ctx", None)
    if hasattr(error, "option_name") and context is not None:
        options = sorted({o for p in context.command.params for o in p.opts if o.startswith("--")})
        return f"{sentence}; the options are {', '.join(options)}."
    return f"{sentence}."


def _enable_cache() -> None:
    """Keep compiled programs between runs, unless MGRAD_JAX_NO_CACHE is set or the folder cannot be written."""
    if os.environ.get("MGRAD_JAX_NO_CACHE"):
        return
    import jax

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgrad_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _parse_assignments(assignments: list[str], option: str) -> dict[str, Any]:
    """`key=value` pairs, values as YAML scalars: 0.8, 1e-3, true, cosine."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {assignment} is not of the form key=value, e.g. {option} dropout=0.8.")
        value = yaml.safe_load(text)
        try:
            values[key.strip()] = float(value) if isinstance(value, str) else value  # YAML reads 1e-3 as text
        except ValueError:
            values[key.strip()] = value
    return values


@app.command()
def train(
    model: Annotated[str, typer.Option(help="name of the model, see `mgrad-jax models`")],
    data: Annotated[str, typer.Option(help=_DATA)],
    mirror: Annotated[
        bool, typer.Option("--mirror/--no-mirror", help="Mirror Gradient, or the plain optimizer")
    ] = True,
    replay: Annotated[bool, typer.Option("--replay", help="the equal-update control: second passes with +1")] = False,
    alpha1: Annotated[float, typer.Option(help="factor of the first pass over a mirror batch")] = 1.0,
    alpha2: Annotated[float, typer.Option(help="factor of the second pass, against the gradient")] = 0.2,
    interval: Annotated[int, typer.Option(help="one batch in how many is mirrored; the paper's beta")] = 3,
    optimizer: Annotated[
        str, typer.Option(help="adam, sgd, rmsprop, adagrad (with PyTorch's defaults), adamw, lion, muon ...")
    ] = "adam",
    optimizer_arg: Annotated[list[str], typer.Option(help="key=value for the optimizer, repeatable")] = [],  # noqa: B006
    learning_rate: Annotated[float, typer.Option(help="of the optimizer")] = 1e-3,
    learning_rate_decay: Annotated[
        tuple[float, float], typer.Option(help="g s: the rate of epoch e is multiplied by g ** (e / s)")
    ] = (1.0, 50.0),
    weight_decay: Annotated[float, typer.Option(help="L2, added to the gradient")] = 0.0,
    max_norm: Annotated[float | None, typer.Option(help="clip the gradient before a batch's last update")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 999,
    epochs: Annotated[int, typer.Option(help="the most epochs")] = 1000,
    patience: Annotated[int, typer.Option(help="stop after more than this many epochs without improvement")] = 20,
    batch_size: Annotated[int, typer.Option(help="interactions a batch")] = 2048,
    stale_evaluation: Annotated[
        bool,
        typer.Option("--stale-evaluation", help="score before the epoch's last update, as some published models do"),
    ] = False,
    set_: Annotated[
        list[str], typer.Option("--set", help="key=value, a hyper-parameter of the model; repeatable")
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="run directory; default runs/<model>-<data>-<training>-s<seed>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run directory's latest checkpoint")] = False,
) -> None:
    """Train a model to its best validation epoch and keep everything in a run directory."""
    _enable_cache()
    from mgrad_jax.training.run import RunConfig, train_run

    training = "replay" if replay else "mirror" if mirror else "plain"
    config = RunConfig(
        model=model,
        data=data,
        training=training,
        alpha1=alpha1,
        alpha2=alpha2,
        interval=interval,
        optimizer=optimizer,
        optimizer_args=_parse_assignments(optimizer_arg, "--optimizer-arg"),
        learning_rate=learning_rate,
        decay_factor=learning_rate_decay[0],
        decay_epochs=learning_rate_decay[1],
        weight_decay=weight_decay,
        max_norm=max_norm,
        seed=seed,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        evaluate="stale" if stale_evaluation else "fresh",
        hyper_parameters=_parse_assignments(set_, "--set"),
    )
    directory = out or Path("runs") / f"{model}-{Path(data).name}-{training}-s{seed}"
    with _progress(epochs) as (_, on_epoch):
        result = train_run(config, directory, resume=resume, on_epoch=on_epoch)
    console.print(_result_table(result))
    console.print(f"run directory: {directory}")


class _progress:  # noqa: N801
    """A progress bar over epochs with the loss, the best metric and the time left."""

    def __init__(self, epochs: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(TextColumn("epoch"), *columns, console=console, transient=True)
        self.epochs = epochs

    def __enter__(self) -> tuple[Progress, Callable[[EpochReport], None]]:
        self.bar.start()
        task = self.bar.add_task("compiling", total=self.epochs)

        def on_epoch(report: EpochReport) -> None:
            text = (
                f"loss {report.loss:.4f}  valid Recall@5 {report.valid['recall@5']:.4f}  best epoch {report.best_epoch}"
            )
            self.bar.update(task, completed=report.epoch, description=text)

        return self.bar, on_epoch

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _result_table(result: dict[str, Any]) -> Table:
    title = f"{result['model']} on {result['data']['name']}, {result.get('training', '')}, best epoch {result['best_epoch']}"
    title += f" of {result['epochs_run']}"
    return _metric_table(title, {split: result[split] for split in ("valid", "test")}, result.get("seconds"))


def _metric_table(title: str, splits: dict[str, dict[str, float]], seconds: dict[str, float] | None = None) -> Table:
    table = Table(title=title)
    table.add_column("metric")
    for split in splits:
        table.add_column(split, justify="right")
    for name in next(iter(splits.values())):
        table.add_row(name, *(f"{metrics[name]:.4f}" for metrics in splits.values()))
    if seconds:
        table.caption = "seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return table


@app.command()
def evaluate(run: Annotated[Path, typer.Argument(help="a run directory")]) -> None:
    """Evaluate a run's best parameters on validation and test."""
    _enable_cache()
    from mgrad_jax.evaluation.ranking import make_ranker, rank_metrics
    from mgrad_jax.training.run import load_run

    config, data, model = load_run(run)
    users, items = model.embed()
    splits = {
        split: {name: float(x) for name, x in rank_metrics(make_ranker(data, split), users, items).items()}
        for split in ("valid", "test")
    }
    console.print(_metric_table(f"{config.model} on {data.name}, {config.training}", splits))


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    output: Annotated[Path, typer.Option(help="file to write: .csv or .parquet")],
    top_k: Annotated[int, typer.Option(help="items a user")] = 20,
    users: Annotated[Path | None, typer.Option(help="text file with one user id a line; default all users")] = None,
) -> None:
    """Write each user's best new items: columns user, rank, item, score."""
    _enable_cache()
    from mgrad_jax.recommend import write_recommendations

    rows = write_recommendations(run, output, top_k=top_k, users_file=users)
    console.print(f"{rows} rows written to {output}")


@app.command()
def info(data: Annotated[str, typer.Argument(help=_DATA)]) -> None:
    """Show a dataset's statistics and its problems."""
    from mgrad_jax.data import load_interactions, problems

    found = load_interactions(data)
    table = Table(title=found.name, show_header=False)
    for name, value in found.statistics().items():
        table.add_row(name, _show(value))
    console.print(table)
    for problem in problems(data):
        console.print(f"- {problem}")


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_show(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


@app.command()
def models() -> None:
    """List the models, what they need, and their hyper-parameters."""
    import dataclasses

    from mgrad_jax import models as registry

    for name in registry.names():
        model = registry.model_class(name)
        table = Table(title=f"{name}: {model.paper}", title_justify="left", show_header=True)
        for column in ("hyper-parameter", "default", "meaning"):
            table.add_column(column)
        for field in dataclasses.fields(model.config_class):
            table.add_row(field.name, str(field.default), field.metadata.get("help", ""))
        table.caption = f"features: {' and '.join(model.needs) or 'none'}"
        console.print(table)


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="raw ratings: CSV, TSV or JSON lines, plain or .gz")],
    destination: Annotated[Path, typer.Argument(help="directory to write in MMRec format")],
    name: Annotated[str | None, typer.Option(help="of the dataset; default the directory's")] = None,
    user: Annotated[str | None, typer.Option(help="column of user identifiers; default: found by name")] = None,
    item: Annotated[str | None, typer.Option(help="column of item identifiers; default: found by name")] = None,
    rating: Annotated[str | None, typer.Option(help="column of ratings, needed for --min-rating only")] = None,
    min_rating: Annotated[float | None, typer.Option(help="leave lower ratings out")] = None,
    k_core: Annotated[int, typer.Option(help="fewest interactions of every user and item that stay")] = 5,
    seed: Annotated[int, typer.Option(help="of the per-user split")] = 999,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what the directory holds")] = False,
) -> None:
    """Make a dataset from raw ratings: k-core filter, per-user 8:1:1 split, new ids."""
    from mgrad_jax.data import prepare as prepare_dataset

    done = prepare_dataset(
        source,
        destination,
        name=name,
        user=user,
        item=item,
        rating=rating,
        min_rating=min_rating,
        k_core=k_core,
        seed=seed,
        overwrite=overwrite,
    )
    console.print(f"{done.users:,} users, {done.items:,} items, {done.interactions:,} interactions in {destination}")
