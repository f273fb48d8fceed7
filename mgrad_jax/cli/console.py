"""What the commands show: tables that fit the terminal, and how far a training is."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

_UNFOLDED = 10_000


def console() -> Console:
    """Stdout, paths shown as they are; where it is no terminal, wide enough that no table is folded."""
    made = Console(markup=False, emoji=False, highlight=False)
    return made if made.is_terminal else Console(markup=False, emoji=False, highlight=False, width=160)


def plus_minus() -> str:
    """The sign between a mean and its deviation, as far as the terminal's characters go."""
    try:
        "±".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError, AttributeError):
        return "+/-"
    return "±"


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """A table, and below it notes that are never folded; in a terminal too narrow for it, one line a value."""
    terminal = console()
    if fits(headings, rows, terminal):
        terminal.print(_table(title, headings, rows))
    else:
        terminal.print(title)
        for row in rows:
            terminal.print()
            for heading, cell in zip(headings, row, strict=True):
                terminal.print(f"{' '.join(heading.split())} {cell}")
    for note in notes:
        terminal.print(note, soft_wrap=True)


def fits(headings: Sequence[str], rows: Sequence[Sequence[str]], terminal: Console) -> bool:
    """Whether a table shows all its cells unfolded."""
    options = terminal.options.update(max_width=_UNFOLDED)
    return terminal.measure(_table("", headings, rows), options=options).maximum <= terminal.width


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def print_metrics(title: str, notes: Sequence[str], valid: dict[str, float], test: dict[str, float]) -> None:
    """A table of metrics: one row per cut-off, validation and test side by side, or narrower where that is needed."""
    from mgrad_jax.evaluation.metrics import METRICS

    names = [name for name in METRICS if any(key.startswith(f"{name}@") for key in test)]
    ks = sorted({int(key.partition("@")[2]) for key in test})
    splits = {"valid": valid, "test": test}
    value = {(s, name, k): f"{splits[s][f'{name}@{k}']:.4f}" for s in splits for name in names for k in ks}
    layouts: list[tuple[list[str], list[list[str]]]] = [
        (
            ["@k", *(f"{split}\n{name}" for split in splits for name in names)],
            [[str(k), *(value[split, name, k] for split in splits for name in names)] for k in ks],
        ),
        (
            ["split", "@k", *names],
            [[split, str(k), *(value[split, name, k] for name in names)] for split in splits for k in ks],
        ),
        (
            ["split", "metric", "value"],
            [[split, f"{name}@{k}", value[split, name, k]] for split in splits for name in names for k in ks],
        ),
    ]
    terminal = console()
    headings, rows = next((layout for layout in layouts if fits(*layout, terminal)), layouts[-1])
    print_table(title, headings, rows, notes)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what to call with a state, the steps done and the steps expected.

    A bar on stderr; where that is no terminal, a line on stdout at every call. Nothing that happens to the output ends
    a training.
    """
    stderr = Console(stderr=True, markup=False, emoji=False)
    if not stderr.is_terminal:
        yield _print_line
        return
    columns = (
        SpinnerColumn("line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(title, total=None, state="loading and compiling")

        def show(state: str, done: int, expected: int) -> None:
            bar.update(task, total=expected, completed=done, state=state)

        yield show


@contextlib.contextmanager
def run_progress(
    title: str, groups: Mapping[str, Mapping[str, Mapping[int, Path]]]
) -> Iterator[Callable[[Path], None]]:
    """Yields what to call with every run's directory before it is measured; `groups` are as `group_runs` makes them."""
    n_runs = sum(len(by_seed) for trainings in groups.values() for by_seed in trainings.values())
    done = itertools.count()
    with progress(title) as tell:
        yield lambda run: tell(str(run), next(done), n_runs)


def _print_line(state: str, done: int, expected: int) -> None:
    del done, expected
    with contextlib.suppress(OSError, ValueError):
        print(state, flush=True)
