"""Nearest rows of a table that no device holds whole: its rows are split over devices, tiles of it go round a ring."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrad_jax.devices import AXIS, COLUMNS, ROWS, everywhere, held, mesh_in_force, over_devices

# Similarities and indices of the nearest so far, nearest first.
_Found = tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]


@partial(jax.jit, static_argnums=1)
def by_tiles(table: Float[Array, "n dim"], tile: int) -> Float[Array, "whole_tiles dim"]:
    """A table by rows, of each device of the mesh in force equally many whole tiles; rows of zeros fill up the last.

    Where it is by columns, as tables are, the devices exchange a tile of each at a time.
    """
    mesh, (n, dim) = mesh_in_force(), table.shape
    each = -(-n // (tile * mesh.size))
    if dim % mesh.size:  # it is on every device
        return held(jnp.pad(table, ((0, each * tile * mesh.size - n), (0, 0))), ROWS)

    def own(columns: Array) -> Array:
        def exchanged(number: Array) -> Array:
            starts = (jnp.arange(mesh.size) * each + number) * tile
            rows = columns.at[starts[:, None] + jnp.arange(tile)[None]].get(mode="fill", fill_value=0)
            received: Array = jax.lax.all_to_all(rows, AXIS, 0, 2, tiled=True)
            return received[0]

        tiles: Array = jax.lax.map(exchanged, jnp.arange(each))
        return tiles.reshape(-1, dim)

    return over_devices(mesh, own, (COLUMNS,), ROWS, table)


@jax.jit
def norms(rows: Float[Array, "n dim"]) -> Float[Array, " n"]:
    """The norm of every row, on every device."""
    found: Array = jnp.linalg.norm(rows, axis=1)
    return everywhere(found)


@partial(jax.jit, static_argnums=(1, 2, 3))
def nearest(rows: Float[Array, "whole_tiles dim"], n: int, k: int, tile: int) -> Int[Array, "n k"]:
    """The k nearest rows of every row by cosine similarity, on every device; ties go to the lower index.

    A tile of each device at a time visits all of them, where it meets their own tiles. Products of two tiles are all
    that is computed, so that neighbours do not depend on the number of devices. Each holds its rows, two tiles and
    their product.

    Args:
        rows: from `by_tiles`, none of the first n of them zero.
        n: how many of them count.
        k: neighbours, at most n.
        tile: rows at a time.
    """
    mesh = mesh_in_force()
    neighbours = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]

    def own(rows: Array) -> Array:
        place, tiles = jax.lax.axis_index(AXIS), rows.reshape(-1, tile, rows.shape[1])

        def visit(found: _Found, number: Array) -> tuple[_Found, None]:
            """Let the tile of this number of each device go round."""

            def meet(step: Array, carry: tuple[_Found, Array]) -> tuple[_Found, Array]:
                found, visitor = carry
                ids = ((place - step) % mesh.size * len(tiles) + number) * tile + jnp.arange(tile)
                found = jax.lax.map(lambda own: _nearer(own[1], own[0], visitor, ids, n), (tiles, found))
                return found, jax.lax.ppermute(visitor, AXIS, neighbours)

            return jax.lax.fori_loop(0, mesh.size, meet, (found, _directions(tiles[number])))[0], None

        shape = *tiles.shape[:2], k
        nothing = jnp.full(shape, -jnp.inf, rows.dtype), jnp.full(shape, n, jnp.int32)
        (_, ids), _ = jax.lax.scan(visit, nothing, jnp.arange(len(tiles)))
        return ids.reshape(-1, k)

    return everywhere(over_devices(mesh, own, (ROWS,), ROWS, rows))[:n]


def _nearer(
    found: _Found, tile: Float[Array, "tile dim"], visitor: Float[Array, "other dim"], ids: Int[Array, " other"], n: int
) -> _Found:
    """The nearest of those found and of a visiting tile, whose rows have these indices."""
    similarity = jnp.matmul(_directions(tile), visitor.T, precision=jax.lax.Precision.HIGHEST)
    similarity = jnp.where(ids[None] < n, similarity, -jnp.inf)
    k = found[0].shape[1]
    new, places = jax.lax.top_k(similarity, min(k, len(ids)))
    both = jnp.concatenate([found[0], new], axis=1), jnp.concatenate([found[1], ids.astype(jnp.int32)[places]], axis=1)
    # Tiles come in another order on every device: the lower index is told by itself, not by its place.
    descending, nearest = jax.lax.sort((-both[0], both[1]), dimension=1, num_keys=2)
    return -descending[:, :k], nearest[:, :k]


def _directions(rows: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)  # those that fill up the last tiles stay zero
