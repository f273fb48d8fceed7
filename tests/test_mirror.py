"""The algorithm: Mirror Gradient equals the published loop and satisfies its identities."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgrad_jax import mirror_gradient, mirror_step, mirrored, replay, replayed, second_pass_pending
from mgrad_jax.mirror import MirrorState, pass_schedule, restart_epoch

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "adam": lambda: optax.adam(0.03),
    "adamw": lambda: optax.adamw(0.03, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(0.01, decay=0.99),
    "adagrad": lambda: optax.adagrad(0.05),
}


def loss_fn(params, x, y):
    """A smooth, non-quadratic loss over a nested tree."""
    hidden = jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"][None])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def start():
    rng = np.random.default_rng(0)
    return {
        "layer": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "bias": jnp.full(4, 0.1)},
        "out": jnp.asarray(rng.normal(size=4), jnp.float32),
    }


def batches(n):
    rng = np.random.default_rng(1)
    return [
        (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), jnp.asarray(rng.normal(size=5), jnp.float32))
        for _ in range(n)
    ]


grad_loss = jax.jit(jax.grad(loss_fn))


def published_loop(optimizer, params, data, factors, beta, epoch_length, max_norm=None):
    """Algorithm 1, written down as the paper has it: no state of ours, numbering by the loop."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for t, batch in enumerate(data):
        scales = factors if (t % epoch_length) % beta == 0 else (1.0,)
        for n, scale in enumerate(scales):
            grads = jax.tree.map(lambda g, scale=scale: scale * g, grad_loss(params, *batch))
            if max_norm is not None and n == len(scales) - 1:
                norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
                grads = jax.tree.map(lambda g, norm=norm: g * min(1.0, max_norm / (norm + 1e-6)), grads)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return params


def run_visible(tx, params, data):
    state = tx.init(params)
    step = jax.jit(mirror_step(loss_fn, tx))
    for batch in data:
        params, state, _ = step(params, state, *batch)
    return params


def run_opaque(tx, params, data):
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        def grad_fn(params, index):
            del index
            return jax.grad(loss_fn)(params, *batch)

        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    for batch in data:
        params, state = step(params, state, batch)
    return params


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


# Epochs of 4 batches with beta = 3: the number of batches is no multiple of the interval.


