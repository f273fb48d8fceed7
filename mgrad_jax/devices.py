"""Several devices: which arrays are split over them, and how.

Tables with a row per user, item or node are split by columns over the one axis of a mesh. Columns never meet in the
product of a graph with a table, in gathers of rows or in an optimizer's update, so none of these sends anything; what
travels in a step are sums over columns. Everything else (graphs, training pairs, batches) is on every device alike.
The mesh's axis is in JAX's automatic mode: programs read as for one device, and XLA adds what has to be sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mgrad_jax.errors import UserError, shown

AXIS = "shards"
COLUMNS, ROWS, BLOCKS, WHOLE = P(None, AXIS), P(AXIS, None), P(AXIS), P()

_Tree = TypeVar("_Tree")
_Result = TypeVar("_Result")

# Whether tables are by rows within a pass, as in models that map whole tables of features.
tables_by_rows = jax.make_user_context(False)


def mesh(devices: int | Literal["all"] = "all", platform: str | None = None) -> Mesh:
    """A mesh over so many devices, of all processes alike where there are several.

    Args:
        devices: how many.
        platform: such as "cpu"; by default that which JAX computes on.

    Raises:
        UserError: there are fewer, or processes would have unequally many.

    >>> mesh(1).size
    1
    """
    found = jax.devices(platform)
    n = len(found) if devices == "all" else devices
    if not 1 <= n <= len(found):
        platform = found[0].platform
        there = f"is one {platform} device" if len(found) == 1 else f"are {len(found)} {platform} devices"
        virtual = f", or set JAX_NUM_CPU_DEVICES={n} to try it on a processor" if platform == "cpu" else ""
        raise UserError(f"{n} devices were asked for, and there {there}; ask for at most as many{virtual}.")
    processes = jax.process_count()
    if n % processes:
        raise UserError(f"{n} devices cannot be shared evenly by {processes} processes; ask for a multiple, or all.")
    chosen = [device for process in range(processes) for device in _of_process(found, process, n // processes)]
    return jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def mesh_or_none(devices: int | Literal["all"], by_itself: bool = True) -> Mesh | None:
    """`mesh(devices)`; None for one device of a process that computes by itself."""
    return None if devices == 1 and by_itself else mesh(devices)


def _of_process(devices: list[Any], process: int, share: int) -> list[Any]:
    """The first devices of a process."""
    own = [device for device in devices if device.process_index == process]
    if len(own) < share:
        raise UserError(
            f"process {process} has {len(own)} devices and was to give {share}; let all processes have equally many."
        )
    return own[:share]


def parse_devices(text: str) -> int | Literal["all"]:
    """How many devices an option asks for, at least 1, or "all".

    Raises:
        UserError: it is neither.

    >>> parse_devices("8")
    8
    """
    if text == "all":
        return "all"
    if text.isascii() and text.isdigit() and int(text) >= 1:
        return int(text)
    raise UserError(f"--devices is {shown(text)}; give how many to train on, a number from 1, or all.")


def mesh_in_force() -> Any:
    """The mesh over whose devices a program is traced, as JAX knows it abstractly; None on one device."""
    found = jax.sharding.get_abstract_mesh()
    is_ours = AXIS in found.axis_names and found.shape[AXIS] > 1
    return found if is_ours and found.axis_types[found.axis_names.index(AXIS)] == AxisType.Auto else None


def over_devices(mesh: Any, function: Callable[..., _Result], in_specs: Any, out_specs: Any, *operands: Any) -> _Result:
    """Each device's own part of a computation, by `jax.shard_map`."""
    # Without the check of which results vary: it refuses kernels chosen by platform, some of which vary.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)


def put(tree: _Tree, shardings: Any) -> _Tree:
    """Put arrays where they belong, and tell shapes; each of several processes takes its part of what all have."""
    is_shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))
    if not is_shapes and all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        placed: _Tree = jax.device_put(tree, shardings)
    else:
        placed = jax.tree.map(_put_part, tree, shardings)
    return placed


