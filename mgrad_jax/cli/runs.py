"""`mgrad-jax evaluate` and `mgrad-jax recommend`: what to do with a finished run, or with the best of a sweep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from mgrad_jax.cli import stopping
from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.console import print_metrics, print_table
from mgrad_jax.cli.options import SharedBy, devices_of
from mgrad_jax.cli.train import train_and_tell
from mgrad_jax.errors import UserError, shown
from mgrad_jax.files import written_whole

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from mgrad_jax.data import Interactions
    from mgrad_jax.training.run import LoadedRun

_SPLITS: tuple[Literal["valid", "test"], ...] = ("valid", "test")
_Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Directory of a run, of a sweep (its best setting) or of a sweep's member."),
]
_RunData = Annotated[str | None, typer.Option(help="Where the run's data lie now, if they were moved.")]
_InternalIds = Annotated[
    bool,
    typer.Option(
        "--internal-ids", help="Ids as in the .inter file, also where `prepare` left the maps to the raw ones."
    ),
]


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Directory of a run, of a sweep (its best setting) or of a sweep's member; or popularity, itemknn or "
            "itemknn-features, which need no training, with --data.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Where the run's data lie now, if they were moved; the data of what needs no run."),
    ] = None,
    per_user: Annotated[
        Path | None, typer.Option(help="Also write each user's test metrics to this .csv or .parquet file.")
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option(
            metavar="NPY", help="Also rank held-out items among these candidates; `prepare --amr` writes them."
        ),
    ] = None,
    devices: SharedBy = None,
    internal_ids: _InternalIds = False,
) -> None:
    """Evaluate a run's best parameters, or a recommender without training, on validation and test."""
    if per_user is not None:
        _check_output("--per-user", per_user)
    number = devices_of(devices)
    use_compilation_cache()

    from mgrad_jax.evaluation.candidates import CAPTION, candidate_metrics, read_candidates

    started = time.perf_counter()
    if not _is_baseline(run):
        evaluated = _evaluated_run(run, data, number)
    elif devices is None:
        evaluated = _evaluated_baseline(str(run), data)
    else:
        raise UserError(f"{run} has no tables to be shared by devices; leave --devices out.")
    means = {
        split: {k: float(v.mean()) for k, v in metrics.items()} for split, (_, metrics) in evaluated.values.items()
    }
    sampled = None
    if candidates is not None:
        sampled = candidate_metrics(read_candidates(candidates, evaluated.data), evaluated.scores)
    if per_user is not None:
        _write_users(per_user, evaluated, sampled, internal_ids)
    seconds = f"{time.perf_counter() - started:.1f} s"
    notes = [f"{evaluated.notes[0]}   {seconds}", *evaluated.notes[1:]]
    print_metrics(evaluated.title, notes, means["valid"], means["test"])
    if sampled is not None:
        rows = [[name, f"{float(values.mean()):.4f}"] for name, values in sampled[1].items()]
        print_table(f"{len(sampled[0])} users, held-out items among candidates", ["metric", "value"], rows, [CAPTION])


class _Evaluated(NamedTuple):
    """What `evaluate` shows: users and their metrics by split, and scores for further questions."""

    title: str
    notes: list[str]
    data: Interactions
    values: Mapping[Literal["valid", "test"], tuple[np.ndarray, dict[str, np.ndarray]]]
    scores: Callable[[np.ndarray], np.ndarray]


def _is_baseline(run: Path) -> bool:
    """Whether a recommender without training is meant; a directory of its name is what one has trained."""
    from mgrad_jax.analysis.baselines import BASELINES

    return str(run) in BASELINES and not run.exists()