@functools.cache
def published_epochs(name):
    """Two such epochs, for both forms."""
    return published_loop(OPTIMIZERS[name](), start(), batches(8), (1.0, -0.2), beta=3, epoch_length=4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_visible_form_equals_published_loop(name):
    tx = optax.chain(mirror_gradient(1.0, 0.2, 3, steps_per_epoch=4), OPTIMIZERS[name]())
    assert_close(run_visible(tx, start(), batches(8)), published_epochs(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_opaque_form_equals_published_loop(name):
    tx = mirrored(OPTIMIZERS[name](), 1.0, 0.2, 3, steps_per_epoch=4)
    assert_close(run_opaque(tx, start(), batches(8)), published_epochs(name))


@pytest.mark.parametrize("form", ["visible", "opaque"])
def test_replay_equals_repeating_the_batch(form):
    data, optimizer = batches(5), optax.adam(0.03)
    expected = published_loop(optimizer, start(), data, (1.0, 1.0), beta=3, epoch_length=5)
    if form == "visible":
        actual = run_visible(optax.chain(replay(3), optimizer), start(), data)
    else:
        actual = run_opaque(replayed(optimizer, 3), start(), data)
    assert_close(actual, expected)


def test_opaque_form_runs_through_mirror_step():
    data = batches(5)
    expected = run_visible(optax.chain(mirror_gradient(), optax.adam(0.03)), start(), data)
    assert_close(run_visible(mirrored(optax.adam(0.03)), start(), data), expected)


@pytest.mark.parametrize("form", ["visible", "opaque"])
def test_clips_before_the_last_update_of_a_batch_only(form):
    data, optimizer, max_norm = batches(4), optax.sgd(0.5), 0.05
    expected = published_loop(optimizer, start(), data, (1.0, -0.2), beta=2, epoch_length=4, max_norm=max_norm)
    unclipped = published_loop(optimizer, start(), data, (1.0, -0.2), beta=2, epoch_length=4)
    assert not np.allclose(expected["out"], unclipped["out"], atol=1e-3)
    if form == "visible":
        actual = run_visible(optax.chain(mirror_gradient(interval=2, max_norm=max_norm), optimizer), start(), data)
    else:
        actual = run_opaque(mirrored(optimizer, interval=2, max_norm=max_norm), start(), data)
    assert_close(actual, expected)


def test_sgd_closed_form(x64):
    """On 0.5 k x^2 a mirror batch multiplies x by (1 - eta a1 k)(1 + eta a2 k), a normal one by 1 - eta k."""
    eta, alpha1, alpha2, curvatures = 0.1, 0.9, 0.3, [2.0, 3.0, 5.0, 7.0]
    tx = optax.chain(mirror_gradient(alpha1, alpha2, interval=2), optax.sgd(eta))
    step = jax.jit(mirror_step(lambda x, k: 0.5 * k * x**2, tx))
    x = jnp.asarray(1.5)
    state, expected = tx.init(x), 1.5
    for j, k in enumerate(curvatures):
        x, state, _ = step(x, state, k)
        expected *= (1 - eta * alpha1 * k) * (1 + eta * alpha2 * k) if j % 2 == 0 else 1 - eta * k
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, expected, rtol=1e-14)


def smooth(theta):
    return jnp.sum(jnp.sin(theta) * jnp.roll(theta, 1) ** 2) + jnp.sum(jnp.exp(0.3 * theta))


@pytest.mark.parametrize(("alpha1", "alpha2"), [(1.0, 0.2), (0.6, 0.5)])
def test_taylor_identity_of_theorem_3_2(x64, alpha1, alpha2):
    """theta'' = theta - eta grad[(a1 - a2) L + eta a1 a2 / 2 |grad L|^2] + O(eta^3)."""
    theta = jnp.asarray([0.3, -0.7, 1.1, 0.4])

    def residual(eta):
        tx = mirrored(optax.sgd(eta), alpha1, alpha2)
        grad_fn = lambda p, index: jax.grad(smooth)(p)  # noqa: E731
        update, _ = tx.update(grad_fn(theta, 0), tx.init(theta), theta, grad_fn=grad_fn)

        def objective(p):
            return (alpha1 - alpha2) * smooth(p) + 0.5 * eta * alpha1 * alpha2 * jnp.sum(jax.grad(smooth)(p) ** 2)

        return float(jnp.linalg.norm(update + eta * jax.grad(objective)(theta)))

    orders = [np.log2(residual(eta) / residual(eta / 2)) for eta in (4e-3, 2e-3, 1e-3)]
    np.testing.assert_allclose(orders, 3.0, atol=0.05)


def test_equal_factors_leave_no_first_order_descent(x64):
    theta = jnp.asarray([0.3, -0.7, 1.1])
    with pytest.warns(UserWarning, match="alpha1 = 0.5 is not larger than alpha2 = 0.5"):
        tx = mirrored(optax.sgd(1e-4), 0.5, 0.5)
    grad_fn = lambda p, index: jax.grad(smooth)(p)  # noqa: E731
    grads = grad_fn(theta, 0)
    update, _ = tx.update(grads, tx.init(theta), theta, grad_fn=grad_fn)
    assert float(jnp.linalg.norm(update)) < 1e-3 * 1e-4 * float(jnp.linalg.norm(grads))


def factors_of(tx, n):
    """The factors of the first n updates, and what the state asked for after each."""
    state, update = tx.init(jnp.ones(())), jax.jit(tx.update)
    factors, pending = [], []
    for _ in range(n):
        value, state = update(jnp.ones(()), state)
        factors.append(round(float(value), 6))
        pending.append(bool(second_pass_pending(state)))
    return factors, pending


@pytest.mark.parametrize(
    ("interval", "steps_per_epoch", "expected"),
    [
        (1, None, [1, -0.2, 1, -0.2, 1, -0.2]),
        (1, 2, [1, -0.2, 1, -0.2, 1, -0.2]),
        (3, None, [1, -0.2, 1, 1, 1, -0.2, 1, 1, 1, -0.2]),
        (3, 5, [1, -0.2, 1, 1, 1, -0.2, 1, 1, -0.2, 1, 1, 1, -0.2, 1, 1, -0.2]),
        (10, 3, [1, -0.2, 1, 1, 1, -0.2, 1, 1, 1, -0.2]),  # longer than an epoch: its first batch only
        (2, 1, [1, -0.2, 1, -0.2]),
    ],
)
def test_schedule_of_factors(interval, steps_per_epoch, expected):
    factors, pending = factors_of(mirror_gradient(1.0, 0.2, interval, steps_per_epoch), len(expected))
    assert factors == expected
    # An alpha1 of 1 looks like a normal batch, so the flag is checked on its own.
    following = [*[value < 0 for value in expected[1:]], pending[-1]]
    assert pending == following


def test_replay_has_the_same_schedule_with_factor_one():
    factors, pending = factors_of(replay(2), 6)
    assert factors == [1.0] * 6
    assert pending == [True, False, False, True, False, False]


@pytest.mark.parametrize(("interval", "steps_per_epoch"), [(1, None), (3, None), (3, 5), (9, 5)])
def test_pass_schedule_is_what_the_state_asks_for(interval, steps_per_epoch):
    tx = optax.chain(mirror_gradient(interval=interval, steps_per_epoch=steps_per_epoch), optax.adam(0.1))
    state = first = tx.init(jnp.ones(2))
    update = jax.jit(tx.update)
    asked, batch = [], 0
    while batch < 5:
        asked.append(batch)
        _, state = update(jnp.ones(2), state)
        batch += not second_pass_pending(state)
    schedule = pass_schedule(first, 5)
    assert schedule.dtype == np.int32
    assert schedule.tolist() == asked
    assert len(schedule) == 5 + -(-5 // interval)


def test_pass_schedule_without_visible_mirror():
    assert pass_schedule(optax.adam(0.1).init(jnp.ones(2)), 4).tolist() == [0, 1, 2, 3]
    assert pass_schedule(mirrored(optax.adam(0.1)).init(jnp.ones(2)), 4).tolist() == [0, 1, 2, 3]


def test_pass_schedule_of_stacked_states():
    tx = optax.chain(mirror_gradient(interval=2), optax.adam(0.1))
    assert pass_schedule(jax.vmap(tx.init)(jnp.ones((3, 2))), 4).tolist() == [0, 0, 1, 2, 2, 3]


def test_pass_schedule_refuses_contradictions():
    state = mirror_gradient(steps_per_epoch=7).init(None)
    with pytest.raises(ValueError, match=r"steps_per_epoch=7.*8 batches"):
        pass_schedule(state, 8)
    two = optax.partition({"a": mirror_gradient(interval=2), "b": mirror_gradient(interval=3)}, {"x": "a", "y": "b"})
    with pytest.raises(ValueError, match=r"\(2, 0\), \(3, 0\)"):
        pass_schedule(two.init({"x": jnp.ones(2), "y": jnp.ones(2)}), 8)
    with pytest.raises(ValueError, match="n_batches"):
        pass_schedule(state, 0)
    with pytest.raises(ValueError, match=r"outside jax\.jit"):
        jax.jit(lambda state: jnp.asarray(pass_schedule(state, 7)))(state)


def test_scan_over_the_pass_schedule_equals_the_step():
    data = batches(5)
    tx = optax.chain(mirror_gradient(), optax.adam(0.03))
    xs, ys = (jnp.stack(part) for part in zip(*data, strict=True))

    @jax.jit
    def epoch(params, state, order):
        def one_pass(carry, j):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params, xs[j], ys[j]), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one_pass, (params, state), order)[0]

    state = tx.init(start())
    params, _ = epoch(start(), state, jnp.asarray(pass_schedule(state, 5)))
    assert_close(params, run_visible(tx, start(), data))


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: mirrored(optax.sgd(1.0))], ids=["visible", "opaque"])
def test_restart_epoch_makes_the_next_batch_a_mirror_batch(wrap):
    tx = wrap(optax.chain(mirror_gradient(interval=3), optax.sgd(1.0)))
    grad_fn = lambda p, index: p  # noqa: E731
    state, params = tx.init(jnp.ones(2)), jnp.ones(2)
    for _ in range(2):
        _, state = tx.update(params, state, params, grad_fn=grad_fn)
    before = mirror_state(state)
    assert int(before.phase) > 0
    after = mirror_state(restart_epoch(state))
    assert (int(after.phase), bool(after.second)) == (0, False)
    assert int(after.count) == int(before.count)


