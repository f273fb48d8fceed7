"""Which arrays are split over devices, and how many devices there are."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mgrad_jax import devices, models
from mgrad_jax.data import load_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training.fit import layout_of

USERS, ITEMS, DIM, FEATURES = 30, 20, 8, 12


def layout(n: int, *, in_pass: str = "columns", **tables: tuple[int, ...]) -> devices.Layout:
    shapes = {"users": (USERS, DIM), "items": (ITEMS, DIM), "features": (ITEMS, FEATURES), **tables}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return devices.Layout.of(devices.mesh(n), (USERS, ITEMS, USERS + ITEMS), arrays, in_pass)


def stored(found: devices.Layout, shape: tuple[int, ...], dtype=jnp.float32) -> P:
    return found.shardings(jax.ShapeDtypeStruct(shape, dtype)).spec


def test_tables_are_split_by_columns_and_what_maps_their_width_by_rows():
    found = layout(4)
    assert [stored(found, (rows, DIM)) for rows in (USERS, ITEMS, USERS + ITEMS)] == [devices.COLUMNS] * 3
    assert stored(found, (ITEMS, FEATURES)) == devices.COLUMNS
    assert stored(found, (FEATURES, DIM)) == devices.ROWS
    assert stored(found, (ITEMS, 3, DIM)) == P(None, None, "shards")


def test_everything_else_is_on_every_device():
    found = layout(4)
    assert [stored(found, shape) for shape in ((), (USERS,), (DIM,), (5, 5), (ITEMS, 2))] == [devices.WHOLE] * 5
    assert stored(found, (USERS, DIM), jnp.int32) == devices.WHOLE


def test_a_model_by_rows_keeps_its_tables_by_rows_in_a_pass_and_its_maps_whole():
    found = layout(4, in_pass="rows")
    assert stored(found, (USERS, DIM)) == devices.COLUMNS
    assert stored(found, (FEATURES, DIM)) == devices.WHOLE
    with found.in_force():
        held = jax.jit(found.hold)(jnp.ones((USERS + 2, DIM)))
        assert held.sharding.is_equivalent_to(jax.NamedSharding(found.mesh, devices.WHOLE), 2)
        turned = jax.jit(found.hold)(jnp.ones((ITEMS, DIM)))
        assert turned.sharding.is_equivalent_to(jax.NamedSharding(found.mesh, devices.ROWS), 2)


def test_the_moments_of_a_table_follow_it():
    found = layout(2)
    adam = {"mu": jnp.ones((USERS, DIM)), "nu": jnp.ones((USERS, DIM)), "count": jnp.zeros((), jnp.int32)}
    placed = found.place(adam)
    assert {name: x.sharding.spec for name, x in placed.items()} == {
        "mu": devices.COLUMNS,
        "nu": devices.COLUMNS,
        "count": devices.WHOLE,
    }
    assert placed["mu"].addressable_shards[0].data.shape == (USERS, DIM // 2)


def test_a_width_that_the_devices_do_not_divide_is_kept_whole_and_told():
    found = layout(8)
    assert stored(found, (ITEMS, FEATURES)) == devices.WHOLE
    assert stored(found, (FEATURES, DIM)) == devices.WHOLE
    assert found.whole_tables({"features": jnp.ones((ITEMS, FEATURES)), "narrow": jnp.ones((USERS, 2))}) == [FEATURES]


def test_devices_that_can_share_nothing_are_refused():
    with pytest.raises(UserError, match=r"5 devices cannot share tables of width 8, 12; .* such as 4"):
        layout(5)


def test_what_stays_whole_is_told():
    data = load_interactions("demo")
    model = models.create("vbpr", data, embedding_dim=20)
    with pytest.warns(UserWarning, match=r"tables of width 20 are kept whole on each of 8 devices"):
        assert layout_of(model, devices.mesh(8)) is not None
    assert layout_of(model, devices.mesh(1)) is None
    assert layout_of(model, None) is None


@pytest.mark.parametrize("n", [0, 9])
def test_more_devices_than_there_are_is_refused(n):
    with pytest.raises(UserError, match=rf"{n} devices were asked for, and there are 8 cpu devices"):
        devices.mesh(n)


def test_all_are_as_many_as_there_are():
    assert devices.mesh("all").size == len(jax.devices()) == 8
    assert devices.parse_devices("all") == "all"


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "²", "many"])
def test_a_number_of_devices_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--devices is"):
        devices.parse_devices(text)


def test_a_mesh_is_in_force_where_it_has_several_devices_in_automatic_mode():
    assert devices.mesh_in_force() is None
    with jax.set_mesh(devices.mesh(1)):
        assert devices.mesh_in_force() is None
    with jax.set_mesh(devices.mesh(2)):
        assert devices.mesh_in_force().size == 2
    with jax.set_mesh(jax.make_mesh((2,), ("others",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert devices.mesh_in_force() is None
    inside = []
    with jax.set_mesh(devices.mesh(2)):
        mesh = devices.mesh_in_force()
        jax.eval_shape(
            lambda x: devices.over_devices(
                mesh, lambda x: inside.append(devices.mesh_in_force()) or x, devices.ROWS, devices.ROWS, x
            ),
            jnp.ones((4, 2)),
        )
    assert inside == [None]
