"""How much memory a training needs, by its parts, and whether the device has it: before anything is allocated.

The sizes are those of the large arrays that every run of the kind holds at the same time, worked out from the
configuration and the data. They are a little below what a run takes (programs, libraries and small arrays are left
out), so that what fits is never refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.ranking import users_at_a_time
from mgrad_jax.graph.sparse import shapes_only

# What one unrolled layer adds to the compiled program and to the compiler's own memory, in bytes; at the least.
_PROGRAM_OF_A_LAYER = 2**18
# Hyper-parameters that say how many layers there are.
_LAYERS = ("n_layers", "n_ui_layers", "n_mm_layers", "layer_num")
# Hyper-parameters that say how wide tables are.
_WIDTHS = ("embedding_dim", "latent_embedding", "dim_latent")
_FLOAT = 4
_USUAL = {"batch_size": 2048, "ks": 50}


class Part(NamedTuple):
    """One kind of arrays: its bytes, and the settings that they grow with."""

    size: int
    settings: tuple[str, ...]


def estimate(
    model: str,
    config: models.ModelConfig,
    data: Interactions,
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    ks: Sequence[int],
) -> dict[str, Part]:
    """The bytes that one training holds at the same time, by part.

    Args:
        model, config: the model's name and hyper-parameters.
        data: what it trains on; only shapes are looked at.
        tx: the transformation, for the size of its state beside the parameters'.
        batch_size, ks: as in `fit`.

    Returns:
        Parts "parameters" (the model's, the trained, the best epoch's, and a gradient), "optimizer state", "graphs",
        "batch", "layers" and "evaluation".
    """
    own = dataclasses.asdict(config)
    dim, batch = config.embedding_dim, min(batch_size, max(len(data.train), 1))
    widths = {m: data.features[m].shape[1] for m in models.model_class(model).needs if m in data.features}
    parameters = _FLOAT * _parameters(model, own, data, widths)
    nodes = data.n_users + data.n_items
    layers = sum(own.get(name, 0) for name in _LAYERS)
    neighbours = own.get("user_k", 0)
    edges = neighbours * data.n_users + own.get("knn_k", 0) * data.n_items
    # A gathered row for each of a batch's users, positives and negatives, and for each of a user's neighbours.
    rows = batch * dim * max(len(widths), 1) * (3 + neighbours)
    squares = batch * batch if model == "slmrec" else 0
    block = min(users_at_a_time(data.n_items), data.n_users)
    return {
        "parameters": Part(4 * parameters, _WIDTHS),
        "optimizer state": Part(int(_state_ratio(tx) * parameters), _WIDTHS),
        # Per neighbour: its id and its weight in the graph, and both again in the epoch's sample.
        "graphs": Part(4 * _FLOAT * edges + 6 * _FLOAT * len(data.train), ("user_k", "knn_k")),
        "batch": Part(_FLOAT * (rows + squares), ("batch_size", "user_k", *_WIDTHS)),
        "layers": Part(layers * (_PROGRAM_OF_A_LAYER + _FLOAT * nodes * dim), (*_LAYERS, *_WIDTHS)),
        "evaluation": Part(_FLOAT * block * (data.n_items + max(ks)), ("ks",)),
    }


def check_memory(
    parts: Mapping[str, Part], model: str, settings: Mapping[str, Any], available: float | None = None, devices: int = 1
) -> None:
    """Refuse what cannot fit, before it is allocated; shapes alone (`shapes_only`) always do.

    Args:
        parts: from `estimate`.
        model: name of the model.
        settings: its hyper-parameters, `batch_size` and `ks`.
        available: bytes; those of the devices and this process unless given.
        devices: how many share it.

    Raises:
        UserError: more is needed than is available; names both sizes and the setting to lower.
    """
    needed = sum(part.size for part in parts.values())
    available = available_bytes(devices) if available is None else available
    if needed <= available or shapes_only.value:
        return
    name, largest = max(parts.items(), key=lambda item: item[1].size)
    defaults: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(models.model_class(model).config_class)
    } | _USUAL
    values = {name: max(value) if name == "ks" else value for name, value in settings.items()}
    # The setting that is furthest from what is usual is the one that makes the difference.
    setting = max(largest.settings, key=lambda s: values[s] / max(defaults[s], 1) if s in values else -1)
    raise UserError(
        f"{model} needs at least {in_words(needed)} of memory (most of it for {name}: {in_words(largest.size)}), and "
        f"{in_words(available)} are available; lower {setting} (now {values[setting]}), or use a larger machine."
    )


def available_bytes(devices: int = 1) -> float:
    """The bytes that a training may still take on so many devices; infinite where nothing tells.

    Devices of a processor have its memory together, and each of several processes is taken to have as much of its own.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return devices * float(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    processes: int = jax.process_count()
    return processes * min(_free_memory(), _free_addresses(), _free_in_group())


def in_words(size: float) -> str:
    """A number of bytes for a message.

    >>> in_words(3.2e9), in_words(512)
    ('3.2 GB', '512 bytes')
    """
    if size < 1e3:
        return f"{size:.0f} bytes"
    power = min(int(math.log10(size) // 3), 6)
    return f"{size / 1e3**power:.3g} {('kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power - 1]}"


def _parameters(model: str, own: Mapping[str, Any], data: Interactions, widths: Mapping[str, int]) -> int:
    """How many numbers the model's tables and maps hold."""
    users, items = data.n_users, data.n_items
    dim: int = own["embedding_dim"]
    nodes, raw, modalities = users + items, sum(widths.values()), len(widths)
    if model == "vbpr":
        return (2 * users + items) * dim + (raw + 1) * dim
    if model in ("freedom", "bm3"):
        predictor = dim * (dim + 1) if model == "bm3" else 0
        return nodes * dim + raw * (items + dim) + modalities * dim + predictor
    if model in ("dualgnn", "dragon"):
        maps = 4 * dim * (raw + modalities * (dim + 1)) + modalities * dim
        return modalities * users * (dim + 1) + maps + (items * modalities if model == "dualgnn" else 0)
    if model == "grcn":
        latent: int = own["latent_embedding"]
        return nodes * (dim + modalities) + latent * (modalities * users + raw + modalities)
    if model == "mmgcn":
        # The tables are constants unless they are trained; they are there either way.
        latent = own["dim_latent"]
        branches = {name: latent if name == "image" else width for name, width in widths.items()}
        wide = sum(width * width + 2 * width * dim + dim * dim + 2 * dim for width in branches.values())
        narrow = 2 * len(branches) * (4 * dim * dim + 2 * dim)
        image = (widths["image"] + 1) * latent if "image" in widths else 0
        tables = nodes * dim + users * sum(branches.values())
        return wide + narrow + image + (tables if own["train_tables"] else 0)
    if model == "slmrec":
        return nodes * dim + raw * dim + 10 * dim * dim + 8 * dim
    predictor = dim * (dim + 1) if model == "selfcf" else 0
    return nodes * dim + predictor


def _state_ratio(tx: optax.GradientTransformation) -> float:
    """Bytes of the optimizer's state for one byte of parameters."""
    params = {"table": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    # Scalars are nothing beside a table, and a table's state is at least one row long.
    size: int = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.size >= 64)
    return size / (_FLOAT * 64 * 64)


def _free_memory() -> float:
    """What the kernel says it can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return math.inf


def _free_addresses() -> float:
    """What `ulimit -v` leaves."""
    try:
        import resource
    except ImportError:  # there is no such limit on Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    try:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        used = 0
    return float(max(limit - used, 0))


def _free_in_group() -> float:
    """What the control group leaves, as in a container."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("file "))  # given back when needed
    except (OSError, ValueError, StopIteration):  # no group of its own, or no limit ("max")
        return math.inf
    return float(max(limit - used + cached, 0))
