"""Files that are something else than their name says, told by how they begin."""

from __future__ import annotations

from pathlib import Path

_LENGTH = 512  # far enough for the mark of a tar archive

_DOWNLOAD = "download it again and look at the page for the reason"
_UNPACK = "unpack it and give the file inside"
_CONVERT = "read it with the program it belongs to and write it in the format asked for"
# What a file begins with, what it is, and what to do about it.
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "fetch the file with `git annex get`"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"PAR1", "a Parquet file", _CONVERT),
    (b"ARROW1", "an Arrow file", _CONVERT),
    (b"FEA1", "a Feather file", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"MATLAB 5.0", "a MATLAB file", _CONVERT),
    (b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", _CONVERT),
    (b"%PDF", "a PDF document", _CONVERT),
    (b"\x89PNG", "a PNG image", _CONVERT),
    (b"\xff\xd8\xff", "a JPEG image", _CONVERT),
    (b"GIF8", "a GIF image", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"\x80\x02", "a pickle", _CONVERT),
    (b"\x80\x03", "a pickle", _CONVERT),
    (b"\x80\x04", "a pickle", _CONVERT),
    (b"\x80\x05", "a pickle", _CONVERT),
)
# Names that the first member of a zip archive has, where a program writes the archive.
_ZIP_MEMBERS = (
    (b".npy", "a NumPy archive (.npz)", "load the one array and write it with numpy.save"),
    (b"data.pkl", "a PyTorch file", _CONVERT),
    (b"[Content_Types].xml", "an Excel or Word file", _CONVERT),
)


def beginning(file: Path) -> bytes:
    """The first bytes of a file, for `foreign`."""
    with file.open("rb") as stream:
        return stream.read(_LENGTH)


def foreign(start: bytes) -> tuple[str, str] | None:
    """What a file is and what to do about it, where its beginning shows that it is no text table; None otherwise."""
    for mark, what, remedy in _KINDS:
        if start.startswith(mark):
            return what, remedy
    if start.startswith(b"PK\x03\x04"):
        for member, what, remedy in _ZIP_MEMBERS:
            if member in start:
                return what, remedy
        return "a zip archive", _UNPACK
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP image", _CONVERT
    if (
        start.removeprefix(b"\xef\xbb\xbf")
        .lstrip()
        .lower()
        .startswith((b"<!doctype html", b"<html", b"<?xml", b"<head"))
    ):
        return "a web page, perhaps the error message of a download", _DOWNLOAD
    return None
