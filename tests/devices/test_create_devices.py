"""Models made over several devices: each reads and draws what it holds, and they are those of one device."""

import jax
import numpy as np
import pytest
from flax import nnx

from mgrad_jax import models
from mgrad_jax.data import demo_interactions, features
from mgrad_jax.devices import COLUMNS, loaded, mesh, tables_of

DATA = demo_interactions(n_users=60, n_items=40)


SLOW = [pytest.param("freedom", 0, marks=pytest.mark.slow), pytest.param("grcn", 1, marks=pytest.mark.slow)]


# Draws from a normal distribution may differ in the last place; no others do, nor features and graphs.
@pytest.mark.parametrize(("name", "digits"), [("vbpr", 1), ("lightgcn", 0), *SLOW])
def test_a_model_made_over_eight_devices_is_that_of_one(name, digits):
    one, several = (nnx.state(models.create(name, DATA, mesh=m)) for m in (None, mesh(8)))
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(several), strict=True):
        if a.shape[:1] in [(60,), (40,), (100,)] and a.shape[-1] % 8 == 0:
            assert b.sharding.spec == COLUMNS, path
        if np.asarray(a).dtype.kind == "f":
            np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), digits)
        else:
            np.testing.assert_array_equal(a, b)


def test_each_device_has_only_its_own_columns_read():
    read = []

    class Told(np.ndarray):
        def __getitem__(self, index):
            read.append(index)
            return np.asarray(super().__getitem__(index))

    tables = [np.arange(5 * width, dtype=np.float32).reshape(5, width) for width in (6, 10)]
    with tables_of(mesh(4)):
        array = loaded([table.view(Told) for table in tables], np.float32)
    np.testing.assert_array_equal(array, np.concatenate(tables, axis=1))
    assert array.sharding.spec == COLUMNS
    assert max(columns.stop - columns.start for _, columns in read) == 4


def test_a_large_table_of_features_stays_in_its_file(tmp_path, monkeypatch):
    table = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    np.save(tmp_path / "image_feat.npy", table)
    np.save(tmp_path / "text_feat.npy", table.astype(np.float64))
    monkeypatch.setattr(features, "MAPPED", table.nbytes)
    found, converted = (features.read_features(tmp_path / f"{name}_feat.npy", 7) for name in ("image", "text"))
    np.testing.assert_array_equal(found, table)
    np.testing.assert_array_equal(converted, table)
    assert isinstance(found.base, np.memmap)
    assert not found.flags.writeable
    assert converted.base is None or not isinstance(converted.base, np.memmap)


def test_a_large_table_is_checked_like_any_other(tmp_path, monkeypatch):
    table = np.zeros((4, 3), np.float32)
    table[2, 1] = np.nan
    np.save(tmp_path / "image_feat.npy", table)
    monkeypatch.setattr(features, "MAPPED", 1)
    with pytest.raises(features.UserError, match="row 2, column 1 is NaN"):
        features.read_features(tmp_path / "image_feat.npy", 4)
