"""Two processes make a model, and read one back: each reads, draws and holds its own part of that of one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from two_processes import address, start_two

from mgrad_jax import models
from mgrad_jax.data import load_interactions
from mgrad_jax.data.features import MODALITIES
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.run import load_run, train_run

TINY = Path(__file__).parent.parent / "golden" / "tiny"

# Every table counts as large: it stays in its file, and its items are compared in a ring. The first process writes down
# the models that both have; each tells which columns of the files it read, and its share of every array.
PARTS = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from mgrad_jax import devices, models, processes
from mgrad_jax.cli.distributed import Crew, joined
from mgrad_jax.data import features, load_interactions
from mgrad_jax.graph import items
from mgrad_jax.training.run import load_run

address, number, tiny, run, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
features.MAPPED = items.RING_BYTES = 1
models.create = partial(models.create, dtype=jnp.float64)

class InFile:
    def __init__(self, table):
        assert isinstance(table.base.base, np.memmap), type(table.base)
        self.table, self.shape, self.dtype, self.columns = table, table.shape, table.dtype, set()
    def __len__(self):
        return len(self.table)
    def __getitem__(self, index):
        self.columns |= {*range(*index[1].indices(self.shape[1]))} if isinstance(index, tuple) else set()
        return np.asarray(self.table[index])

def told(model, file):
    shares, whole = {}, {}
    for path, x in jax.tree.leaves_with_path(nnx.state(model)):
        name, own = jax.tree_util.keystr(path), [shard.data.size for shard in x.addressable_shards]
        shares[name] = max(own) / x.size, 1.0 if x.is_fully_replicated else sum(own) / x.size
        whole[name] = processes.on_host(x)
    if number == 0:
        np.savez(file, **whole)
    return shares

with joined(Crew(False, address, 2, number)):
    data, mesh = load_interactions(tiny), devices.mesh()
    tables = {name: InFile(table) for name, table in data.features.items()}
    object.__setattr__(data, "features", tables)
    made = told(models.create("freedom", data, mesh=mesh, dropout=0.0), out + "/made.npz")
    read = told(load_run(run, mesh=mesh).model, out + "/read.npz")
    print(json.dumps([{m: sorted(table.columns) for m, table in tables.items()}, made, read]))
"""


def assert_parts(one: nnx.Module, file: Path, shares: dict[str, list[float]]) -> None:
    """What two processes have is the model of one, of whose tables each device has an eighth, each process half."""
    both = np.load(file)
    for path, x in jax.tree.leaves_with_path(nnx.state(one)):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(both[name], x, err_msg=name)
        if x.ndim == 2 and x.shape[0] in (one.n_users, one.n_items):
            assert shares[name] == [1 / 8, 1 / 2], name


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_each_of_two_processes_has_its_part_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "create", partial(models.create, dtype=jnp.float64))
    run = tmp_path / "run"
    train_run(RunConfig("vbpr", str(TINY), epochs=1, out=str(run)))
    common = [address(), str(TINY), str(run), str(tmp_path)]
    arguments = [[common[0], number, *common[1:]] for number in "01"]
    ended = start_two(PARTS, arguments, tmp_path / "cache", devices=4)
    assert [process.code for process in ended] == [0, 0], ended[0].error + ended[1].error
    told = [json.loads(process.out) for process in ended]

    # The first eight columns tell whether rows are zero; every process looks at them.
    for modality, width in zip(MODALITIES, (24, 16), strict=True):
        first, second = ({*process[0][modality]} for process in told)
        assert first == {*range(max(8, width // 2))}
        assert second == {*range(8), *range(width // 2, width)}
    made, read = models.create("freedom", load_interactions(TINY), dropout=0.0), load_run(run).model
    for _, shares_made, shares_read in told:
        assert_parts(made, tmp_path / "made.npz", shares_made)
        assert_parts(read, tmp_path / "read.npz", shares_read)
