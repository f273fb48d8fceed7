"""Files that are whole or not there, what is read back from them, and directories that one process at a time writes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from mgrad_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
# Our own files of text are far smaller: a larger one is something else, and would only fill the memory.
_LARGEST = 2**28


class Damaged(Exception):
    """A file of our own does not hold what was written; the text is the reason. Whoever reads it knows the remedy."""


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "w", *, durable: bool = True) -> Iterator[IO[Any]]:
    """Open a file beside `path` and move it into place when the block ends without an error.

    A process killed at any moment leaves the old file or the new one.

    Args:
        path: of the file; its directory is made.
        mode: "w" (UTF-8, newlines as written) or "wb".
        durable: whether content and move reach the disk before this returns, and so survive a power loss; what is
            written often and can be derived again need not.

    Raises:
        UserError: the file cannot be written; the message names it and the reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with temporary.open(mode, **text) as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file in one step, see `written_whole`."""
    with written_whole(path, "w" if isinstance(content, str) else "wb", durable=durable) as stream:
        stream.write(content)


def read_whole(path: Path) -> str:
    """The text of a file of our own.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it holds no text, or more than any of ours.
        UserError: it cannot be read now (permission, input and output, memory), or is no file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a named pipe would wait for ever
            raise UserError(f"{path} is not a file; move away what is there and start again.")
        if status.st_size > _LARGEST:
            raise Damaged(f"it has {status.st_size} bytes")
        return path.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except UnicodeDecodeError as error:
        raise Damaged(f"byte {error.start} is no UTF-8") from None
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The content of a file of our own that holds a mapping.

    Args:
        path: of the file.
        parse: what reads its text, e.g. `json.loads`.

    Raises:
        FileNotFoundError, Damaged, UserError: as `read_whole`.
    """
    text = read_whole(path)
    try:
        value = parse(text)
    except Exception as error:  # parsers raise whatever they trip over; RecursionError where the nesting is deep
        raise Damaged((str(error).splitlines() or [type(error).__name__])[0][:200]) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Damaged("it holds no table of names and values")
    return value


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power loss, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make everything in a directory survive a power loss.

    Raises:
        OSError: the disk does not take it.
    """
    for parent, _, names in os.walk(directory):
        for name in names:
            with (Path(parent) / name).open("rb") as stream:
                os.fsync(stream.fileno())
        sync_directory(Path(parent))


def unwritable(path: Path, error: OSError) -> UserError:
    """The sentence for a file or directory that cannot be written."""
    remedy = "choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space"
    elif error.errno in (errno.EISDIR, errno.ENOTEMPTY):
        remedy = "move away what is there"
    return UserError(f"{path} cannot be written ({error.strerror or error}); {remedy} and start again.")


def unreadable(path: Path, error: OSError | MemoryError) -> UserError:
    """The sentence for a file or directory that is there and cannot be read now: nothing says that it is damaged."""
    reason = "not enough memory" if isinstance(error, MemoryError) else error.strerror or str(error)
    place = getattr(error, "filename", None) or path
    return UserError(f"{os.fspath(place)} cannot be read ({reason}); make it readable and start again.")


class Lock:
    """A directory held by this process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def check(self) -> None:
        """Raise a `UserError` where the directory was removed or replaced since."""
        if not self.is_in_place():
            raise UserError(
                f"{self._path.parent} was removed or replaced while it was written to; start again, and leave it in "
                "place."
            )

    def is_in_place(self) -> bool:
        """Whether the file that is locked is still the one that others find."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except OSError:
            return False


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[Lock]:
    """Hold a directory for this process; the lock goes with the process, however it ends.

    What killed processes left half written in it is removed.

    Args:
        directory: what is going to be written; it is made, and removed again where nothing was written. While it is
            held, the file `.lock` in it names the process.

    Raises:
        UserError: another process holds it; nothing in the directory was read or changed.
    """
    path = directory / LOCK_NAME
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    lock, descriptor = _acquire(path)
    try:
        remove_leftovers(directory)
        yield lock
    finally:
        try:
            if lock.is_in_place():
                with contextlib.suppress(OSError):
                    path.unlink()
        finally:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _acquire(path: Path) -> tuple[Lock, int]:
    """Lock a file, made where there is none; whoever removed it meanwhile makes this start again."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(path.parent, error) from None
        lock = Lock(path, descriptor)
        try:
            _lock_file(path, descriptor)
            if lock.is_in_place():
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return lock, descriptor
        except OSError as error:
            os.close(descriptor)
            raise unwritable(path, error) from None
        except UserError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock_file(path: Path, descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # a file system without locks: the work goes on as it did before there were any
        process, _, host = os.read(descriptor, 300).decode("ascii", "replace").strip().partition(" on ")
        elsewhere = f" on {host}" if host and host != socket.gethostname() else ""
        raise UserError(
            f"{path.parent} is in use by process {process or 'unknown'}{elsewhere}; wait for it, stop it, or choose "
            "another directory."
        ) from None


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left half written in a directory that this one holds, see `written_whole`."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                path.unlink()