def mirror_state(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MirrorState))
    (found,) = [node for node in nodes if isinstance(node, MirrorState)]
    return found


def test_restart_epoch_reaches_stacked_states():
    tx = mirror_gradient(interval=3)
    state = jax.vmap(tx.init)(jnp.ones((4, 2)))
    _, state = jax.vmap(tx.update)(jnp.ones((4, 2)), state)
    assert second_pass_pending(state).tolist() == [True] * 4
    state = restart_epoch(state)
    assert second_pass_pending(state).tolist() == [False] * 4
    assert state.phase.tolist() == [0] * 4


@pytest.mark.parametrize("steps_per_epoch", [None, 5])
def test_counters_count_batches_and_cannot_overflow(steps_per_epoch):
    tx = mirror_gradient(interval=3, steps_per_epoch=steps_per_epoch)
    state = tx.init(None)._replace(count=jnp.asarray(np.iinfo(np.int32).max, jnp.int32))
    update, phases = jax.jit(tx.update), []
    for _ in range(9):
        _, state = update(jnp.ones(()), state)
        phases.append(int(state.phase))
    assert int(state.count) == np.iinfo(np.int32).max
    assert max(phases) < (steps_per_epoch or 3)


def test_schedules_see_completed_batches_and_constant_schedules_equal_constants():
    data, optimizer = batches(3), optax.adam(0.03)
    constant = optax.chain(mirror_gradient(0.9, 0.3), optimizer)
    scheduled = optax.chain(mirror_gradient(optax.constant_schedule(0.9), optax.constant_schedule(0.3)), optimizer)
    assert_close(run_visible(scheduled, start(), data), run_visible(constant, start(), data), rtol=1e-6)
    counts = factors_of(mirror_gradient(lambda count: 1.0 + count, lambda count: 0.5 + count, interval=2), 6)[0]
    assert counts == [1.0, -0.5, 1.0, 3.0, -2.5, 1.0]


