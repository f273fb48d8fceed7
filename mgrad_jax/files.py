"""Files that are whole or not there, and directories that one process at a time writes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mgrad_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path` and move it into place when the block ends without an error.

    A process killed at any moment leaves the old file or the new one. The content and the move reach the disk before
    this returns, so they survive a power loss.

    Args:
        path: of the file; its directory is made.
        mode: "w" (UTF-8, newlines as written) or "wb".

    Raises:
        UserError: the file cannot be written; the message names it and the reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with temporary.open(mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one step, see `written_whole`."""
    with written_whole(path, "w" if isinstance(content, str) else "wb") as stream:
        stream.write(content)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power loss, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unwritable(path: Path, error: OSError) -> UserError:
    """The sentence for a file or directory that cannot be written."""
    remedy = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
    return UserError(f"{path} cannot be written ({error.strerror or error}); {remedy} and start again.")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory for this process; the lock goes with the process, however it ends.

    Args:
        directory: what is going to be written; it is made. The file `.lock` in it holds the process id.

    Raises:
        UserError: another process holds it; nothing in the directory was read or changed.
    """
    path = directory / LOCK_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(directory, error) from None
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    yield  # a file system without locks: the run goes on as it did before there were any
                    return
                holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
                raise UserError(
                    f"{directory} is in use by process {holder}; wait for it, stop it, or choose another directory."
                ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
