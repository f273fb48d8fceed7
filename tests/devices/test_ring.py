"""Nearest items of tables that no device holds whole: those of one device, on any number of devices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from mgrad_jax import models
from mgrad_jax.data import demo_interactions
from mgrad_jax.devices import COLUMNS, ROWS, loaded, mesh, tables_of
from mgrad_jax.errors import UserError
from mgrad_jax.graph import items, knn_indices, ring
from mgrad_jax.training.plan import Sizes, lower
from mgrad_jax.training.settings import FitSettings
from mgrad_jax.training.traffic import ProgramText

K, TILE = 9, 16


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every table count as one that is not brought whole to a device."""
    monkeypatch.setattr(items, "RING_BYTES", 0)


def around(features: np.ndarray, devices: int, k: int = K) -> np.ndarray:
    """The neighbours that so many devices find together."""
    with tables_of(mesh(devices)):
        return np.asarray(knn_indices(loaded([features], features.dtype), k, block=TILE))


def exact(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of norm 2, whose products no order of additions rounds; many of them are equal."""
    table = np.zeros((rows, 8), np.float32)
    for row in table:
        row[rng.choice(5, 4, replace=False)] = rng.choice([-1, 1], 4)
    return table


@pytest.mark.parametrize("n", [2, 8])
def test_ties_go_to_the_lower_index_whatever_device_it_lies_on(n: int, large: None) -> None:
    features = exact(333, np.random.default_rng(0))
    expected = knn_indices(features, K)
    np.testing.assert_array_equal(around(features, n), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dim", [24, 7])  # by columns, and on every device
def test_neighbours_are_those_of_one_device(dim: int, large: None) -> None:
    features = np.random.default_rng(1).normal(size=(150, dim))
    np.testing.assert_array_equal(around(features, 4), knn_indices(features, K))


def test_more_neighbours_than_a_tile_has_rows_come_of_several(large: None) -> None:
    features = exact(40, np.random.default_rng(2))
    np.testing.assert_array_equal(around(features, 2, k=40), knn_indices(features, 40))


def test_products_of_tiles_are_the_same_on_any_number_of_devices(large: None) -> None:
    features = np.random.default_rng(3).normal(size=(200, 40)).astype(np.float32)
    features[100:] = features[:100] * np.float32(1.7)  # the same directions but for the last digit
    np.testing.assert_array_equal(around(features, 2), around(features, 8))


def test_what_has_no_neighbours_is_refused(large: None) -> None:
    features = exact(30, np.random.default_rng(4))
    features[21] = 0
    with pytest.raises(UserError, match="feature row 21 is all zero or not finite"):
        around(features, 2)
    with pytest.raises(UserError, match="knn_k is 31; it must be between 1 and the number of items, 30"):
        around(features, 2, k=31)


def test_small_tables_are_compared_as_on_one_device() -> None:
    features = np.random.default_rng(5).normal(size=(120, 16)).astype(np.float32)
    features[60:] = features[:60] * np.float32(1.7)
    np.testing.assert_array_equal(around(features, 8), knn_indices(features, K, block=TILE))


def test_an_item_graph_made_in_a_ring_is_that_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    data, found = demo_interactions(n_users=60, n_items=40), []
    expected = models.create("freedom", data, dropout=0.0).item_graph.get_value()
    monkeypatch.setattr(items, "RING_BYTES", 0)
    nearest = ring.nearest
    monkeypatch.setattr(ring, "nearest", lambda *arguments: found.append(arguments) or nearest(*arguments))
    graph = models.create("freedom", data, dropout=0.0, mesh=mesh(4)).item_graph.get_value()
    jax.tree.map(np.testing.assert_array_equal, graph, expected)
    assert len(found) == 2


def test_each_device_holds_its_rows_of_a_large_table_and_a_few_tiles() -> None:
    """By compiling for ten times Amazon Electronics: 10 GB of images, of which no device is given more than 1.4."""
    n, dim, over = 630_010, 4096, mesh(8)
    with tables_of(over):
        table = jax.ShapeDtypeStruct((n, dim), jnp.float32, sharding=NamedSharding(over, COLUMNS))
        turning = ring.by_tiles.lower(table, 1024)
        rows = jax.ShapeDtypeStruct(turning.out_info.shape, jnp.float32, sharding=NamedSharding(over, ROWS))
        search = ring.nearest.lower(rows, n, 10, 1024)
        turned, found = (p.compile({"xla_backend_optimization_level": 0}) for p in (turning, search))
    whole, tile = 4 * n * dim, 4 * 1024 * dim
    assert turned.output_shardings.is_equivalent_to(rows.sharding, 2)
    for program, tiles in ((turned, 3), (found, 4)):
        memory = program.memory_analysis()
        assert memory.argument_size_in_bytes <= whole / 8 + 8 * tile
        assert memory.temp_size_in_bytes < tiles * tile
        assert ProgramText(program.as_text(), 8).largest_array() <= rows.shape[0] * dim / 8
    memory = found.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert held < 0.14 * whole
    assert items.knn_bytes(n, dim, jnp.float32, 8) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_plan_knows_what_small_tables_take_while_they_are_compared(devices: int) -> None:
    shape = 20_000, 512
    data = Sizes("made up", 2_000, shape[0], (9_000, 100, 100), {"image": shape[1], "text": 128})
    create = partial(models.create, "freedom", data)
    programs = lower(create, data, optax.adam(1e-3), FitSettings(), mesh(devices))
    with tables_of(mesh(devices)):
        search = items._knn.lower(jax.ShapeDtypeStruct(shape, jnp.float32), 10, items.BLOCK)
    memory = search.compile({"xla_backend_optimization_level": 0}).memory_analysis()
    unit_rows_and_products = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    table = 4 * shape[0] * shape[1]
    assert programs.neighbour_bytes == pytest.approx(table + unit_rows_and_products, rel=0.05)
