"""Checkpoints survive donation, kills and damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.errors import UserError
from mgrad_jax.training.checkpoint import Checkpoints


def state(value: float) -> dict[str, Any]:
    return {
        "params": {"kernel": jnp.full((4, 3), value), "bias": jnp.full(3, -value, jnp.bfloat16)},
        "count": (jnp.asarray(int(value), jnp.int32), None),
        "progress": np.asarray([value, 0.1 + 0.2], np.float64),
        "empty": jnp.zeros((0, 3)),
    }


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_latest_and_best_come_back_exactly(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path / "checkpoint")
    assert saved.latest_epoch() is None
    assert saved.best_epoch() is None
    for epoch, is_best in enumerate([True, True, False, False], start=1):
        saved.save(epoch, state(epoch), is_best)
    saved.close()

    again = Checkpoints(tmp_path / "checkpoint")
    assert (again.latest_epoch(), again.best_epoch()) == (4, 2)
    epoch, latest = again.restore(state(0), "latest")
    assert epoch == 4
    assert_same(latest, state(4))
    epoch, best = again.restore(state(0), "best")
    assert epoch == 2
    assert_same(best, state(2))
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


def test_going_on_keeps_the_best(tmp_path: Path) -> None:
    for epoch, is_best in ((1, True), (2, False), (3, False)):
        saved = Checkpoints(tmp_path)
        saved.save(epoch, state(epoch), is_best)
        saved.close()
    assert (Checkpoints(tmp_path).latest_epoch(), Checkpoints(tmp_path).best_epoch()) == (3, 1)
    assert_same(Checkpoints(tmp_path).restore(state(0), "best")[1], state(1))


def test_buffers_may_be_donated(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"x": jnp.zeros((512, 512))}
    saved = Checkpoints(tmp_path)
    for epoch in range(1, 4):
        params = step(params)
        saved.save(epoch, params, is_best=True)
    params = step(params)
    saved.close()
    _, restored = Checkpoints(tmp_path).restore(params)
    np.testing.assert_array_equal(restored["x"], np.full((512, 512), 3.0))


def test_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = Checkpoints(tmp_path)
    saved.save(1, state(1), True)
    saved.close()
    saved.restore(state(0))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no latest checkpoint"):
        Checkpoints(tmp_path / "none").restore(state(0))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "like",
    [
        {"params": jnp.zeros(3)},
        {**state(0), "more": jnp.zeros(1)},
        {k: v for k, v in state(0).items() if k != "count"},
        {**state(0), "params": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(3, jnp.bfloat16)}},
        {**state(0), "params": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}},
    ],
)
def test_another_structure_is_refused(tmp_path: Path, like: Any) -> None:
    saved = Checkpoints(tmp_path)
    saved.save(1, state(1), True)
    saved.close()
    with pytest.raises(UserError, match="holds another state than this run's") as error:
        saved.restore(like)
    assert str(tmp_path) in str(error.value)


def _largest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file() and "/d/" in str(p)), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_damage_is_noticed_and_the_earlier_one_stays(tmp_path: Path, damage: str) -> None:
    saved = Checkpoints(tmp_path)
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    saved.save(1, {"x": values}, True)
    saved.save(2, {"x": values + 1}, False)
    saved.close()
    (latest,) = tmp_path.glob("000002-*")
    file = _largest(latest)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        for path in latest.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged; delete it") as error:
        saved.restore({"x": values})
    assert str(latest) in str(error.value)
    # The remedy of the message works.
    for path in sorted(latest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    latest.rmdir()
    epoch, restored = Checkpoints(tmp_path).restore({"x": values})
    assert epoch == 1
    np.testing.assert_array_equal(restored["x"], values)


def test_a_damaged_index_is_told_in_one_sentence_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    leaves = {f"leaf {number}": np.ones(3, np.float32) for number in range(64)}  # so many that some complain late
    saved = Checkpoints(tmp_path)
    saved.save(1, leaves, True)
    saved.close()
    index = next(tmp_path.glob("000001-*")) / "manifest.ocdbt"
    for content in (index.read_bytes() * 2, b"something else\n"):
        index.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            Checkpoints(tmp_path).restore(leaves)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoint").save(1, state(1), True)


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path: Path) -> None:
    """Kill a process that saves without pause; what is there is complete, and saving goes on after it."""
    program = textwrap.dedent("""
        import sys, numpy as np
        from mgrad_jax.training.checkpoint import Checkpoints
        saved = Checkpoints(sys.argv[1])
        start = (saved.latest_epoch() or 0) + 1
        for epoch in range(start, start + 10_000):
            saved.save(epoch, {"x": np.full((500, 500), epoch, np.float32)}, is_best=epoch % 3 == 1)
    """)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    last = 0
    for delay in (0.05, 0.13, 0.21):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
        while (Checkpoints(tmp_path).latest_epoch() or 0) <= last + 2:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = Checkpoints(tmp_path)
        for which in ("latest", "best"):
            epoch, restored = saved.restore({"x": np.zeros((500, 500), np.float32)}, which)
            np.testing.assert_array_equal(restored["x"], np.full((500, 500), epoch, np.float32))
        assert saved.latest_epoch() > last
        assert saved.best_epoch() % 3 == 1
        last = saved.latest_epoch()


def test_brackets_in_the_path_are_no_pattern(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "lr[0.1]")
    checkpoints.save(1, state(1.0), is_best=True)
    checkpoints.save(2, state(2.0), is_best=False)
    checkpoints.close()
    reopened = Checkpoints(tmp_path / "lr[0.1]")
    for which, epoch in (("best", 1), ("latest", 2)):
        found, restored = reopened.restore(state(0.0), which)  # type: ignore[arg-type]
        assert found == epoch
        assert_same(restored, state(float(epoch)))
