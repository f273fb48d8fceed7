"""A checkout of the published trainer, and the working directory it expects."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from mgrad_jax.data import Interactions
from mgrad_jax.data.user_graph import build_user_graph
from mgrad_jax.errors import UserError

USER_GRAPH = "user_graph_dict.npy"
MADE_UP = ("demo", "synthetic")  # how the source of such data begins


def reference_source(reference: Path | None) -> Path:
    """The `src` folder of a checkout; anything else is a `UserError`."""
    if reference is None:
        raise UserError("--reference is missing; give a checkout of github.com/Qrange-group/Mirror-Gradient.")
    for source in (reference / "src", reference):
        if all((source / part).exists() for part in ("common/trainer.py", "utils/quick_start.py", "configs")):
            return source.resolve()
    raise UserError(
        f"--reference {reference} holds no src/common/trainer.py, src/utils/quick_start.py and src/configs; "
        "give a checkout of github.com/Qrange-group/Mirror-Gradient."
    )


def lay_out(folder: Path, source: Path, data: Interactions, user_graph: bool) -> dict[str, str]:
    """Give the trainer the working directory it expects: its own configurations, and the data in its layout.

    With `user_graph` the file of user neighbours that its DualGNN and DRAGON read is among them.

    Returns:
        The part of its configuration that says where the data are and how the columns are called.
    """
    (folder / "run").mkdir()
    shutil.copytree(source / "configs", folder / "run" / "configs")
    home = folder / "data" / data.name
    home.mkdir(parents=True)
    if data.source.startswith(MADE_UP):
        _write_files(home, data)
    else:
        given = Path(data.source).resolve()
        for file in (given if given.is_dir() else given.parent).iterdir():
            if file.name in (f"{data.name}.inter", "image_feat.npy", "text_feat.npy"):
                (home / file.name).symlink_to(file)
    if user_graph:
        _write_user_graph(home / USER_GRAPH, data)
    with (home / f"{data.name}.inter").open(encoding="utf-8") as stream:
        header = stream.readline().rstrip("\r\n").split("\t")
    columns = {role: next(name for name in header if role in name.lower()) for role in ("user", "item", "label")}
    return {
        "data_path": f"{folder / 'data'}{os.sep}",
        "inter_file_name": f"{data.name}.inter",
        "vision_feature_file": "image_feat.npy",
        "text_feature_file": "text_feat.npy",
        "user_graph_dict_file": USER_GRAPH,
        "USER_ID_FIELD": columns["user"],
        "ITEM_ID_FIELD": columns["item"],
        "inter_splitting_label": columns["label"],
        "field_separator": "\t",
    }


def _write_files(home: Path, data: Interactions) -> None:
    parts = (data.train, data.valid, data.test)
    table = np.concatenate([np.insert(pairs, 2, label, axis=1) for label, pairs in enumerate(parts)])
    file, header = home / f"{data.name}.inter", "userID\titemID\tx_label"
    np.savetxt(file, table, fmt="%d", delimiter="\t", header=header, comments="")
    for modality, features in data.features.items():
        np.save(home / f"{modality}_feat.npy", features)


def _write_user_graph(file: Path, data: Interactions) -> None:
    graph = build_user_graph(data)
    lengths = np.count_nonzero(graph.shared, axis=1)
    lists = {
        user: [graph.neighbours[user, :n].tolist(), graph.shared[user, :n].astype(float).tolist()]
        for user, n in enumerate(lengths)
    }
    np.save(file, np.array(lists, dtype=object))
