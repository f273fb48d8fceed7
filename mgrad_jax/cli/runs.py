"""`mgrad-jax evaluate` and `mgrad-jax recommend`: what to do with a finished run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mgrad_jax.cli.console import print_metrics
from mgrad_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
_RunData = Annotated[str | None, typer.Option(help="Where the run's data lie now, if they were moved.")]


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
    with jax.default_matmul_precision(loaded.config.matmul_precision):
        vectors = jax.jit(lambda model: model.embed())(loaded.model)
    splits: tuple[Literal["valid", "test"], ...] = ("valid", "test")
    values = {
        split: per_user_metrics(make_ranker(loaded.data, split, loaded.config.ks), vectors[0], vectors[1])
        for split in splits
    }
    means = {split: {k: float(v.mean()) for k, v in metrics.items()} for split, (_, metrics) in values.items()}
    caption = f"best epoch {loaded.epoch}   {time.perf_counter() - started:.1f} s   {run}"
    print_metrics(f"{loaded.config.model} on {loaded.data.name}", caption, means["valid"], means["test"])
    if per_user is not None:
        import pandas as pd

        users, metrics = values["test"]
        _write_table(pd.DataFrame({"user": users, **metrics}), per_user)


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
    with jax.default_matmul_precision(loaded.config.matmul_precision):
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
