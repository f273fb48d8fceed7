"""The cache of compiled programs: out of the way when it cannot be had, mended when it is damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from command_lines import HANGS

from mgrad_jax.cli import cache


def test_unwritable_cache_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_cache: None) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("MGRAD_JAX_NO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_damaged_entries_of_the_cache_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "_directory", lambda: str(tmp_path))
    for name in ("jit_f-1-cache", "jit_f-2-cache", "jit_g-1-cache"):
        (tmp_path / name).write_text("")
    assert cache.mended("Error reading persistent compilation cache entry for 'jit_f': ValueError: damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["jit_g-1-cache"]
    assert cache.mended("Error writing persistent compilation cache entry for 'jit_h': OSError: full")
    assert not cache.mended("alpha1 is not larger than alpha2")
    assert capfd.readouterr().err == ""


def test_a_cache_that_cannot_be_mended_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "_directory", lambda: str(tmp_path))
    monkeypatch.setattr(cache, "_warned", [])
    (tmp_path / "jit_f-1-cache").mkdir()  # unlink fails on a directory
    for _ in range(2):
        assert cache.mended("Error reading persistent compilation cache entry for 'jit_f': ValueError: damaged")
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert f"rm -r {tmp_path}" in error


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, without_cache: None) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MGRAD_JAX_NO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    cache.use_compilation_cache()
    assert cache._directory() is None


@pytest.mark.slow
def test_a_damaged_compilation_cache_heals(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "MGRAD_JAX_NO_CACHE": "0"}
    for number in range(3):
        out = str(tmp_path / str(number))
        arguments = ["train", "--model", "vbpr", "--data", "demo", "--epochs", "1", "--out", out]
        command = [sys.executable, "-m", "mgrad_jax", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=True)
        assert done.stderr == ""
        entries = list((tmp_path / "cache" / "mgrad_jax").glob("*-cache"))
        assert entries
        assert all(entry.stat().st_size > 50 for entry in entries)
        if number == 0:
            for entry in entries:
                entry.write_bytes(entry.read_bytes()[:50])