def _put_part(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(sharding=sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    # Not by `jax.device_put`, which sends whole arrays round to compare them.
    source = x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: source[index])


def padded_columns(x: Float[Array, "rows dim"], n: int) -> Float[Array, "rows wider"]:
    """Columns of zeros added until n devices have equally many."""
    missing = -x.shape[1] % n
    return jnp.pad(x, ((0, 0), (0, missing))) if missing else x


def held_by_rows(x: _Tree) -> _Tree:
    """Tables of a model that keeps them by rows within a pass, kept so; other models' as they are."""
    return held(x, ROWS) if tables_by_rows.value else x


def turned_to_columns(x: _Tree) -> _Tree:
    """The same tables by columns, where what comes next needs no exchange then: propagation, rows of a batch."""
    return held(x, COLUMNS) if tables_by_rows.value else x


def by_rows(function: Callable[[Array], Array], table: Float[Array, "rows dim"]) -> Float[Array, "rows mapped"]:
    """`function(table)`, which maps every row of a whole table by itself: of each of several devices, some rows.

    By columns each device would make a part of every sum, an array as large as the whole result.
    """
    return held(function(held(table, ROWS)), ROWS)


def side_by_side(*tables: Float[Array, "rows _"]) -> Float[Array, "rows all"]:
    """Tables as one, for products with rows of others that are put side by side alike.

    Each of several devices puts its own columns side by side and sends nothing. The columns stand in another order
    then, with some of zeros where their number does not divide a width, and products are sums in another order.
    """
    mesh = mesh_in_force()
    if mesh is None:
        return jnp.concatenate(tables, axis=1)
    wide = [padded_columns(table, mesh.size) for table in tables]

    def own(*tables: Array) -> Array:
        return jnp.concatenate(tables, axis=1)

    return over_devices(mesh, own, tuple(COLUMNS for _ in wide), COLUMNS, *wide)


def held(tree: _Tree, spec: P) -> _Tree:
    """Arrays split so over the mesh in force, if there is one."""
    return tree if mesh_in_force() is None else jax.lax.with_sharding_constraint(tree, spec)


def everywhere(tree: _Tree) -> _Tree:
    """Arrays computed alike on every device, where there are several."""
    return held(tree, WHOLE)


def tables_of(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """While a model is made: its tables are read and drawn by columns, each device's own; the rest is on all of them.

    Where the devices are those of several processes, all of these make the model, of equal data.
    """
    return nullcontext() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh)


def _by_columns(width: int) -> NamedSharding | None:
    """Where the columns of a table that is made now belong; None where it is made whole."""
    if mesh_in_force() is None or width % (mesh := jax.sharding.get_mesh()).size:
        return None
    return NamedSharding(mesh, COLUMNS)


def loaded(tables: Sequence[np.ndarray], dtype: Any) -> Float[Array, "rows all"]:
    """Tables (rows, _) of the host, side by side; each of several devices has the columns read that it holds."""
    shape = tables[0].shape[0], sum(table.shape[1] for table in tables)
    if (place := _by_columns(shape[1])) is None:
        whole = [jnp.asarray(table, dtype) for table in tables]
        return whole[0] if len(whole) == 1 else jnp.concatenate(whole, axis=1)

    def part(index: Any) -> np.ndarray:
        first, end, _ = index[1].indices(shape[1])
        pieces, before = [], 0
        for table in tables:
            pieces.append(table[index[0], max(first - before, 0) : max(end - before, 0)])
            before += table.shape[1]
        return np.concatenate(pieces, axis=1, dtype=dtype, casting="unsafe")

    return jax.make_array_from_callback(shape, place, part)


def drawn(draw: Callable[[Array], Array], key: Array, width: int) -> Float[Array, "rows width"]:
    """`draw(key)`, a table of this width; each of several devices draws the columns that it holds."""
    place = _by_columns(width)
    return draw(key) if place is None else jax.jit(draw, out_shardings=place)(key)


@dataclass(frozen=True)
class Layout:
    """What of a training is split over a mesh, told from shapes alone, so that an optimizer's moments follow.

    Attributes:
        mesh: with the axis `AXIS`.
        rows: how many rows tables have: users, items, nodes.
        widths: of the tables that are split; a matrix that maps such a width is split by its rows.
        by_rows: whether tables are turned to rows within an epoch.
    """

    mesh: Mesh
    rows: frozenset[int]
    widths: frozenset[int]
    by_rows: bool

    @classmethod
    def of(cls, mesh: Mesh, rows: Iterable[int], tables: Any, in_pass: str) -> Layout:
        """The layout for tables with these numbers of rows.

        Args:
            mesh: from `mesh`.
            rows: numbers of users, of items, and of both.
            tables: a pytree with the model's arrays.
            in_pass: "columns" or "rows", see `Recommender.tables_in_pass`.

        Raises:
            UserError: no table can be split over so many devices.
        """
        layout = cls(mesh, frozenset(rows), frozenset(), in_pass == "rows")
        widths = layout._widths_of(tables)
        split = frozenset(width for width in widths if width % mesh.size == 0)
        if widths and not split:
            most = math.gcd(*widths)
            raise UserError(
                f"{mesh.size} devices cannot share tables of width {', '.join(map(str, sorted(widths)))}; choose a "
                f"number of devices that divides one of them, such as {most}, or other widths."
            )
        return cls(mesh, layout.rows, split, layout.by_rows)

    def whole_tables(self, tables: Any) -> list[int]:
        """Widths of the tables that are on every device because the number of devices does not divide them.

        A table that is narrower than that is small, and not among them.
        """
        return sorted(width for width in self._widths_of(tables) - self.widths if width > self.mesh.size)

    def place(self, tree: _Tree) -> _Tree:
        """Put arrays where they belong; shapes are told where that is."""
        return put(tree, self.shardings(tree))

    def shardings(self, tree: Any) -> Any:
        """Where every array belongs between epochs."""
        return jax.tree.map(lambda x: NamedSharding(self.mesh, self._stored(x)), tree)

    def hold(self, tree: _Tree) -> _Tree:
        """Keep arrays as they are split within a pass; inside a program."""
        held: _Tree = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self._in_pass(x)), tree)
        return held

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Trace for this layout."""
        with jax.set_mesh(self.mesh), tables_by_rows(self.by_rows):
            yield

    def _widths_of(self, tables: Any) -> set[int]:
        return {x.shape[-1] for x in jax.tree.leaves(tables) if self._is_table(x)}

    def _is_table(self, x: Any) -> bool:
        return x.ndim >= 2 and x.shape[0] in self.rows and jnp.issubdtype(x.dtype, jnp.floating)

    def _stored(self, x: Any) -> P:
        if self._is_table(x):
            return P(*[None] * (x.ndim - 1), AXIS) if x.shape[-1] in self.widths else WHOLE
        is_map = not self.by_rows and x.ndim == 2 and x.shape[0] in self.widths
        return ROWS if is_map and jnp.issubdtype(x.dtype, jnp.floating) else WHOLE

    def _in_pass(self, x: Any) -> P:
        if self.by_rows and self._is_table(x):
            return P(AXIS, *[None] * (x.ndim - 1))
        return self._stored(x)


def hold_of(layout: Layout | None) -> Callable[[_Tree], _Tree]:
    """`layout.hold`, and on one device nothing."""
    return (lambda tree: tree) if layout is None else layout.hold


def in_force(layout: Layout | None) -> AbstractContextManager[Any]:
    """`layout.in_force()`, and on one device nothing."""
    return nullcontext() if layout is None else layout.in_force()
