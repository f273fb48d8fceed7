"""The compilation cache: compiled programs in the user's cache directory, so that a second run starts at once.

Its entries are derived. One that is damaged (a full disk, a killed process) is removed as soon as JAX finds it so, and
JAX writes it again: by itself it would keep the entry and warn in every run.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from pathlib import Path

_warned: list[str] = []


def use_compilation_cache() -> None:
    """Switch the cache on; without a place that can be written, or with MGRAD_JAX_NO_CACHE=1, there is none."""
    if os.environ.get("MGRAD_JAX_NO_CACHE", "") not in ("", "0"):
        return
    import jax

    if _directory() is not None:
        return
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(base) / "mgrad_jax"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home
        return
    if os.access(directory, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # The many small programs that build a model take longer to compile than the epoch.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def mended(warning: str) -> bool:
    """Whether a warning was one of JAX's about its cache, and is dealt with.

    JAX names the program, not the file: all entries of that name are removed, before JAX compiles and writes it anew.
    An entry that cannot be written costs the next run its compilation, nothing else.
    """
    found = re.match(r"Error (reading|writing) persistent compilation cache entry for '([^']*)'", warning)
    if found is None:
        return False
    directory = _directory()
    if directory is None or directory in _warned:
        return True
    try:
        for entry in Path(directory).glob(f"{glob.escape(found[2])}*-cache"):
            entry.unlink(missing_ok=True)
    except OSError:
        from mgrad_jax.cli.failures import fail

        _warned.append(directory)
        remedy = f"rm -r {shlex.quote(directory)}"
        fail(f"warning: the compilation cache is damaged and cannot be mended; remove it with `{remedy}`.", 0)
    return True


def _directory() -> str | None:
    """Where JAX keeps its compiled programs, the user's own choice included."""
    import jax

    return getattr(jax.config, "jax_compilation_cache_dir", None)