def _evaluated_run(run: Path, data: str | None, devices: int | Literal["all"]) -> _Evaluated:
    from mgrad_jax.devices import in_force
    from mgrad_jax.evaluation.candidates import scores_of
    from mgrad_jax.evaluation.ranking import make_eval_split, per_user_metrics, split_over_devices

    loaded, notes = _open(run, data, devices)
    vectors, layout = loaded.vectors(), loaded.layout
    splits = {split: make_eval_split(loaded.data, split, loaded.config.ks) for split in _SPLITS}
    if layout is not None:
        splits = {name: split_over_devices(split, layout.mesh) for name, split in splits.items()}
    with in_force(layout):
        values = {name: per_user_metrics(split, *vectors) for name, split in splits.items()}

    def scores(users: np.ndarray) -> np.ndarray:
        with in_force(layout):
            return scores_of(*vectors)(users)

    title, notes = f"{loaded.config.model} on {loaded.data.name}", [f"best epoch {loaded.epoch}", *notes, str(run)]
    return _Evaluated(title, notes, loaded.data, values, scores)


def _evaluated_baseline(name: str, data: str | None) -> _Evaluated:
    from mgrad_jax.analysis.baselines import make_baseline
    from mgrad_jax.data import load_interactions
    from mgrad_jax.evaluation.ranking import make_eval_split, metrics_of_scores
    from mgrad_jax.training.config import RunConfig

    if data is None:
        raise UserError(f"{name} needs no run and has no data of its own; name a dataset with --data.")
    interactions, defaults = load_interactions(data), RunConfig("vbpr", data)
    baseline = make_baseline(name, interactions, defaults.metric)
    values = {
        split: metrics_of_scores(make_eval_split(interactions, split, defaults.ks), baseline.scores)
        for split in _SPLITS
    }
    notes = ["no training", *filter(None, [baseline.setting])]
    return _Evaluated(f"{name} on {interactions.name}", notes, interactions, values, baseline.scores)


def _write_users(
    file: Path,
    evaluated: _Evaluated,
    sampled: tuple[np.ndarray, dict[str, np.ndarray]] | None,
    internal_ids: bool,
) -> None:
    """Each user's test metrics; those on candidates beside them, empty where a user has none."""
    import pandas as pd

    from mgrad_jax.data.id_maps import in_raw_ids, raw_ids

    users, metrics = evaluated.values["test"]
    table = pd.DataFrame({"user": users, **metrics})
    if sampled is not None:
        table = table.merge(pd.DataFrame({"user": sampled[0], **sampled[1]}), "outer", "user").sort_values("user")
    _write_table(table if internal_ids else in_raw_ids(table, raw_ids(evaluated.data, ["user"])), file)


def recommend(
    run: _Run,
    output: Annotated[
        Path, typer.Option(help="File to write, .csv or .parquet: user, rank, item, score; an earlier one is replaced.")
    ],
    top_k: Annotated[int, typer.Option(help="The most items per user.")] = 20,
    users: Annotated[
        Path | None, typer.Option(help="File with one user id a line, raw ones where there are; all users by default.")
    ] = None,
    data: _RunData = None,
    devices: SharedBy = None,
    internal_ids: _InternalIds = False,
) -> None:
    """Write the best new items of users, their training items left out; in raw ids where `prepare` left its maps."""
    _check_output("--output", output)
    if users is not None and output.exists() and users.exists() and output.samefile(users):
        raise UserError(f"--output {output} is the file of --users; choose another one.")
    if top_k < 1:
        raise UserError(f"--top-k is {shown(top_k)}; it must be at least 1.")
    number = devices_of(devices)
    use_compilation_cache()
    import numpy as np

    from mgrad_jax.data.id_maps import in_raw_ids, raw_ids
    from mgrad_jax.devices import in_force
    from mgrad_jax.evaluation.recommendation import recommend as lists_of

    loaded, notes = _open(run, data, number)
    names = {} if internal_ids else raw_ids(loaded.data)
    n_users = loaded.data.n_users
    chosen = np.arange(n_users) if users is None else read_users(users, n_users, names.get("user"))
    with in_force(loaded.layout):
        table = lists_of(*loaded.vectors(), loaded.data, chosen, top_k)
    counted = _count(np.bincount(table["user"], minlength=n_users)[chosen], top_k)
    _write_table(in_raw_ids(table, names), output)
    for note in notes:
        print(note)
    print(f"{output}: {counted}{', in raw ids' if 'user' in names else ''}.")


