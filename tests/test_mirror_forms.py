"""What Optax asks of a transformation: composition, dtypes, tracing, state, errors."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mgrad_jax
from mgrad_jax import MirrorState, mirror_gradient, mirror_step, mirrored, replay, replayed, second_pass_pending
from mgrad_jax.mirror import MirroredState, pass_schedule, restart_epoch
from mgrad_jax.same_batch import CheckedState

FORMS = {
    "visible": lambda optimizer: optax.chain(mirror_gradient(), optimizer),
    "opaque": mirrored,
    "visible replay": lambda optimizer: optax.chain(replay(), optimizer),
    "opaque replay": replayed,
}
both_forms = pytest.mark.parametrize("form", FORMS)


def quadratic(params, scale=1.0):
    return sum(jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(params)) * scale


def quadratic_grad(params, index=0):
    del index
    return jax.tree.map(lambda leaf: 2 * leaf, params)


def start():
    return {"a": jnp.arange(1.0, 4.0), "b": {"c": jnp.full((2, 2), -0.5, jnp.float32)}}


def train(tx, n, params=None, loss=quadratic):
    params = start() if params is None else params
    state, step = tx.init(params), jax.jit(mirror_step(loss, tx))
    for _ in range(n):
        params, state, value = step(params, state)
    return params, state, value


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


# 1 and 2: documentation and export.


@pytest.mark.parametrize(
    "name",
    [
        *("mirror_gradient", "replay", "mirrored", "replayed", "mirror_step", "second_pass_pending"),
        *("close_batch", "schedule_over_passes", "evaluation_params", "checked", "nnx_step"),
    ],
)
def test_public_functions_are_documented(name):
    text = getattr(mgrad_jax, name).__doc__
    assert name in mgrad_jax.__all__
    assert "\n" not in text.split("\n\n")[0]
    for block in ("Args:", "Returns:", "Examples:", "References:"):
        assert block in text, (name, block)


@pytest.mark.parametrize("state_class", [MirrorState, MirroredState, CheckedState])
def test_state_documents_every_field(state_class):
    for field in state_class._fields:
        assert f"\n    {field}: " in inspect.getdoc(state_class)


# 3: extra arguments.


@both_forms
def test_unknown_extra_arguments_are_ignored_and_known_ones_forwarded(form):
    seen = []

    def update(updates, state, params=None, *, wanted, **extra_args):
        seen.append((wanted, "unknown" in extra_args))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = FORMS[form](optax.chain(inner, optax.sgd(0.1)))
    params = start()
    tx.update(quadratic_grad(params), tx.init(params), params, grad_fn=quadratic_grad, wanted="this", unknown=object())
    assert seen == [("this", True)] * (2 if form.startswith("opaque") else 1)


def test_opaque_form_renews_the_gradient_argument_for_the_second_pass():
    seen = []

    def update(updates, state, params=None, *, grad, **extra_args):
        seen.append(float(grad))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = mirrored(optax.chain(inner, optax.sgd(0.25)))
    params = jnp.asarray(1.0)
    tx.update(2 * params, tx.init(params), params, grad_fn=quadratic_grad, grad=2 * params)
    assert seen == [2.0, 1.0]


# 4: arguments are checked eagerly.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha1": 0.0}, "`alpha1` must be positive"),
        ({"alpha1": -1}, "`alpha1` must be positive"),
        ({"alpha2": float("nan")}, "`alpha2` must be positive and finite, not nan"),
        ({"alpha2": float("inf")}, "`alpha2` must be positive and finite, not inf"),
        ({"alpha2": np.float32(-0.1)}, "`alpha2` must be positive"),
        ({"alpha1": jnp.asarray(-2.0)}, "`alpha1` must be positive"),
        ({"alpha1": "1.0"}, "`alpha1` must be a number, a scalar array or a schedule"),
        ({"alpha1": jnp.ones(3)}, r"`alpha1` has shape \(3,\).*vmap"),
        ({"interval": 0}, "`interval` must be a positive integer, not 0"),
        ({"interval": -3}, "`interval`"),
        ({"interval": 2.0}, "`interval`"),
        ({"interval": True}, "`interval`"),
        ({"interval": None}, "`interval`"),
        ({"interval": jnp.asarray(3)}, "static_args"),
        ({"steps_per_epoch": 0}, "`steps_per_epoch` must be a positive integer, not 0"),
        ({"steps_per_epoch": 1.5}, "`steps_per_epoch`"),
        ({"max_norm": 0.0}, "`max_norm` must be positive"),
        ({"max_norm": lambda count: 1.0}, "`max_norm` must be a number or a scalar array"),
    ],
)
def test_bad_arguments_are_value_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        mirror_gradient(**arguments)
    with pytest.raises(ValueError, match=message):
        mirrored(optax.sgd(0.1), **arguments)
    if not {"alpha1", "alpha2"} & set(arguments):
        with pytest.raises(ValueError, match=message):
            replay(**arguments)
        with pytest.raises(ValueError, match=message):
            replayed(optax.sgd(0.1), **arguments)


def test_ascent_is_a_warning_that_points_at_the_caller():
    with pytest.warns(UserWarning, match="no longer descend") as caught:
        mirror_gradient(0.2, 1.0)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="no longer descend") as caught:
        mirrored(optax.sgd(0.1), 0.2, 1.0)
    assert caught[0].filename == __file__


def test_numpy_integers_are_integers():
    assert int(mirror_gradient(interval=np.int64(4)).init(None).interval) == 4


@pytest.mark.parametrize("wrap", [mirrored, replayed])
def test_opaque_form_says_what_it_lacks(wrap):
    tx, params = wrap(optax.sgd(0.1)), start()
    with pytest.raises(ValueError, match="pass `params`"):
        tx.update(params, tx.init(params), grad_fn=quadratic_grad)
    with pytest.raises(ValueError, match="pass `grad_fn=`"):
        tx.update(params, tx.init(params), params)


def test_visible_form_needs_no_params():
    tx = mirror_gradient(alpha1=0.5)
    updates, _ = tx.update(start(), tx.init(None))
    np.testing.assert_allclose(updates["a"], 0.5 * start()["a"])


# 5: pure, jit, scan; the state is a fixed point.


def avals(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@both_forms
def test_state_is_a_fixed_point_in_a_scan(form):
    tx = FORMS[form](optax.adam(0.1))
    params = start()
    state = tx.init(params)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(quadratic_grad(params), state, params, grad_fn=quadratic_grad)
        return (optax.apply_updates(params, updates), state), second_pass_pending(state)

    (_, last), pending = jax.jit(lambda carry: jax.lax.scan(body, carry, length=7))((params, state))
    assert avals(last) == avals(state)
    expected = [1, 0, 0, 0, 1, 0, 0] if form.startswith("visible") else [0] * 7
    assert pending.astype(int).tolist() == expected


@pytest.mark.parametrize("form", ["visible", "opaque"])
def test_eager_and_jitted_updates_agree(form):
    tx, params = FORMS[form](optax.adam(0.1)), start()
    state = tx.init(params)
    for _ in range(3):
        eager = tx.update(quadratic_grad(params), state, params, grad_fn=quadratic_grad)
        jitted = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=quadratic_grad))(
            quadratic_grad(params), state, params
        )
        assert_close(eager, jitted)
        state = eager[1]


@both_forms
def test_second_call_does_not_compile_again(form):
    traces = []

    def loss(params):
        traces.append(1)
        return quadratic(params)

    tx, params = FORMS[form](optax.adam(0.1)), start()
    step, state = jax.jit(mirror_step(loss, tx)), tx.init(start())
    params, state, _ = step(params, state)
    after_first = len(traces)
    for _ in range(4):
        params, state, _ = step(params, state)
    assert len(traces) == after_first
    assert step._cache_size() == 1


def test_plain_optimizer_traces_no_second_pass():
    traces = []

    def loss(params):
        traces.append(1)
        return quadratic(params)

    tx = optax.adam(0.1)
    jax.jit(mirror_step(loss, tx))(start(), tx.init(start()))
    assert len(traces) == 1
    assert_close(train(tx, 3)[0], train(optax.chain(optax.identity(), tx), 3)[0])


@pytest.mark.parametrize("nest", [lambda tx: tx, lambda tx: optax.apply_if_finite(tx, 5)], ids=["alone", "nested"])
def test_nan_in_one_pass_does_not_spread_through_the_selection(nest):
    """The branch that is not selected may be NaN: a schedule of alpha that is NaN for it, a NaN clip coefficient."""
    tx = nest(mirror_gradient(1.0, lambda count: jnp.nan, max_norm=1.0))
    updates, state = tx.update({"a": jnp.full(2, 3.0)}, tx.init({"a": jnp.ones(2)}))
    np.testing.assert_array_equal(updates["a"], 3.0)
    assert bool(second_pass_pending(state))


@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("outside", [True, False], ids=["visible", "opaque"])
def test_apply_if_finite_contains_a_nan(bad_pass, outside):
    """A NaN in either pass of batch 0 changes nothing for good; the batches after it train."""

    def loss(params, j, key):
        # The key tells the passes apart.
        bad = jnp.all(jax.random.key_data(key) == jax.random.key_data(jax.random.fold_in(base, bad_pass))) & (j == 0)
        return quadratic(params) * jnp.where(bad, jnp.nan, 1.0)

    base = jax.random.key(0)
    if outside:
        tx = optax.apply_if_finite(optax.chain(mirror_gradient(interval=2), optax.adam(0.1)), 10)
    else:
        tx = mirrored(optax.apply_if_finite(optax.adam(0.1), 10), interval=2)
    params, step = start(), jax.jit(mirror_step(loss, tx))
    state = tx.init(params)
    for j in range(3):
        params, state, _ = step(params, state, j, key=base)
        assert not bool(second_pass_pending(state))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, state)))
    assert float(quadratic(params)) < float(quadratic(start()))


def test_refused_second_pass_closes_its_batch():
    """Regression: batch 1 was taken for the second pass of batch 0, whose second gradient was NaN."""

    def loss(params, bad, key):
        first = jnp.all(jax.random.key_data(key) == jax.random.key_data(jax.random.fold_in(base, 0)))
        return jnp.sum(params) * jnp.where(bad & ~first, jnp.nan, 1.0)

    base = jax.random.key(1)
    tx = optax.apply_if_finite(optax.chain(mirror_gradient(interval=3), optax.sgd(1.0)), 10)
    params, step = jnp.zeros(2), jax.jit(mirror_step(loss, tx))
    params, state, _ = step(params, tx.init(params), True, key=base)
    assert params.tolist() == [-1.0, -1.0]
    assert (int(state.inner_state[0].phase), int(state.inner_state[0].count)) == (1, 1)
    params, state, _ = step(params, state, False, key=base)
    assert params.tolist() == [-2.0, -2.0]


# 6: inject_hyperparams; what must be static is declared.


def test_inject_hyperparams_tunes_alpha_between_steps():
    inject = optax.inject_hyperparams(mirror_gradient, static_args=("interval", "steps_per_epoch"))
    tx = inject(alpha1=1.0, alpha2=0.25, interval=1)
    params = jnp.ones(2)
    state, update = tx.init(params), jax.jit(tx.update)
    seen = []
    for alpha2 in (0.25, 0.5):
        state.hyperparams["alpha2"] = jnp.asarray(alpha2)
        for _ in range(2):
            updates, state = update(jnp.ones(2), state, params)
            seen.append(float(updates[0]))
    assert seen == [1.0, -0.25, 1.0, -0.5]
    assert update._cache_size() <= 2  # the first state is weakly typed
    assert not bool(second_pass_pending(state))


def test_inject_hyperparams_names_the_static_arguments():
    tx = optax.inject_hyperparams(mirror_gradient)(alpha1=1.0)
    with pytest.raises(ValueError, match=r'static_args=\("interval", "steps_per_epoch"\)'):
        tx.init(jnp.ones(2))


def test_injected_learning_rate_behind_the_mirror():
    tx = optax.chain(mirror_gradient(), optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
    assert_close(train(tx, 4)[0], train(optax.chain(mirror_gradient(), optax.adam(0.1)), 4)[0], rtol=1e-4)


# 7: dtypes.


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("alpha", [0.5, np.float32(0.5), jnp.asarray(0.5), lambda count: 0.5])
def test_gradients_keep_their_dtypes(x64, alpha, max_norm):
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)
    grads = {str(jnp.dtype(dtype)): jnp.full(2, 3.0, dtype) for dtype in dtypes}
    tx = mirror_gradient(lambda count: 1.0, alpha, interval=1, max_norm=max_norm)
    state = tx.init(grads)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state)
        assert {name: str(leaf.dtype) for name, leaf in updates.items()} == {name: name for name in grads}
    norm = np.sqrt(12 * 1.5**2)
    expected = -1.5 * (1.0 if max_norm is None else max_norm / (norm + 1e-6))
    for leaf in updates.values():
        np.testing.assert_allclose(np.asarray(leaf, complex), expected, rtol=1e-2)


def test_float64_factors_are_exact(x64):
    tx = mirror_gradient(0.7, 0.1, interval=1)
    first, state = tx.update(jnp.asarray(1.0), tx.init(None))
    second, _ = tx.update(jnp.asarray(1.0), state)
    assert (float(first), float(second)) == (0.7, -0.1)


def test_half_precision_norm_does_not_overflow():
    tx = mirror_gradient(1.0, 0.5, interval=2, max_norm=1.0)
    state = tx.init(None)._replace(phase=jnp.asarray(1, jnp.int32))
    updates, _ = tx.update(jnp.full(4, 600.0, jnp.float16), state)
    np.testing.assert_allclose(np.asarray(updates, np.float32), 0.5, rtol=1e-3)


@pytest.mark.parametrize("form", ["visible", "opaque"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_and_counters_keep_their_dtypes(form, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), start())
    params, state, _ = train(FORMS[form](optax.sgd(0.05)), 4, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"int32", "bool"}


def test_counters_stay_int32_under_x64(x64):
    _, state, _ = train(FORMS["visible"](optax.sgd(0.05)), 4)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"int32", "bool"}


@pytest.mark.parametrize("tree", [{}, None, (), optax.MaskedNode(), {"a": None, "b": optax.MaskedNode()}])
def test_empty_trees_pass_through(tree):
    tx = mirror_gradient(max_norm=1.0)
    updates, state = jax.jit(tx.update)(tree, tx.init(tree))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert bool(second_pass_pending(state))


# 8: MultiSteps.


def mini_batches():
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.normal(size=(4, 2, 6)), jnp.float32)  # 4 batches of 2 mini-batches


def row_loss(params, rows):
    return jnp.mean((params["a"].sum() * jnp.tanh(rows) + params["b"]["c"].sum() - rows**2) ** 2)


@pytest.mark.parametrize("form", ["visible", "opaque"])
def test_multi_steps_replay_equals_the_full_batch(form):
    data, params = mini_batches(), start()
    plain = optax.chain(mirror_gradient(interval=2), optax.adam(0.05))
    expected, state = params, plain.init(params)
    step = jax.jit(mirror_step(row_loss, plain))
    for batch in data:
        expected, state, _ = step(expected, state, batch.reshape(-1))

    inner = plain if form == "visible" else mirrored(optax.adam(0.05), interval=2)
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    state = tx.init(params)

    @jax.jit
    def mini_step(params, state, rows, batch):
        grad_fn = lambda p, index: jax.grad(row_loss)(p, batch.reshape(-1))  # noqa: E731
        updates, state = tx.update(jax.grad(row_loss)(params, rows), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, updates

    n_updates = 0
    for batch in data:
        for _ in range(2):
            for k, rows in enumerate(batch):
                params, state, updates = mini_step(params, state, rows, batch)
                moved = any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates))
                assert moved == (k == 1)
            n_updates += 1
            if not second_pass_pending(state):
                break
    assert n_updates == (6 if form == "visible" else 4)
    assert_close(params, expected)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.MultiSteps(optax.chain(mirror_gradient(), optax.sgd(0.1)), 2),
        optax.MultiSteps(mirrored(optax.sgd(0.1)), 2),
        mirrored(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()),
    ],
)
def test_mirror_step_refuses_to_accumulate(optimizer):
    with pytest.raises(ValueError, match=r"MultiSteps.*second_pass_pending"):
        mirror_step(quadratic, optimizer)(start(), optimizer.init(start()))


def test_mirror_step_accumulates_without_a_mirror():
    tx = optax.MultiSteps(optax.sgd(0.1), 2)
    params, _, _ = train(tx, 2)
    np.testing.assert_allclose(params["a"], 0.8 * start()["a"], rtol=1e-6)


# 9: masked and partition.


def test_masked_mirror_scales_its_part_only():
    tx = optax.masked(mirror_gradient(0.5, 0.25, interval=1), {"a": True, "b": {"c": False}})
    state, seen = tx.init(start()), []
    for _ in range(2):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, start()), state, start())
        seen.append((float(updates["a"][0]), float(updates["b"]["c"][0, 0])))
        seen.append(bool(second_pass_pending(state)))
    assert seen == [(0.5, 1.0), True, (-0.25, 1.0), False]


@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
def test_partition_equals_the_parts_trained_by_themselves(combine):
    labels = {"a": "mirrored", "b": "plain"}
    mirrored_part = optax.chain(mirror_gradient(interval=2), optax.adam(0.1))
    tx = combine({"mirrored": mirrored_part, "plain": optax.set_to_zero()}, labels)
    params, state, _ = train(tx, 3)
    alone, _, _ = train(mirrored_part, 3, {"a": start()["a"]})
    assert_close(params, {"a": alone["a"], "b": start()["b"]})
    assert pass_schedule(restart_epoch(state), 4).tolist() == [0, 0, 1, 2, 2, 3]
    assert pass_schedule(state, 4).tolist() == [0, 1, 1, 2, 3, 3]


def test_opaque_form_goes_outside_a_partition():
    labels = {"a": "adam", "b": "frozen"}
    inner = optax.partition({"adam": optax.adam(0.1), "frozen": optax.set_to_zero()}, labels)
    params, _, _ = train(mirrored(inner), 4)
    alone, _, _ = train(mirrored(optax.adam(0.1)), 4, {"a": start()["a"]})
    assert_close(params, {"a": alone["a"], "b": start()["b"]})


@pytest.mark.parametrize(
    "nest",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip(1.0), optax.chain(tx, optax.sgd(0.1))),
        lambda tx: optax.named_chain(("mirror", tx), ("sgd", optax.sgd(0.1))),
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        lambda tx: optax.partition({"x": tx, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.sgd(rate)))(rate=0.1),
    ],
)
def test_second_pass_pending_sees_through_every_wrapper(nest):
    tx = nest(mirror_gradient(interval=2))
    state, pending = tx.init(start()), jax.jit(second_pass_pending)
    seen = []
    for _ in range(4):
        _, state = tx.update(start(), state, start())
        flag = pending(state)
        assert (flag.shape, flag.dtype) == ((), jnp.bool_)
        seen.append(bool(flag))
    assert seen == [True, False, False, True]


def test_second_pass_pending_without_a_mirror():
    assert not bool(second_pass_pending(optax.adam(0.1).init(start())))
    assert not bool(second_pass_pending(()))


# 10: map_params.


@both_forms
def test_map_params_touches_moments_and_no_counter(form):
    tx = FORMS[form](optax.adam(0.1))
    state = tx.init(start())
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1.0, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    changed = [bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (mapped, state)), strict=True)]
    assert sum(changed) == 4  # two moments of two parameters
    assert [leaf.ndim > 0 for leaf in jax.tree.leaves(state)] == changed


# 11: sharding and donation.


@pytest.mark.parametrize("form", ["visible", "opaque"])
def test_buffers_can_be_donated(form):
    tx, params = FORMS[form](optax.adam(0.1)), start()
    step, state = jax.jit(mirror_step(quadratic, tx), donate_argnums=(0, 1)), tx.init(params)
    for _ in range(3):
        given = params
        params, state, _ = step(params, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert_close(params, train(tx, 3)[0])


@both_forms
def test_no_state_leaf_aliases_parameters(form):
    params = start()
    state = FORMS[form](optax.adam(0.1)).init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    "tx",
    [optax.chain(mirror_gradient(interval=2), optax.adam(0.1)), mirrored(optax.adam(0.1), interval=2)],
    ids=["visible", "opaque"],
)
def test_sharded_on_eight_devices(tx):
    def loss(params, x):
        return jnp.mean((x @ params["w"]) ** 2) + jnp.sum(params["w"] ** 2)

    x = jnp.arange(48.0).reshape(3, 16) / 48
    params = {"w": jnp.linspace(-1.0, 1.0, 16)}
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Explicit,))
    assert mesh.size == len(jax.devices()) == 8
    results = []
    for sharding in (None, NamedSharding(mesh, PartitionSpec("i"))):
        p = params if sharding is None else jax.device_put(params, sharding)
        step, state = jax.jit(mirror_step(loss, tx)), tx.init(p)
        with jax.set_mesh(mesh):
            for _ in range(3):
                p, state, _ = step(p, state, x)
        results.append(p["w"])
        if sharding is not None:
            assert p["w"].sharding.is_equivalent_to(sharding, 1), p["w"].sharding
            moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
            assert moments
            assert all(m.sharding.is_equivalent_to(sharding, 1) for m in moments)
    np.testing.assert_allclose(*map(np.asarray, results), rtol=1e-5, atol=1e-6)


# mirror_step.


def test_step_gives_each_pass_its_own_key():
    def loss(params, key):
        return params * jax.random.normal(key)

    tx, key = optax.chain(mirror_gradient(1.0, 0.5, interval=1), optax.sgd(1.0)), jax.random.key(7)
    expected = -(jax.random.normal(jax.random.fold_in(key, 0)) - 0.5 * jax.random.normal(jax.random.fold_in(key, 1)))
    params = jnp.asarray(0.0)
    for optimizer in (tx, mirrored(optax.sgd(1.0), 1.0, 0.5, interval=1)):
        moved, _, _ = jax.jit(mirror_step(loss, optimizer))(params, optimizer.init(params), key=key)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["visible", "opaque"])
def test_step_returns_loss_and_aux_of_the_first_pass(form):
    def loss(params, factor, *, shift):
        value = factor * quadratic(params)
        return value, {"shifted": value + shift}

    tx, params = FORMS[form](optax.sgd(0.1)), start()
    step = jax.jit(mirror_step(loss, tx, has_aux=True))
    _, _, (value, aux) = step(params, tx.init(params), 2.0, shift=1.0)
    np.testing.assert_allclose([value, aux["shifted"]], [30.0, 31.0], rtol=1e-6)
    without_aux = jax.jit(mirror_step(lambda *args, **kwargs: loss(*args, **kwargs)[0], tx))
    assert_close(
        without_aux(params, tx.init(params), 2.0, shift=1.0)[:2], step(params, tx.init(params), 2.0, shift=1.0)[:2]
    )


def test_step_drives_optax_sam():
    sam = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), opaque_mode=True)
    params, state = start(), sam.init(start())
    grads = quadratic_grad(params)
    updates, _ = sam.update(grads, state, params, grad_fn=quadratic_grad)
    assert_close(train(sam, 1)[0], optax.apply_updates(params, updates))


def test_one_grad_fn_serves_sam_and_the_opaque_form():
    seen = []

    def grad_fn(params, index):
        seen.append(index)
        return quadratic_grad(params)

    params = start()
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True)
    for tx in (sam, mirrored(optax.sgd(0.1))):
        tx.update(grad_fn(params, None), tx.init(params), params, grad_fn=grad_fn)
    assert seen == [None, 0, None, 0]


def test_step_hands_value_to_the_optimizer():
    tx = optax.chain(mirror_gradient(), optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    params, state, value = train(tx, 4)
    assert bool(jnp.isfinite(state[-1].best_value))
    assert float(quadratic(params)) < float(value)


def test_step_vmaps_over_members():
    members = {"a": jnp.stack([start()["a"], 2 * start()["a"]])}
    tx = optax.chain(mirror_gradient(interval=2), optax.adam(0.1))
    step = jax.jit(jax.vmap(mirror_step(quadratic, tx)))
    params, state = members, jax.vmap(tx.init)(members)
    for _ in range(3):
        params, state, _ = step(params, state)
    for n in range(2):
        alone, _, _ = train(tx, 3, jax.tree.map(lambda leaf, n=n: leaf[n], members))
        assert_close(jax.tree.map(lambda leaf, n=n: leaf[n], params), alone)


def test_states_of_flax_nnx_are_understood():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(mirror_gradient(interval=2), optax.sgd(0.1)), wrt=nnx.Param)
    seen = []
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(jnp.ones((1, 2))) ** 2))(model))
        seen.append(bool(second_pass_pending(optimizer.opt_state)))
    assert seen == [True, False, False]
    assert pass_schedule(optimizer.opt_state, 3).tolist() == [0, 0, 1, 2, 2]
