"""`mgrad-jax`: train, evaluate and recommend from the command line; each command a thin call into the library.

Every mistake gives one sentence on stderr and exit code 2. JAX is imported by the commands that need it, not here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mgrad_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from mgrad_jax.training.fit import EpochReport
    from mgrad_jax.training.run import RunConfig

app = typer.Typer(
    name="mgrad-jax",
    help="Train multimodal recommenders in JAX with Mirror Gradient, and use them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


class _Stopped(Exception):
    """Ctrl-C or a termination signal, with the sentence to show."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input, 130 when stopped.

    Args:
        arguments: without the program's name; `sys.argv` by default.
    """
    warnings.showwarning = _show_warning
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except UserError as error:
        return _fail(str(error), 2)
    except _Stopped as stop:
        return _fail(str(stop), 130)
    except (KeyboardInterrupt, EOFError):
        return _fail("stopped.", 130)
    except Exception as error:  # usage errors; their class depends on typer's version
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error)
            return 2
        if type(error).__name__ == "Abort":
            return _fail("stopped.", 130)
        if not hasattr(error, "format_message"):
            raise
        return _fail(_usage_sentence(error), 2)
    return code if isinstance(code, int) else 0


def _fail(sentence: str, code: int) -> int:
    print(" ".join(sentence.split()), file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    # Notes of libraries on their own internals are no business of the user's.
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)


def _usage_sentence(error: Any) -> str:
    """A usage error as one sentence that lists what would have been valid."""
    context = getattr(error, "ctx", None)
    sentence = " ".join(error.format_message().split()).rstrip(".")
    if context is None:
        return f"{sentence}."
    if type(error).__name__ == "NoSuchOption":
        options = sorted(o for p in context.command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--"))
        return f"{context.command_path} has no option '{error.option_name}'; choose among {', '.join(options)}, --help."
    if sentence.startswith("No such command"):
        return f"{sentence}; choose one of {', '.join(context.command.list_commands(context))}."
    return f"{context.command_path}: {sentence[0].lower()}{sentence[1:]}; see {context.command_path} --help."


def _pairs(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a dictionary, the values read as numbers, booleans or text."""
    values = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise UserError(f"{option} {pair} is not of the form key=value; write for example {option} dropout=0.8.")
        values[key.strip()] = _scalar(text.strip())
    return values


def _scalar(text: str) -> Any:
    """A YAML scalar; also 1e-3, which YAML itself reads as text."""
    import yaml

    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, str)) else text


def _use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that a second run starts at once."""
    if os.environ.get("MGRAD_JAX_NO_CACHE", "") not in ("", "0"):
        return
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "mgrad_jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # The many small programs that build a model take longer to compile than the epoch.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@app.command()
def train(
    model: Annotated[str, typer.Option(help="A model's name; `mgrad-jax models` lists them.")],
    data: Annotated[str, typer.Option(help="Directory in MMRec format, or 'demo'.")],
    mirror: Annotated[
        bool | None, typer.Option("--mirror/--no-mirror", help="Mirror Gradient (the default), or the plain optimizer.")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="The control with as many updates: mirror batches are repeated with +1.")
    ] = False,
    alpha1: Annotated[float, typer.Option(help="Factor of the first pass over a mirror batch.")] = 1.0,
    alpha2: Annotated[float, typer.Option(help="Factor of the second pass, taken with the minus sign.")] = 0.2,
    interval: Annotated[int, typer.Option(help="One batch in how many is a mirror batch (beta).")] = 3,
    optimizer: Annotated[str, typer.Option(help="adam, sgd, rmsprop, adagrad, adamw, lion, muon ...")] = "adam",
    learning_rate: Annotated[float, typer.Option(help="Step size.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Coupled for adam, sgd, rmsprop and adagrad.")] = 0.0,
    optimizer_set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the optimizer; repeatable.")
    ] = None,
    learning_rate_decay: Annotated[
        tuple[float, float], typer.Option(metavar="G S", help="Epoch e trains at learning rate * G ** (e / S).")
    ] = (1.0, 50.0),
    max_norm: Annotated[float | None, typer.Option(help="Clip gradients by this global norm.")] = None,
    seed: Annotated[int, typer.Option(help="Of parameters, order, negatives and dropout.")] = 999,
    epochs: Annotated[int, typer.Option(help="The most epochs to train.")] = 1000,
    patience: Annotated[int, typer.Option(help="Epochs without improvement that are tolerated.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Interactions a batch.")] = 2048,
    metric: Annotated[str, typer.Option(help="What selects the best epoch, on validation.")] = "recall@5",
    evaluate: Annotated[
        str, typer.Option(help="'fresh' parameters, or 'stale' ones from before an epoch's last update.")
    ] = "fresh",
    hyper: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter of the model; repeatable."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="The run's directory [runs/<model>-<data>-<training>-s<seed>].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train a model to its best validation epoch."""
    if replay and mirror:
        raise UserError("--mirror and --replay exclude each other; leave one of them out.")
    _use_compilation_cache()
    from mgrad_jax.training.run import RunConfig

    config = RunConfig(
        model=model,
        data=data,
        training="replay" if replay else "plain" if mirror is False else "mirror",
        alpha1=alpha1,
        alpha2=alpha2,
        interval=interval,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        optimizer_args=_pairs("--optimizer-set", optimizer_set or ()),
        learning_rate_decay=learning_rate_decay,
        max_norm=max_norm,
        seed=seed,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        metric=metric,
        evaluate=evaluate,
        hyper_parameters=_pairs("--set", hyper or ()),
        out=out,
    )
    result = _train(config, resume)
    _print_result(result, config.directory)


