"""docs/tutorial.md does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mgrad_jax.cli import main
from mgrad_jax.data import demo_interactions

# Shorter than for a reader.
SHORT = {"--epochs 30": "--epochs 2", "epochs=30": "epochs=2", "--seeds 3": "--seeds 1", "--epochs 10": "--epochs 1"}
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)


@pytest.fixture
def raw_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's own files: the demo data by names."""
    monkeypatch.chdir(tmp_path)
    data = demo_interactions()
    users, items = np.concatenate([data.train, data.valid, data.test]).T
    ratings = {"user": [f"user-{u}" for u in users], "item": [f"film-{i}" for i in items], "rating": 3 + users % 3}
    pd.DataFrame(ratings).to_csv("ratings.csv", index=False)
    np.save("texts.npy", data.features["text"])
    Path("texts.txt").write_text("".join(f"film-{i}\n" for i in range(data.n_items)))


@pytest.mark.slow
@pytest.mark.usefixtures("raw_files")
def test_every_command_and_every_line_of_python_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for long, short in SHORT.items():
        assert long in text
        text = text.replace(long, short)
    names: dict[str, Any] = {}
    for language, code in BLOCK.findall(text):
        if language == "python":
            exec(code, names)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "mgrad-jax"
            assert main(arguments) == 0, line
    ratings, lists = pd.read_csv("ratings.csv"), pd.read_csv("lists.csv")
    assert set(lists["user"]) == set(ratings["user"])
    assert set(lists["item"]) <= set(ratings["item"])
    mine = lists[lists["user"] == names["lists"]["user"][0]]
    assert names["lists"]["item"].tolist() == mine["item"].tolist()
    assert names["result"].epochs_run == 2
    assert "mirror against plain" in Path("studies/mine/table.md").read_text()