def _count(lengths: np.ndarray, top_k: int) -> str:
    """What was written, in words: "3 users, 20 items each"."""
    shortest, longest = lengths.min(), lengths.max()
    users = f"{len(lengths)} {'user' if len(lengths) == 1 else 'users'}"
    if shortest < longest:
        return f"{users}, {lengths.sum()} items, {shortest} to {longest} each"
    short = f", fewer than the {top_k} asked for" if longest < top_k else ""
    return f"{users}, {longest} {'item' if longest == 1 else 'items'} each{short}"


def _open(directory: Path, data: str | None, devices: int | Literal["all"]) -> tuple[LoadedRun, list[str]]:
    """A run with its best parameters, and what to say about it; a sweep's member is trained again the first time."""
    from mgrad_jax.devices import mesh_or_none
    from mgrad_jax.training.member import differs, find_member
    from mgrad_jax.training.run import load_run

    over = mesh_or_none(devices)
    member = find_member(directory, data)
    if member is None:
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise UserError(f"{directory} {what}; give the directory of a run.")
        loaded = load_run(directory, data, over)
        return loaded, [] if (directory / "result.json").exists() else ["its training is not finished"]
    notes = [member.description]
    place = member.config.directory
    if not (place / "result.json").exists():
        print(f"{member.description}: trained once more, kept in {place}", flush=True)
        go_on = "stopped; repeat the command to go on."
        begun = (place / "config.yaml").exists()
        result = train_and_tell(member.config, resume=begun, devices=devices, go_on=go_on)
        if differs(place.parent, result):
            notes.append("trained again, its metrics differ from those of the sweep")
    return load_run(place, data, over), notes


_HEADERS = ("user", "userid", "user_id")


def read_users(path: Path, n_users: int, names: np.ndarray | None = None) -> np.ndarray:
    """User ids from a file, one a line, each once, in the file's order.

    Args:
        path: a text file in UTF-8; empty lines and a header are passed over.
        n_users: ids count from 0 to below it.
        names: (n_users,) the raw ids that the file holds instead, or None.

    Raises:
        UserError: the file cannot be read, a line is no user, or there is none.
    """
    import numpy as np

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); give a text file."
        ) from None
    known = None if names is None else {name: number for number, name in enumerate(names)}
    ids: dict[int, None] = {}
    # Not by `splitlines`, which would also part an id at a form feed.
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.strip()
        user = _user_id(entry, n_users) if known is None else known.get(line, known.get(entry))
        if user is not None:
            ids[user] = None
        elif entry and not (number == 1 and entry.lower() in _HEADERS):
            wanted = f"a user id from 0 to {n_users - 1}"
            if known is not None:
                wanted = "a raw id of the dataset's user_map.tsv"
                wanted += " (with --internal-ids it would be one)" if _user_id(entry, n_users) is not None else ""
            raise UserError(f"{path} line {number}: {shown(entry)} is not {wanted}; correct the line.")
    if not ids:
        raise UserError(f"{path} names no user; write one user id a line.")
    return np.fromiter(ids, np.int64)


_read_users = read_users  # its first name, which scripts still import


def _user_id(text: str, n_users: int) -> int | None:
    """An id in plain digits, None where it is no user's."""
    digits = text.lstrip("0") or text[:1]
    is_short = digits.isascii() and digits.isdigit() and len(digits) <= len(str(n_users))
    return int(digits) if is_short and int(digits) < n_users else None


def _check_output(option: str, path: Path) -> None:
    """Refuse what cannot be written before anything is computed."""
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path} ends neither in .csv nor in .parquet; choose one of them.")
    if path.is_dir():
        raise UserError(f"{option} {path} is a directory; give a file in it.")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written ({place} is no directory one can write in); choose another place.")


def _write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a .csv or .parquet file in one step."""
    stopping.complete_what_is_begun()
    mode, write = ("w", table.to_csv) if path.suffix == ".csv" else ("wb", table.to_parquet)
    with written_whole(path, mode) as stream:
        write(stream, index=False)