def _train(config: RunConfig, resume: bool) -> dict[str, Any]:
    """Train with a progress bar; a signal to stop leaves every finished epoch on disk."""
    from mgrad_jax.training.run import RunInterrupted, train_run

    try:
        with _terminable(), _progress_bar(config) as progress:
            return train_run(config, resume=resume, progress=progress)
    except RunInterrupted as stop:
        done = f"after epoch {stop.epoch}" if stop.epoch else "before the first epoch was finished"
        raise _Stopped(f"stopped {done}; to go on, repeat the command with --out {stop.directory} --resume.") from None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat `kill` like Ctrl-C, so that the epoch's checkpoint is completed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread only
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress_bar(config: RunConfig) -> Iterator[Any]:
    """A bar over the epochs still to come if nothing improves any more; yields what to call after every epoch."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
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
    _print_metrics(title, caption, result["valid"], result["test"])


def _print_metrics(title: str, caption: str, valid: dict[str, float], test: dict[str, float]) -> None:
    """A table of metrics, one row a cut-off, validation and test side by side."""
    from mgrad_jax.evaluation.metrics import METRICS

    names = [name for name in METRICS if any(key.startswith(f"{name}@") for key in test)]
    ks = sorted({int(key.partition("@")[2]) for key in test})
    table = Table(title=title, caption=caption)
    table.add_column("@k", justify="right")
    for split in ("valid", "test"):
        for name in names:
            table.add_column(f"{split}\n{name}", justify="right")
    for k in ks:
        cells = [f"{split[f'{name}@{k}']:.4f}" for split in (valid, test) for name in names]
        table.add_row(str(k), *cells)
    _console().print(table)


def _console() -> Console:
    """Stdout; where it is no terminal, wide enough that no table is folded."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
_RunData = Annotated[str | None, typer.Option(help="Where the run's data lie now, if they were moved.")]


@app.command()
def evaluate(
    run: _Run,
    data: _RunData = None,
    per_user: Annotated[
        Path | None, typer.Option(help="Also write each user's test metrics to this .csv or .parquet file.")
    ] = None,
) -> None:
    """Evaluate a run's best parameters on validation and test."""
    import jax

    from mgrad_jax.evaluation.ranking import make_ranker, per_user_metrics
    from mgrad_jax.training.run import load_run

    if per_user is not None:
        _check_table_name(per_user)
    started = time.perf_counter()
    loaded = load_run(run, data)
    vectors = jax.jit(lambda model: model.embed())(loaded.model)
    splits: tuple[Literal["valid", "test"], ...] = ("valid", "test")
    values = {
        split: per_user_metrics(make_ranker(loaded.data, split, loaded.config.ks), vectors[0], vectors[1])
        for split in splits
    }
    means = {split: {k: float(v.mean()) for k, v in metrics.items()} for split, (_, metrics) in values.items()}
    caption = f"best epoch {loaded.epoch}   {time.perf_counter() - started:.1f} s   {run}"
    _print_metrics(f"{loaded.config.model} on {loaded.data.name}", caption, means["valid"], means["test"])
    if per_user is not None:
        import pandas as pd

        users, metrics = values["test"]
        _write_table(pd.DataFrame({"user": users, **metrics}), per_user)


