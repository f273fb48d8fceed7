"""Lanes side by side: their arrays under one leading axis, on one device or on several, each with lanes of its own.

On several devices all hold equally many lanes, in order. Lanes never meet, so their programs send nothing; only where
lanes are left behind do some of the others move to another device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mgrad_jax.devices import BLOCKS, WHOLE, over_devices

_Tree = TypeVar("_Tree")


def by_device(function: Callable[..., Any], mesh: Mesh, each: int) -> Callable[..., Any]:
    """A program of three arguments with lanes and two that lanes share, for the lanes of every device.

    It is made of the program of one device with `each` lanes; one lane alone has no leading axis there.
    """

    # The axis that otherwise counts columns counts lanes here. In here it is no longer in force
    # (`devices.mesh_in_force`): what each device does is the program of one device.
    def own(*operands: Any) -> Any:
        if each > 1:
            return function(*operands)
        alone = jax.tree.map(lambda x: x[0], operands[:3])
        return jax.tree.map(lambda x: x[None], function(*alone, *operands[3:]))

    return partial(over_devices, mesh, own, (BLOCKS, BLOCKS, BLOCKS, WHOLE, WHOLE), BLOCKS)


def spread(tree: _Tree, mesh: Mesh | None) -> _Tree:
    """Arrays with an axis of lanes on the devices of their lanes; as they are on one device."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, BLOCKS))


def stack(members: Iterable[_Tree], width: int, mesh: Mesh | None) -> _Tree:
    """As many members as there are lanes; one alone on one device has no leading axis.

    They are taken one by one, and of several devices each holds its own only.
    """
    members = iter(members)
    if mesh is None:
        return next(members) if width == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    each = width // mesh.size
    parts: list[_Tree] = [
        _stack([jax.device_put(member, device) for member in itertools.islice(members, each)])
        for device in mesh.devices.flat
    ]
    return _join(parts, mesh)


def put(stacked: _Tree, member: _Tree, lane: int, mesh: Mesh | None) -> _Tree:
    """The lanes with another member in one of them, or that alone where there is no other lane."""
    if mesh is None:
        replaced: _Tree = _put(stacked, member, lane)
        return replaced
    parts = _parts(stacked, mesh)
    device, place = divmod(lane, _length(parts[0]))
    parts[device] = _put(parts[device], jax.device_put(member, mesh.devices.flat[device]), place)
    return _join(parts, mesh)


def take(stacked: _Tree, lanes: Sequence[int], mesh: Mesh | None) -> _Tree:
    """Some of the lanes, as many for every device."""
    if mesh is None:
        index = np.asarray(lanes) if len(lanes) > 1 else lanes[0]
        taken: _Tree = jax.tree.map(lambda x: x[index], stacked)
        return taken
    parts = _parts(stacked, mesh)
    places = (divmod(lane, _length(parts[0])) for lane in lanes)
    members: Iterator[_Tree] = (_take(parts[device], place) for device, place in places)
    return stack(members, len(lanes), mesh)


def _parts(stacked: _Tree, mesh: Mesh) -> list[_Tree]:
    """Every device's own lanes, on it."""
    leaves, structure = jax.tree.flatten(stacked)
    shards = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
    return [jax.tree.unflatten(structure, [own[device] for own in shards]) for device in mesh.devices.flat]


def _join(parts: Sequence[_Tree], mesh: Mesh) -> _Tree:
    """The opposite of `_parts`; nothing is copied."""

    def joined(*shards: jax.Array) -> jax.Array:
        shape = (len(shards) * shards[0].shape[0], *shards[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, BLOCKS), shards)

    whole: _Tree = jax.tree.map(joined, *parts)
    return whole


def _length(part: Any) -> int:
    return int(jax.tree.leaves(part)[0].shape[0])


# As one program for a whole tree: of its many small arrays each would else be compiled for every device.


@jax.jit
def _stack(members: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


@jax.jit
def _put(stacked: Any, member: Any, lane: int) -> Any:
    return jax.tree.map(lambda full, new: full.at[lane].set(new), stacked, member)


@jax.jit
def _take(stacked: Any, lane: int) -> Any:
    return jax.tree.map(lambda x: x[lane], stacked)
