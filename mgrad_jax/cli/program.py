"""The commands under one name, and one run of them."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from mgrad_jax.cli import cache, compare, data, landscape, reproduce, robustness, runs, stopping, sweep, theory, train
from mgrad_jax.cli.arguments import Command
from mgrad_jax.cli.failures import explain, fail

app = typer.Typer(
    name="mgrad-jax",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(train.train)
app.command(cls=Command)(sweep.sweep)
app.command(cls=Command)(runs.evaluate)
app.command(cls=Command)(runs.recommend)
app.command(cls=Command)(compare.compare)
app.command(cls=Command)(robustness.robustness)
app.command(cls=Command)(landscape.landscape)
app.command(cls=Command)(theory.theory)
app.command(cls=Command)(reproduce.reproduce)
app.command(cls=Command)(data.prepare)
app.command(cls=Command)(data.info)
app.command("models", cls=Command)(data.list_models)


def _print_version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        print(f"mgrad-jax {importlib.metadata.version('mgrad-jax')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train multimodal recommenders in JAX with Mirror Gradient, and use them."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)
    if context.invoked_subcommand == "prepare":
        stopping.complete_what_is_begun()


def run(arguments: Sequence[str] | None) -> int:
    """Run the command line, see `mgrad_jax.cli.main`."""
    _open_standard_streams()
    streams = sys.stdout, sys.stderr
    try:
        with _shown_warnings():
            code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:
        # typer makes its own end of a broken pipe, with streams that swallow every error.
        sys.stdout, sys.stderr = streams
        cause = error.__context__ if isinstance(error, SystemExit) else error
        explained = None if cause is None else explain(cause)
        if explained is None:
            raise
        if isinstance(cause, BrokenPipeError):
            _drop_output()
        return fail(*explained)
    if code == stopping.EXIT_CODE:  # typer's answer to Ctrl-C
        return fail(stopping.sentence(), code)
    return code if isinstance(code, int) else 0


def _open_standard_streams() -> None:
    """Have all of stdin, stdout and stderr: a closed one would give its number to the next file that is opened."""
    for number in range(3):
        with contextlib.suppress(OSError):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    # What a terminal's encoding lacks is shown as \\u...; an error would come after the work was done.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Have nothing left to flush at exit into a pipe that nobody reads."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _shown_warnings() -> Iterator[None]:
    """Warnings of this project in one line each; those of the compilation cache mend it."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        # Notes of libraries on their own internals are no business of the user's.
        if issubclass(category, UserWarning) and not cache.mended(str(message)) and sys.stderr is not None:
            print(f"warning: {message}", file=sys.stderr)

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