def test_grid_of_factors_by_vmap_equals_a_loop():
    data = batches(3)
    grid = [(1.0, 0.3), (0.6, 0.2)]

    def train(alpha1, alpha2):
        return run_visible(optax.chain(mirror_gradient(alpha1, alpha2, interval=2), optax.adam(0.03)), start(), data)

    together = jax.jit(jax.vmap(train))(*jnp.asarray(grid).T)
    for n, (alpha1, alpha2) in enumerate(grid):
        assert_close(jax.tree.map(lambda leaf, n=n: leaf[n], together), train(alpha1, alpha2))


def test_factor_is_chosen_by_state_under_vmap_over_states():
    tx = mirror_gradient(1.0, 0.25, interval=2)
    state = jax.vmap(tx.init)(jnp.ones((3, 2)))
    state = state._replace(phase=jnp.asarray([0, 0, 1], jnp.int32), second=jnp.asarray([False, True, False]))
    updates, state = jax.jit(jax.vmap(tx.update))(jnp.full((3, 2), 2.0), state)
    assert updates[:, 0].tolist() == [2.0, -0.5, 2.0]
    assert state.phase.tolist() == [0, 1, 0]


@pytest.mark.parametrize(("name", "form"), [*((name, "visible") for name in OPTIMIZERS), ("adam", "opaque")])
def test_zero_gradient_stays_finite(name, form):
    optimizer, params = OPTIMIZERS[name](), {"w": jnp.ones(3)}
    if form == "visible":
        tx = optax.chain(mirror_gradient(interval=1, max_norm=1.0), optimizer)
    else:
        tx = mirrored(optimizer, interval=1, max_norm=1.0)
    step = jax.jit(mirror_step(lambda p: 0.0 * jnp.sum(p["w"]), tx))
    state = tx.init(params)
    for _ in range(2):
        params, state, loss = step(params, state)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, state, loss)))
    if name != "adamw":
        np.testing.assert_array_equal(params["w"], 1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_converges_on_a_badly_scaled_parabola(name):
    scales = jnp.asarray([1.0, 4.0])
    tx = optax.chain(mirror_gradient(), OPTIMIZERS[name]())
    step = mirror_step(lambda x: jnp.sum(scales * (x - 1.0) ** 2), tx)
    x = jnp.asarray([0.6, 1.3])

    def body(carry, _):
        x, state, loss = step(*carry)
        return (x, state), loss

    (x, _), losses = jax.jit(lambda x: jax.lax.scan(body, (x, tx.init(x)), length=400))(x)
    # Decoupled weight decay moves the minimum of adamw; the others arrive at 1.
    assert float(losses[-1]) < (0.05 if name == "adamw" else 1e-2) * float(losses[0])
