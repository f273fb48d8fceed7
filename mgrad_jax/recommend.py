"""Lists of recommendations from a finished run, as a table on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import top_items
from mgrad_jax.training.run import load_run

_WRITERS = {".csv": lambda table, file: table.to_csv(file, index=False), ".parquet": pd.DataFrame.to_parquet}


def write_recommendations(run: Path, output: Path, *, top_k: int = 20, users_file: Path | None = None) -> int:
    """Write the best items that each user does not have in training.

    Args:
        run: a run directory.
        output: `.csv` or `.parquet`; columns user, rank (from 1), item, score.
        top_k: items a user.
        users_file: one user id a line; all users without it.

    Returns:
        Rows written.

    Raises:
        UserError: a user id that does not exist, an unknown file ending, or a file that cannot be written.
    """
    if output.suffix not in _WRITERS:
        raise UserError(f"{output} ends in '{output.suffix}'; choose {' or '.join(_WRITERS)}.")
    if top_k < 1:
        raise UserError(f"--top-k is {top_k}; it must be at least 1.")
    _, data, model = load_run(run)
    users = np.arange(data.n_users) if users_file is None else _read_users(users_file, data.n_users)
    items, scores = top_items(*model.embed(), data.train, users, top_k)
    rank = np.broadcast_to(np.arange(1, items.shape[1] + 1), items.shape)
    columns = {"user": np.repeat(users, items.shape[1]), "rank": rank.ravel(), "item": items.ravel()}
    table = pd.DataFrame({**columns, "score": scores.ravel()})
    table = table[np.isfinite(table["score"])]  # a user with few new items has a shorter list
    try:
        _WRITERS[output.suffix](table, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output.") from None
    return len(table)


def _read_users(file: Path, n_users: int) -> np.ndarray:
    try:
        lines = file.read_text().split("\n")
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); give a text file with one user id a line."
        ) from None
    users = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.strip().isdigit() or int(line) >= n_users:
            raise UserError(f"{file} line {number}: '{line.strip()}' is no user id; they run from 0 to {n_users - 1}.")
        users.append(int(line))
    if not users:
        raise UserError(f"{file} names no user; give one id a line.")
    return np.asarray(users)
