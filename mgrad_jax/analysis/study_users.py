"""Each user's test metrics at a run's best epoch, kept beside the run and made again at will."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mgrad_jax.evaluation.candidates import Candidates, candidate_metrics, scores_of
from mgrad_jax.evaluation.ranking import make_eval_split, per_user_metrics
from mgrad_jax.files import written_whole
from mgrad_jax.training.run import load_run

USERS_FILE = "users.npz"
CANDIDATES_FILE = "candidates.npz"


def user_metrics(directory: Path, result: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Each user's test metrics at the best epoch, kept in `users.npz` beside the run."""
    path = directory / USERS_FILE
    kept = _read_users(path)
    if kept is None or int(kept.pop("epoch")) != result["best_epoch"]:
        loaded = load_run(directory)
        vectors = loaded.vectors()
        users, metrics = per_user_metrics(make_eval_split(loaded.data, "test", loaded.config.ks), *vectors)
        _write_users(path, epoch=result["best_epoch"], users=users, **metrics)
        return users, metrics
    return kept.pop("users"), kept


def sampled_metrics(directory: Path, result: Mapping[str, Any], candidates: Candidates) -> dict[str, np.ndarray]:
    """Each user's metrics on the candidates at the best epoch, kept in `candidates.npz` beside the run."""
    path = directory / CANDIDATES_FILE
    kept = _read_users(path)
    same = {"epoch": result["best_epoch"], "digest": candidates.digest}
    if kept is None or any(str(kept.pop(name, None)) != str(value) for name, value in same.items()):
        users, metrics = candidate_metrics(candidates, scores_of(*load_run(directory).vectors()))
        _write_users(path, **same, users=users, **metrics)
        return metrics
    del kept["users"]
    return kept


def _write_users(path: Path, **arrays: Any) -> None:
    with written_whole(path, "wb") as stream:
        np.savez(stream, **arrays)


def _read_users(path: Path) -> dict[str, np.ndarray] | None:
    """The content of a `users.npz`; None where there is none that can be read, for it is made again at will."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError):
        return None
    return content if {"epoch", "users"} <= content.keys() else None
