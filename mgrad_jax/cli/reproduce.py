"""`mgrad-jax reproduce`: a table or figure of the paper, its values beside ours."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgrad_jax.cli import stopping
from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.compare import duration, print_tables, seeds_of, train_outcome
from mgrad_jax.cli.console import print_table
from mgrad_jax.cli.options import HyperParameters, names, pairs
from mgrad_jax.cli.training import how_to_go_on
from mgrad_jax.errors import UserError
from mgrad_jax.training.settings import dataset_name

if TYPE_CHECKING:
    from mgrad_jax.analysis.presets import Asked, Call, Preset, Training
    from mgrad_jax.analysis.study import Study

ASKED_FILE, STEPS_FILE = "reproduce.yaml", "steps.json"


def reproduce(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="table2 ... table12, fig3, fig4, fig5, theorem or lemma; none: list them.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Directory in MMRec format, or 'demo'; repeatable, one after the other.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the results; reproduce/NAME by default.")] = None,
    models: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Fewer or other models than the paper's.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N", help="How many, counted upwards from 999, or a list such as 999,42,2024.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="The most epochs a run trains; 1000 by default.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without improvement that are tolerated; 20 by default.")
    ] = None,
    hyper: HyperParameters = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List steps and runs with an estimate of the time.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out, or extend it.")] = False,
) -> None:
    """Repeat a table or figure of the paper: train, analyse, and put its values beside ours."""
    from mgrad_jax.analysis.presets import PRESETS, Asked, find_preset

    if name is None:
        rows = [[key, ", ".join(p.models), p.question] for key, p in PRESETS.items()]
        print_table("mgrad-jax reproduce NAME --data DATA", ["name", "models", "question"], rows)
        return
    preset = find_preset(name)
    if not data:
        raise UserError(f"--data is missing; the paper's {name} is of {' and '.join(preset.data)}.")
    place = out or Path("reproduce") / name
    wanted = partial(
        Asked,
        models=preset.models if models is None else names("--models", models),
        seeds=preset.seeds if seeds is None else seeds_of(seeds, preset.seeds[0]),
        settings={key: n for key, n in (("epochs", epochs), ("patience", patience)) if n is not None},
        hyper_parameters=pairs("--set", hyper or ()),
        dry=dry_run,
    )
    asked = _asked(data, place, wanted)
    if dry_run:
        _print_plan(name, preset, asked)
        return
    use_compilation_cache()
    _begin(name, place, asked, resume)
    stopping.keep(lambda: how_to_go_on("stopped", place, ASKED_FILE))
    try:
        for one in asked.values():
            for step in preset.steps(one):
                _do(step, one, context)
    except stopping.Stopped:
        raise stopping.Stopped(how_to_go_on("stopped", place, ASKED_FILE)) from None
    _conclude(name, preset, place, asked)


def _asked(data: Sequence[str], place: Path, wanted: Callable[[str, Path], Asked]) -> dict[str, Asked]:
    """What is wanted of each dataset and its directory, by the dataset's name."""
    found: dict[str, Asked] = {}
    for one in data:
        key = dataset_name(one)
        if key in found:
            raise UserError(f"--data names two datasets called {key}, which would share a directory; rename one.")
        found[key] = wanted(one, place / key)
    return found


def _begin(name: str, place: Path, asked: dict[str, Asked], resume: bool) -> None:
    import yaml

    from mgrad_jax.files import Damaged, read_mapping, write_whole

    begun = (place / ASKED_FILE).exists()
    if begun and not resume:
        raise UserError(f"{place} already holds results; add --resume to go on with them, or choose another --out.")
    if resume and not begun:
        raise UserError(f"{place} holds nothing to resume; leave --resume out to begin.")
    if begun:
        try:
            before = read_mapping(place / ASKED_FILE, yaml.safe_load)
        except Damaged as damage:
            raise UserError(
                f"{place / ASKED_FILE} is damaged ({damage}); restore it, or choose another --out."
            ) from None
        if before.get("name") != name:
            raise UserError(f"{place} holds {before.get('name')}, not {name}; choose another --out.")
    first = next(iter(asked.values()))
    content = {
        "name": name,
        "data": [one.data for one in asked.values()],
        "models": list(first.models),
        "seeds": list(first.seeds),
        "settings": dict(first.settings),
        "hyper_parameters": dict(first.hyper_parameters),
    }
    write_whole(place / ASKED_FILE, yaml.safe_dump(content, sort_keys=False))


def _do(step: Training | Call, asked: Asked, context: typer.Context) -> None:
    from mgrad_jax.analysis.presets import Training

    if isinstance(step, Training):
        _train(step)
    else:
        _call(step, asked, partial(run_command, context))


def _train(step: Training) -> None:
    """Train what is missing of a study and write its tables."""
    from mgrad_jax.analysis.compare_report import write_report
    from mgrad_jax.analysis.study import STUDY_FILE

    directory = step.study.directory
    outcome = train_outcome(step.study, resume=(directory / STUDY_FILE).exists())
    write_report(step.study, outcome, step.metrics)
    print(f"Tables, tests and pictures: {directory}")
    if step.copy is not None:
        step.copy.mkdir(parents=True, exist_ok=True)
        for file in directory.iterdir():
            if file.suffix in (".md", ".csv", ".tex", ".json", ".png"):
                shutil.copy(file, step.copy)


