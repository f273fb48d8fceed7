"""`mgrad-jax`: train, evaluate and recommend from the command line; each command a thin call into the library.

Every mistake gives one sentence on stderr and exit code 2. JAX is imported by the commands that need it, not here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from mgrad_jax.cli import compare, data, robustness, runs, sweep, train
from mgrad_jax.cli.console import Stopped
from mgrad_jax.errors import UserError

app = typer.Typer(
    name="mgrad-jax",
    help="Train multimodal recommenders in JAX with Mirror Gradient, and use them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.command()(train.train)
app.command()(sweep.sweep)
app.command()(runs.evaluate)
app.command()(runs.recommend)
app.command()(compare.compare)
app.command()(robustness.robustness)
app.command()(data.prepare)
app.command()(data.info)
app.command("models")(data.list_models)


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
    except Stopped as stop:
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
