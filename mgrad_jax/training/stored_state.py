"""What the directory of one checkpoint holds: orbax's arrays and `run.json`, read with every byte checked."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mgrad_jax.data.digests import digest
from mgrad_jax.files import Damaged, read_mapping, unreadable
from mgrad_jax.training.entries import entries_digest, is_entries_digest

SIDECAR = "run.json"
# A leaf in checkpoints of earlier versions, which had no sidecar.
_FINGERPRINT = "fingerprint"


def is_intact(path: Path) -> bool:
    """Whether a checkpoint holds what was written."""
    try:
        read_leaves(path)
    except Damaged:
        return False
    return True


def write_leaves(path: Path, leaves: Mapping[str, Any]) -> None:
    """Write leaves by name; where they are split over several processes, with all of them, each its own parts."""
    ocp = orbax()
    # Orbax looks for the parts of its one-file format with a pattern in which a path's own [brackets] match nothing,
    # and leaves a checkpoint that nobody can read; there it writes one directory per array instead.
    one_file = glob.escape(str(path)) == str(path)
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=one_file))) as writer:
        writer.save(path, args=ocp.args.PyTreeSave(dict(leaves)))


def read_leaves(path: Path) -> dict[str, np.ndarray]:
    """The leaves of a checkpoint by name.

    Raises:
        Damaged: they are not what was written.
        UserError: they cannot be read now.
    """
    sidecar = read_sidecar(path)
    ocp = orbax()
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    leaves: dict[str, np.ndarray] = {}
    with _told(path), contextlib.closing(_reader(ocp)) as reader:
        # One leaf at a time: where one of several concurrent reads fails, the others complain on the terminal.
        for name in list(reader.metadata(path).item_metadata.keys()):
            leaves[name] = np.asarray(_one(ocp, reader, path, name, as_numpy))
    if sidecar is None:
        intact = np.array_equal(leaves.pop(_FINGERPRINT, np.zeros(0)), fingerprint(leaves))
    else:
        written = sidecar["state"]
        intact = written == (entries_digest if is_entries_digest(written) else digest)(leaves)
    if not intact:
        raise Damaged("its arrays are not those that were written")
    return leaves


def read_parts(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a checkpoint split as in `like`: those of several processes, each of which reads its own parts.

    Whether they are what was written all processes find together, by `entries_digest`.

    What is stored in another shape or type than in `like` is not read, but told as `jax.ShapeDtypeStruct`.

    Raises:
        Damaged, UserError: as `read_leaves`.
    """
    ocp = orbax()
    leaves: dict[str, Any] = {}
    with _told(path), contextlib.closing(_reader(ocp)) as reader:
        for name, stored in reader.metadata(path).item_metadata.items():
            leaf, found = like.get(name), jax.ShapeDtypeStruct(stored.shape, stored.dtype)
            if leaf is None or (leaf.shape, leaf.dtype) != (found.shape, found.dtype):
                leaves[name] = found
                continue
            wanted = ocp.RestoreArgs(restore_type=np.ndarray)
            if isinstance(leaf, jax.Array):
                wanted = ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            leaves[name] = _one(ocp, reader, path, name, wanted)
    return leaves


def _reader(ocp: Any) -> Any:
    """What reads, and waits for no other process."""
    alone = {}
    if jax.process_count() > 1:
        process = jax.process_index()
        alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process_{process}"
        )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**alone), **alone)


def _one(ocp: Any, reader: Any, path: Path, name: str, wanted: Any) -> Any:
    """One leaf."""
    arguments = {"item": {name: 0}, "restore_args": {name: wanted}, "partial_restore": True}
    return reader.restore(path, args=ocp.args.PyTreeRestore(**arguments))[name]


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell what goes wrong with a checkpoint's storage: orbax and that raise whatever they trip over."""
    try:
        _open_storage(path)
        yield
    except MemoryError as error:
        raise unreadable(path, error) from None
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise unreadable(path, MemoryError()) from None
        _check_readable(path)
        raise Damaged("its storage cannot be decoded") from None


def _open_storage(path: Path) -> None:
    """Raise where the storage's own index is damaged: orbax asks it for all leaves at once, and each complains."""
    import tensorstore

    storage = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path.absolute()}/"}}
    tensorstore.KvStore.open(storage).result().list().result()


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The content of `run.json`; None in a checkpoint of an earlier version.

    Raises:
        Damaged, UserError: as `read_leaves`.
    """
    try:
        content = read_mapping(path / SIDECAR, json.loads)
    except FileNotFoundError:
        if not path.is_dir():
            raise Damaged("it is no directory") from None
        return None
    sealed = content.pop("digest", None)
    if content.keys() != {"notes", "state"} or sealed != seal(content):
        raise Damaged(f"{SIDECAR} is not what was written")
    return content


def seal(content: Mapping[str, Any]) -> str:
    """A digest of the content of `run.json`."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_readable(path: Path) -> None:
    """Raise a `UserError` where a file cannot be read: then nothing says that it is damaged."""

    def give_up(error: OSError) -> None:
        raise error

    try:
        for parent, _, names in os.walk(path, onerror=give_up):
            for name in names:
                with (Path(parent) / name).open("rb") as stream:
                    while stream.read(2**20):
                        pass
    except FileNotFoundError:
        return  # what is not there is damage
    except OSError as error:
        raise unreadable(path, error) from None


def orbax() -> Any:
    """Orbax, imported on first use (over a second), its notes silenced: what goes wrong it raises besides."""
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
    import orbax.checkpoint

    return orbax.checkpoint


def fingerprint(leaves: dict[str, np.ndarray]) -> np.ndarray:
    """(2,) uint64, in place of a digest in checkpoints of earlier versions."""
    total = np.zeros(2, np.uint64)
    for name in sorted(leaves):
        data = np.ascontiguousarray(leaves[name]).reshape(-1).view(np.uint8)
        words = data[: data.size // 8 * 8].view(np.uint64)
        rest = data[data.size // 8 * 8 :]
        # Arrays of one element, not scalars: these wrap around without a warning.
        total[:1] ^= np.bitwise_xor.reduce(words, initial=np.uint64(0))
        total[1:] += np.sum(words, dtype=np.uint64, keepdims=True)
        total[1:] += np.sum(rest, dtype=np.uint64, keepdims=True)
    return total
