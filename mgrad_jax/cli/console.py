"""What the commands share: tables, signals, the compilation cache."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table


class Stopped(Exception):
    """Ctrl-C or a termination signal, with the sentence to show."""


def console() -> Console:
    """Stdout; where it is no terminal, wide enough that no table is folded."""
    made = Console()
    return made if made.is_terminal else Console(width=160)


def progress_bar() -> Progress:
    """A bar on stderr with a field `state`; nothing where that is no terminal."""
    stderr = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
    )
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def print_metrics(title: str, caption: str, valid: dict[str, float], test: dict[str, float]) -> None:
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
    console().print(table)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Treat `kill` like Ctrl-C, so that what is being written is completed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread only
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def use_compilation_cache() -> None:
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