@app.command()
def recommend(
    run: _Run,
    output: Annotated[Path, typer.Option(help="File to write, .csv or .parquet: user, rank, item, score.")],
    top_k: Annotated[int, typer.Option(help="Items a user.")] = 20,
    users: Annotated[Path | None, typer.Option(help="File with one user id a line; all users by default.")] = None,
    data: _RunData = None,
) -> None:
    """Write the best new items of users, their training items left out."""
    import jax
    import numpy as np
    import pandas as pd

    from mgrad_jax.evaluation.ranking import top_items
    from mgrad_jax.training.run import load_run

    _check_table_name(output)
    if top_k < 1:
        raise UserError(f"--top-k is {top_k}; it must be at least 1.")
    loaded = load_run(run, data)
    chosen = np.arange(loaded.data.n_users) if users is None else _read_users(users, loaded.data.n_users)
    vectors = jax.jit(lambda model: model.embed())(loaded.model)
    items, scores = top_items(vectors[0], vectors[1], loaded.data.train, chosen, top_k)
    table = pd.DataFrame(
        {
            "user": np.repeat(chosen, items.shape[1]),
            "rank": np.tile(np.arange(1, items.shape[1] + 1), len(chosen)),
            "item": items.ravel(),
            "score": scores.ravel(),
        }
    )
    # A user with fewer new items than asked for gets a shorter list.
    _write_table(table[np.isfinite(table["score"])], output)
    print(f"{output}: {len(chosen)} users, {min(top_k, loaded.data.n_items)} items each.")


def _read_users(path: Path, n_users: int) -> np.ndarray:
    """User ids from a file, one a line, each once, in the file's order."""
    import numpy as np

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); give a text file."
        ) from None
    ids: dict[int, None] = {}
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.lower() in ("user", "userid", "user_id")):
            continue
        if not (line.isascii() and line.isdigit() and int(line) < n_users):
            raise UserError(
                f"{path} line {number}: {line!r} is not a user id from 0 to {n_users - 1}; correct the line."
            )
        ids[int(line)] = None
    if not ids:
        raise UserError(f"{path} names no user; write one user id a line.")
    return np.fromiter(ids, np.int64)


def _check_table_name(path: Path) -> None:
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path} ends neither in .csv nor in .parquet; choose one of them.")


def _write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a .csv or .parquet file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another file.") from None


@app.command()
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")] = False,
) -> None:
    """Filter, split and re-index raw ratings into a dataset directory."""
    from mgrad_jax.data import preprocess

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
        overwrite=overwrite,
    )
    table = Table(title=str(destination), show_header=False)
    for key, value in vars(prepared).items():
        table.add_row(key, str(value))
    _console().print(table)


@app.command()
def info(data: Annotated[str, typer.Argument(metavar="DATA", help="Directory in MMRec format, or 'demo'.")]) -> None:
    """Show a dataset's statistics and what is noteworthy in it."""
    from mgrad_jax.data import load_interactions, problems

    interactions = load_interactions(data)
    table = Table(title=interactions.name, show_header=False)
    for name, value in interactions.statistics().items():
        table.add_row(name, _shown(value))
    console = _console()
    console.print(table)
    for note in problems(data):
        console.print(f"note: {note}", markup=False, highlight=False)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{x:.2f}" for x in value)
    return f"{value:.4%}" if isinstance(value, float) else f"{value:,}"


@app.command("models")
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
    _console().print(table)


if __name__ == "__main__":
    sys.exit(main())
