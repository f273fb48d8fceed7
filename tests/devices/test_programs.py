"""What the compiled programs of several devices hold and send; nothing is run."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mgrad_jax import mirror_gradient, models
from mgrad_jax.cli import main
from mgrad_jax.data import demo_interactions
from mgrad_jax.devices import by_rows, mesh, side_by_side
from mgrad_jax.evaluation.ranking import users_at_a_time
from mgrad_jax.graph.sparse import shapes_only
from mgrad_jax.training.plan import Programs, Sizes, lower
from mgrad_jax.training.settings import FitSettings
from mgrad_jax.training.traffic import ProgramText, Traffic

USERS, ITEMS, PAIRS, BATCH, DIM, DEVICES = 5_003, 3_001, 20_001, 256, 64, 8
WIDTHS = {"image": 512, "text": 128}
DATA = Sizes("made up", USERS, ITEMS, (PAIRS, 2_000, 2_000), WIDTHS)
RING = (DEVICES - 1) / DEVICES  # of the bytes of a result that each device sends in half of an all-reduce

# What each device sends in a pass at most, in numbers: rows of the batch, mapped, and sums over their columns. And the
# numbers that are split: tables and their two moments, features once where they are not trained.
SENT = {"lightgcn": 3 * BATCH, "freedom": 6 * BATCH * (DIM + 1), "vbpr": 9 * BATCH * DIM}
SPLIT = {
    "freedom": 3 * ((USERS + ITEMS) * DIM + 640 * (ITEMS + DIM)),
    "vbpr": 3 * ((2 * USERS + ITEMS) * DIM + 640 * DIM) + 640 * ITEMS,
}
WIDEST = {"lightgcn": USERS * DIM, "freedom": ITEMS * 512, "vbpr": ITEMS * 640}


@functools.cache
def programs_of(name: str, devices: int = DEVICES) -> Programs:
    tx = optax.chain(mirror_gradient(), optax.adam(1e-3))
    return lower(lambda: models.create(name, DATA), DATA, tx, FitSettings(batch_size=BATCH), mesh(devices))


@functools.cache
def compiled(name: str, devices: int = DEVICES) -> jax.stages.Compiled:
    return programs_of(name, devices).train.compile({"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("name", SENT)
def test_a_pass_sends_products_and_sums_of_its_batch_only(name: str) -> None:
    text = ProgramText(compiled(name).as_text(), DEVICES)
    in_a_pass = text.of_loop(programs_of(name).turns)
    assert 0 < in_a_pass.sent <= SENT[name] * RING * 4
    assert in_a_pass.collectives <= 22
    assert text.traffic().sent == programs_of(name).passes * in_a_pass.sent


@pytest.mark.parametrize("name", SENT)
def test_no_device_makes_a_whole_table_in_an_epoch(name: str) -> None:
    largest = ProgramText(compiled(name).as_text(), DEVICES).largest_array()
    assert WIDEST[name] / DEVICES <= largest < WIDEST[name] / 2


@pytest.mark.parametrize("name", SPLIT)
def test_each_device_holds_its_share_of_the_tables_and_all_of_the_rest(name: str) -> None:
    one, several = (compiled(name, n).memory_analysis().argument_size_in_bytes for n in (1, DEVICES))
    rest = one - 4 * SPLIT[name]
    assert 0 < rest < 100 * PAIRS
    assert several == pytest.approx(4 * SPLIT[name] / DEVICES + rest, rel=1e-3)


def test_evaluation_holds_the_items_and_blocks_of_scores_whatever_the_number_of_users() -> None:
    program = programs_of("freedom").evaluate.compile({"xla_backend_optimization_level": 0})
    users_and_layers = 4 * (USERS + ITEMS) * DIM / DEVICES * 4
    block = 4 * users_at_a_time(ITEMS) * ITEMS
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert block < temporaries < 3 * block + 4 * ITEMS * DIM + users_and_layers


def test_a_block_has_fewer_users_above_a_hundred_thousand_items() -> None:
    assert [users_at_a_time(n) for n in (1, 100_000, 200_000, 10**9)] == [512, 512, 256, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_shapes_alone_are_those_of_the_model(name: str) -> None:
    data = demo_interactions(n_users=60, n_items=40)
    real = nnx.state(models.create(name, data))
    with shapes_only(True):
        shapes = nnx.state(nnx.eval_shape(lambda: models.create(name, data)))
    ours, theirs = jax.tree.leaves(shapes), jax.tree.leaves(real)
    assert jax.tree.structure(shapes) == jax.tree.structure(real)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    unlike = [(a.shape, b.shape) for a, b in zip(ours, theirs, strict=True) if a.shape != b.shape]
    # The two modalities' neighbours may be the same items, which only the features tell.
    assert len(unlike) == (4 if name in ("freedom", "dragon") else 0)
    assert all(a == (2 * 40 * 10,) and b < a for a, b in unlike)


def test_a_table_is_mapped_by_rows_without_any_sum_that_is_split() -> None:
    table, kernel = jnp.arange(40.0).reshape(5, 8), jnp.arange(24.0).reshape(8, 3)
    with jax.set_mesh(mesh(4)):
        program = jax.jit(lambda x: by_rows(lambda rows: rows @ kernel, x)).lower(table).compile()
        np.testing.assert_array_equal(program(table), table @ kernel)
    assert "all-reduce(" not in program.as_text()


def test_tables_side_by_side_have_the_same_products() -> None:
    rng = np.random.default_rng(0)
    (a, b), (c, d) = (tuple(jnp.asarray(rng.integers(0, 9, (7, w)), float) for w in (8, 6)) for _ in range(2))

    def products(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> jax.Array:
        return side_by_side(a, b) @ side_by_side(c, d).T

    expected = a @ c.T + b @ d.T
    np.testing.assert_array_equal(products(a, b, c, d), expected)
    with jax.set_mesh(mesh(4)):
        np.testing.assert_array_equal(jax.jit(products)(a, b, c, d), expected)


HLO = """HloModule made_up

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0} all-reduce(%g), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %y = (f32[2]{0}, bf16[2]{0}) all-to-all(%x, %x), replica_groups={{0,1},{2,3}}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
}

%either (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]{1,0}) while(%q), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups={}, dimensions={0}
  %k = f32[8]{0} conditional(%i, %a, %b), branch_computations={%either, %neither}
  ROOT %o = f32[8,4]{1,0} collective-permute(%z), source_target_pairs={{0,1}}
}
"""


def test_the_text_of_a_program_tells_what_each_device_sends() -> None:
    text = ProgramText(HLO, 4)
    in_loop = Traffic(2, 2 * 128 * 3 / 4 + (8 + 4) / 2)
    assert text.of_loop(6) == in_loop
    assert text.of_loop(5) == Traffic(0, 0)
    assert text.traffic().collectives == 6 * 2 + 3
    assert math.isclose(text.traffic().sent, 6 * in_loop.sent + 40 * (4 / 5) * 3 / 4 + 32 / 2 + 128)
    assert text.largest_array() == 32


def test_a_plan_is_shown_and_nothing_is_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--batch-size", "512", "--evaluate", "stale", "--devices", "2", "--plan"]
    assert main(["train", "--model", "lightgcn", "--data", "demo", *options]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "on 2 cpu devices: nothing was trained" in told
    sent = re.search(r"sent in a pass over a batch │ ([\d.]+) kB in (\d+) collectives", told)
    assert sent is not None
    assert (0 < float(sent[1]) < 10, int(sent[2])) == (True, 1)
    assert "sent once an epoch besides │ 0 bytes in 0 collectives" in told
    assert list(tmp_path.iterdir()) == []