def _call(step: Call, asked: Asked, run: Callable[[Sequence[str]], None]) -> None:
    """Run another command, unless what it would write is there already."""
    from mgrad_jax.files import Damaged, read_mapping, write_whole

    file, key = asked.out / STEPS_FILE, step.out.name
    try:
        done = read_mapping(file, json.loads)
    except (FileNotFoundError, Damaged):  # then the steps are made again; finished runs are not trained twice
        done = {}
    digest = _digest(step)
    if step.sweeps is None and done.get(key) == digest and (step.out / "result.json").exists():
        print(f"{step.out} is there already")
        return
    words = [*step.words, "--out", str(step.out)]
    if step.sweeps is not None:
        words += ["--resume"] if (step.out / "config.yaml").exists() else []
    else:
        shutil.rmtree(step.out, ignore_errors=True)  # of other runs, or half written
    run(words)
    write_whole(file, json.dumps({**done, key: digest}, indent=2) + "\n")


def _digest(step: Call) -> str:
    """Of the command and the runs it reads: with other runs it is done anew."""
    total = hashlib.blake2b(shlex.join(step.words).encode(), digest_size=16)
    if step.reads is not None:
        for config in step.reads.configs().values():
            result = config.directory / "result.json"
            total.update(result.read_bytes() if result.exists() else b"-")
    return total.hexdigest()


def run_command(context: typer.Context, words: Sequence[str]) -> None:
    """Another command of this program, in this process."""
    print(f"mgrad-jax {shlex.join(words)}", flush=True)
    context.find_root().command.main(args=list(words), prog_name="mgrad-jax", standalone_mode=False)


def _conclude(name: str, preset: Preset, place: Path, asked: dict[str, Asked]) -> None:
    """Put the paper's values beside ours."""
    from mgrad_jax.analysis.report import csv_records, provenance, to_csv, to_latex, to_markdown
    from mgrad_jax.analysis.reproduce import beside, collect, draw
    from mgrad_jax.data import load_interactions
    from mgrad_jax.files import write_whole

    table = beside(name, preset, {load_interactions(one.data).name: collect(name, one) for one in asked.values()})
    contents = {"table.md": to_markdown(table), "table.csv": to_csv(table), "table.tex": to_latex(table)}
    settings = {key: {**vars(one), "out": str(one.out)} for key, one in asked.items()}
    contents["result.json"] = provenance(name=name, settings=settings, table=csv_records(table))
    for key, content in contents.items():
        write_whole(place / key, content)
    pictures = [file for one in asked.values() for file in draw(name, one)]
    print_tables(table)
    for picture in pictures:
        print(f"Picture: {picture}")
    print(f"The paper's values beside ours: {place}")


def _print_plan(name: str, preset: Preset, asked: dict[str, Asked]) -> None:
    """Steps, runs, and what they will take."""
    from mgrad_jax.analysis.presets import Training

    clock, rows, total = _Clock(), [], [0.0, 0.0]
    notes = ["at least: every run stops after patience + 1 epochs; at most: every run trains all epochs"]
    for one in asked.values():
        for step in preset.steps(one):
            if isinstance(step, Training):
                what, place = "train and compare", step.study.directory
                n, least, most = clock.of_study(step.study)
                notes += [str(run) for run in clock.new]
            else:
                what, place = step.words[0], step.out
                n, least, most = clock.of_call(step, one)
                notes.append(f"mgrad-jax {shlex.join([*step.words, '--out', str(step.out)])}")
            rows.append([what, str(place), str(n), duration(least), duration(most)])
            total = [total[0] + least, total[1] + most]
    rows.append(["all", "", "", *map(duration, total)])
    print_table(f"{name}: {preset.question}", ["step", "directory", "runs", "at least", "at most"], rows, notes)


class _Clock:
    """Estimates of steps; a run that an earlier step trains is not counted again."""

    def __init__(self) -> None:
        self.seen: set[Path] = set()
        self.new: list[Path] = []
        self.evaluation: dict[str, float] = {}

    def of_study(self, study: Study) -> tuple[int, float, float]:
        """Runs to train, and seconds."""
        from mgrad_jax.analysis.estimate import estimate

        self.new, least, most = [], 0.0, 0.0
        for row in estimate(study):
            self.evaluation[row.cell.model] = row.evaluation
            of_cell = [config.directory for key, config in study.configs().items() if key.cell == row.cell]
            new = [run for run in of_cell if run not in self.seen]
            share = len(new) / len(of_cell)
            least, most = least + share * row.least, most + share * row.most
            self.new += new
        self.seen.update(self.new)
        return len(self.new), least, most

    def of_call(self, step: Call, asked: Asked) -> tuple[int, float, float]:
        """Runs or members, and seconds: of a sweep those of training, else those of as many evaluations."""
        if step.sweeps is not None:
            from mgrad_jax.analysis.estimate import estimate

            model, members = step.sweeps
            like = dataclasses.replace(asked, models=(model,), seeds=asked.seeds[:1]).study(step.out.name)
            row = next(row for row in estimate(like) if row.cell.method == "replay")
            return members, members * row.least, members * row.most
        runs = len(step.reads.configs()) if step.reads is not None else 1
        seconds = runs * step.measures * max(self.evaluation.values(), default=0.1)
        return runs, seconds, seconds
