"""A digest of arrays that several processes hold in parts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

# What tells a digest of entries from one of bytes.
_KIND = "entries "


def spans_processes(leaves: Iterable[Any]) -> bool:
    """Whether no process holds all of these arrays."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves)


def entries_digest(leaves: Mapping[str, Any]) -> str:
    """A digest that changes with any name, shape, type or entry, and not with how arrays are split over devices.

    Every entry's bits are mixed with its place, and the results are added: the devices of all processes do that for
    their own parts. All processes make this call.

    >>> entries_digest({"x": np.arange(3.0)}) == entries_digest({"x": np.arange(3.0)[::-1]})
    False
    """
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(leaves):
        leaf = leaves[name]
        total.update(f"\0{name}\0{leaf.dtype}\0{leaf.shape}\0".encode())
        total.update(np.asarray(_sums(leaf)).tobytes())
    return _KIND + total.hexdigest()


def is_entries_digest(text: Any) -> bool:
    """Whether a digest is one of `entries_digest`."""
    return isinstance(text, str) and text.startswith(_KIND)


def _sums(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, NamedSharding)
        return _program_of(leaf.sharding.mesh)(leaf)
    host = np.ascontiguousarray(leaf)  # not as it is: JAX would shorten the numbers of 64 bits that numpy has
    words = host.reshape(-1).view(f"u{min(host.dtype.itemsize, 4)}")
    return _mixed(words.reshape(*leaf.shape, -1))


@functools.cache
def _program_of(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: _mixed(_words(x)), out_shardings=NamedSharding(mesh, P()))


def _words(x: Array) -> Array:
    """The bits of each entry as one number without sign, or two: (..., 1) or (..., 2)."""
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"u{min(x.dtype.itemsize, 4)}")).reshape(*x.shape, -1)


@jax.jit
def _mixed(words: Array) -> UInt32[Array, "2"]:
    """Sums modulo 2 ** 32 of two mixtures of each word with its place."""
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        place = _scattered(place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis))
    words = words.astype(jnp.uint32)
    return jnp.stack([jnp.sum(_scattered(words ^ _scattered(place + lane)), dtype=jnp.uint32) for lane in (1, 2)])


def _scattered(x: Array) -> Array:
    """A permutation of the numbers of 32 bits that leaves no pattern (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
