"""A run that is killed just before any of its file operations ends, resumed, like one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mgrad_jax.training import checkpoint, stored_state

# Trains; a process that is told a number dies before its file operation of that number, others count them.
PROGRAM = """
import os, signal, sys, threading
out, at, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
writes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
lock, count = threading.Lock(), 0
def hook(event, args):
    global count
    is_write = event in writes or event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if is_write and isinstance(args[0], (str, bytes, os.PathLike)) and out in os.fsdecode(args[0]):
        with lock:
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
import jax
jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(out), "cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.run import train_run
sys.addaudithook(hook)
config = RunConfig("vbpr", "demo", epochs=4, keep_every=2, hyper_parameters={"embedding_dim": 4}, out=out)
train_run(config, resume=resume)
print(count)
"""


def start(out: Path, at: int = -1) -> subprocess.CompletedProcess[str]:
    resume = "resume" if (out / "config.yaml").exists() else "begin"
    command = [sys.executable, "-c", PROGRAM, str(out), str(at), resume]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def content(out: Path) -> dict[str, Any]:
    """What does not depend on the time of day."""
    result = json.loads((out / "result.json").read_text())
    del result["seconds"]
    table = pd.read_csv(out / "history.csv", dtype=str).drop(columns=["seconds_train", "seconds_evaluate"])
    saved = {path.name: stored_state.read_leaves(path) for path in (out / "checkpoint").iterdir()}
    arrays = {name: {leaf: (x.dtype, x.tobytes()) for leaf, x in leaves.items()} for name, leaves in saved.items()}
    assert all(np.isfinite(x).all() for leaves in saved.values() for x in leaves.values())
    kept = {path.name: path.read_bytes() for path in (out / "kept").iterdir()}
    files = sorted(os.listdir(out))
    return {"result": result, "files": files, "history": table.to_dict(), "arrays": arrays, "kept": kept}


@pytest.mark.slow
def test_killed_before_a_file_operation_and_resumed(tmp_path: Path) -> None:
    unbroken = start(tmp_path / "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    operations = int(unbroken.stdout)
    moments = random.Random(0)
    # At any time, and among the last ones, which write the result.
    for number, at in enumerate([moments.randint(1, operations), moments.randint(operations - 8, operations)]):
        out = tmp_path / f"killed{number}"
        # How many operations there are depends a little on the time that each takes.
        while (killed := start(out, at)).returncode == 0 and at > operations // 2:
            shutil.rmtree(out)
            at -= 1
        assert killed.returncode == -9, killed.stderr
        rows = (out / "history.csv").read_bytes().count(b"\n") - 1 if (out / "history.csv").exists() else 0
        latest = checkpoint.Checkpoints(out / "checkpoint").latest_epoch() or 0
        assert rows <= latest
        resumed = start(out)
        assert resumed.returncode == 0, resumed.stderr
        assert resumed.stderr == ""
        assert content(out) == content(tmp_path / "unbroken")
