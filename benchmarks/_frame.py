"""The frame of every benchmark: its options, rows that are merged by key into one file, a table and a plot."""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from _machine import commit, device_elsewhere, device_name, versions
from _tables import RESULTS, TABLES, Row

from mgrad_jax.errors import UserError
from mgrad_jax.files import unwritable, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORDED = ("batch_size", "repeats", "seed", "threads")  # options that rows always have


class Parser(argparse.ArgumentParser):
    """Options with a second, tiny default for `--quick`; says what is wrong in one sentence and exits with 2."""

    def __init__(self, description: str | None) -> None:
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=plain, allow_abbrev=False)
        self._quick: dict[str, Any] = {}

    def option(self, name: str, default: Any, about: str, quick: Any = None, **more: Any) -> None:
        """An option with its defaults; a list where the default is one."""
        if isinstance(default, list):
            more["nargs"] = "+"
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        action = self.add_argument(name, default=default, help=f"{about} (default {shown})", **more)
        if quick is not None:
            self._quick[action.dest] = quick

    def number(self, name: str, default: int | list[int], about: str, quick: Any = None, least: int = 1) -> None:
        """A whole number, or several, of at least `least`."""
        self.option(name, default, about, quick, type=functools.partial(_at_least, least))

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options; those not given have the defaults of `--quick` if that is among them."""
        if "--quick" in arguments:
            self.set_defaults(**self._quick)
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Print the sentence, without the usage."""
        print(f"{self.prog}: {message}; see --help.", file=sys.stderr)
        raise SystemExit(2)


def _at_least(least: int, text: str) -> int:
    if (value := int(text)) < least:
        raise argparse.ArgumentTypeError(f"{value} is too small, it must be at least {least}")
    return value


def exit_status(main: Callable[[], None]) -> int:
    """Call a script's main function: 0, or 2 after the sentence of a `UserError`."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def refuse_dirty(allowed: bool) -> None:
    """Refuse to measure what no commit names."""
    if commit().endswith("+dirty") and not allowed:
        raise UserError("the working tree differs from its commit; commit first, or give --allow-dirty.")


@dataclass(frozen=True)
class Benchmark:
    """One question and how it is answered.

    Attributes:
        name: of its table (`_tables.TABLES`), which has the key of a row, and of its file of results.
        about: the script's docstring.
        measure: yields rows as soon as they are measured; they are written at once.
        options: adds the script's own options.
        own_processes: whether measuring happens in processes of their own, which this one must leave the device to.
        job: what such a process does, given a job; its result goes back to `in_own_process`.
        complete: adds to all rows of the file what depends on all of them.
        plot: draws all rows of the file; the picture lies beside it.
        kept: whether results go to `results/NAME.json` unless `--output` says otherwise; else `--output` is required.
    """

    name: str
    about: str | None
    measure: Callable[[argparse.Namespace], Iterable[list[Row]]]
    options: Callable[[Parser], None] = lambda parser: None
    own_processes: bool = False
    job: Callable[[dict[str, Any]], Any] | None = None
    complete: Callable[[list[Row]], list[Row]] = lambda rows: rows
    plot: Callable[[list[Row]], Figure] | None = None
    kept: bool = True

    def main(self) -> int:
        """Measure, write, print and plot, or do a job; returns the exit status."""
        arguments = sys.argv[1:]
        if (do := self.job) is not None and arguments[:1] == ["--job"]:
            job = json.loads(Path(arguments[1]).read_text())
            return exit_status(lambda: write_whole(Path(job["output"]), json.dumps(do(job))))
        return exit_status(lambda: self._run(self._options(arguments)))

    def _options(self, arguments: list[str]) -> argparse.Namespace:
        parser = Parser(self.about)
        self.options(parser)
        parser.add_argument("--quick", action="store_true", help="tiny defaults: does it run, not how fast")
        parser.add_argument("--show", action="store_true", help="measure nothing; print and plot the file's rows")
        parser.add_argument("--allow-dirty", action="store_true", help="measure a tree that differs from its commit")
        parser.add_argument("--output", type=Path, required=not self.kept, help="the file of results")
        options = parser.parse(arguments)
        if options.output is None and not options.quick:  # what is tiny is worth no file
            options.output = RESULTS / f"{self.name}.json"
        return options

    def _run(self, options: argparse.Namespace) -> None:
        rows = self._earlier(options.output)
        new = rows if options.show else list(self._measured(rows, options))
        if not new:
            raise UserError("there are no rows to show.")
        print(TABLES[self.name].text(new))
        if self.plot is not None and options.output is not None:
            self.plot(rows).savefig(options.output.with_suffix(".png"), dpi=120)

    def _measured(self, rows: list[Row], options: argparse.Namespace) -> Iterator[Row]:
        """Measure; every row is merged into `rows` and written before it is handed on."""
        refuse_dirty(options.allow_dirty or options.quick)
        key = TABLES[self.name].key_of
        here = functools.cache(device_elsewhere if self.own_processes else device_name)
        if others := ", ".join(sorted({row["device"] for row in rows} - {here()})) if rows else "":
            raise UserError(f"{options.output} holds rows of {others} and this is {here()}; choose another --output.")
        common = {name: value for name, value in vars(options).items() if name in RECORDED}
        for measured in self.measure(options):
            fresh = [{**common, **row, "device": row.get("device") or here()} for row in measured]
            fresh = [{**row, "versions": row.get("versions") or versions()} for row in fresh]
            keys = {key(row) for row in fresh}
            rows[:] = self.complete([row for row in rows if key(row) not in keys] + fresh)
            if options.output is not None:
                write_whole(options.output, json.dumps(rows, indent=1) + "\n")
            yield from (row for row in rows if key(row) in keys)

    def _earlier(self, output: Path | None) -> list[Row]:
        """Rows already in the file; read before anything is measured, so that hours are not lost for a name."""
        if output is None:
            return []
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            if not output.exists():
                write_whole(output, "[]\n")  # can it be written?
                output.unlink()
                return []
            rows: list[Row] = json.loads(output.read_text())
            {(TABLES[self.name].key_of(row), row["device"]) for row in rows}
        except OSError as error:
            raise unwritable(output, error) from None
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{output} holds no rows of this benchmark; choose another --output.") from None
        return rows


def say(*what: object) -> None:
    """Tell what is being measured."""
    print(*what, "...", file=sys.stderr, flush=True)


def in_own_process(command: Sequence[str], job: Mapping[str, Any], what: str, **how: Any) -> Row:
    """Run a command with the file of a job as its last argument; returns what it wrote to the job's `output`.

    `[sys.executable, __file__, "--job"]` is answered by `Benchmark.job`; `what` is for the message where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "job.json", Path(folder) / "result.json"
        file.write_text(json.dumps({**job, "output": str(output)}))
        run_command([*command, str(file)], what, **how)
        result: Row = json.loads(output.read_text())
        return result


def run_command(command: Sequence[str], what: str, **how: Any) -> None:
    """Run a command; where it fails, the last line it printed is in the message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    except OSError as error:
        raise UserError(f"{what}: {command[0]} cannot be started ({error.strerror}).") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message (killed, for want of memory?)"])[-1]
        raise UserError(f"{what} ended with exit code {done.returncode}: {last[-300:]}")
