"""`mirrored(..., ascent=)`: the second half-step as gradient ascent, against loops written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgrad_jax import mirror_step, mirrored, optimizers
from mgrad_jax.mirror import schedule_over_passes
from mgrad_jax.training.decay import decayed, next_epoch, rate_factors

H = np.array([[3.0, 1.0], [1.0, 2.0]])
START = np.array([1.0, -2.0])
RATE, ALPHA1, ALPHA2, INTERVAL = 0.1, 1.0, 0.2, 3


def loss(params, *_, **__):
    return 0.5 * params @ jnp.asarray(H, params.dtype) @ params + jnp.sum(params**4) / 4


def gradient(p):
    return H @ p + p**3


class Adam:
    def __init__(self, b1=0.9):
        self.b1, self.m, self.v, self.t = b1, 0.0, 0.0, 0

    def step(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = 0.999 * self.v + 0.001 * g**2
        return self.m / (1 - self.b1**self.t) * self.scale()

    def scale(self):
        return 1 / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


class AMSGrad(Adam):
    largest = 0.0

    def scale(self):
        self.largest = np.maximum(self.largest, self.v / (1 - 0.999**self.t))
        return 1 / (np.sqrt(self.largest) + 1e-8)


class RMSprop:
    v = 0.0

    def step(self, g):
        self.v = 0.99 * self.v + 0.01 * g**2
        return g * self.scale()

    def scale(self):
        return 1 / (np.sqrt(self.v) + 1e-8)


class Adagrad(RMSprop):
    def step(self, g):
        self.v = self.v + g**2
        return g * self.scale()

    def scale(self):
        return 1 / (np.sqrt(self.v) + 1e-10)


class OptaxAdagrad(Adagrad):
    v = 0.1

    def scale(self):
        return 1 / np.sqrt(self.v + 1e-7)


class SGD:
    def step(self, g):
        return g

    def scale(self):
        return 1.0


class Momentum(SGD):
    trace = 0.0

    def step(self, g):
        self.trace = g + 0.9 * self.trace
        return self.trace


OPTIMIZERS = {
    "adam": (optimizers.adam, Adam),
    "adam without momentum": (lambda rate: optax.adam(rate, b1=0.0), lambda: Adam(0.0)),
    "amsgrad": (optax.amsgrad, AMSGrad),
    "rmsprop": (optimizers.rmsprop, RMSprop),
    "adagrad": (optimizers.adagrad, Adagrad),
    "optax's adagrad": (optax.adagrad, OptaxAdagrad),
    "sgd": (optimizers.sgd, SGD),
    "sgd with momentum": (lambda rate: optimizers.sgd(rate, momentum=0.9), Momentum),
}


def by_hand(rule, n_batches, rate=lambda batch: RATE, decay=0.0, clip=np.inf):
    """Algorithm 1 with its second half-step as ascent; `decay` of AdamW's kind and a clip act in the first alone."""
    p = START.copy()
    for batch in range(n_batches):
        is_mirror = batch % INTERVAL == 0
        g = gradient(p)
        g = (ALPHA1 if is_mirror else 1.0) * g
        g = g * min(1.0, clip / np.linalg.norm(g))
        p = p - rate(batch) * (rule.step(g) + decay * p)
        if is_mirror:
            p = p + rate(batch) * ALPHA2 * rule.scale() * gradient(p)
    return p


def train(tx, n_batches, jit=jax.jit, dtype=None, between=lambda state: state):
    params = jnp.asarray(START, dtype)
    state, step = tx.init(params), jit(mirror_step(loss, tx))
    for _ in range(n_batches):
        params, state, _ = step(params, state)
        state = between(state)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_ascent_is_the_loop_written_out_by_hand(name, x64):
    optimizer, rule = OPTIMIZERS[name]
    params, _ = train(mirrored(optimizer(RATE), ALPHA1, ALPHA2, INTERVAL, ascent=True), 7)
    np.testing.assert_allclose(params, by_hand(rule(), 7), rtol=1e-12)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_float32_agrees_with_the_loop_to_its_precision(name):
    optimizer, rule = OPTIMIZERS[name]
    params, _ = train(mirrored(optimizer(RATE), ALPHA1, ALPHA2, INTERVAL, ascent=True), 7)
    assert params.dtype == jnp.float32
    np.testing.assert_allclose(params, by_hand(rule(), 7), rtol=2e-5)


def test_gradient_descent_with_ascent_is_mirror_to_the_bit():
    ours, _ = train(mirrored(optax.sgd(RATE), ascent=True), 7)
    mirror, _ = train(mirrored(optax.sgd(RATE)), 7)
    np.testing.assert_array_equal(ours, mirror)


def test_without_ascent_nothing_changes_in_the_state():
    params = jnp.asarray(START)
    plain, own = (mirrored(optax.adam(RATE), ascent=choice).init(params) for choice in (False, True))
    assert jax.tree.structure(plain) == jax.tree.structure(own)
    assert len(plain.inner_state) == 2


def test_the_ascent_leaves_the_moments_as_the_first_half_step_left_them():
    tx = mirrored(optax.adam(RATE), ALPHA1, ALPHA2, INTERVAL, ascent=True)
    params = jnp.asarray(START)
    grads = jnp.asarray(gradient(START))
    _, state = jax.jit(lambda g: tx.update(g, tx.init(params), params, grad_fn=jax.grad(loss)))(grads)
    alone = optax.adam(RATE)
    _, expected = jax.jit(lambda g: alone.update(ALPHA1 * g, alone.init(params), params))(grads)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state[1], expected)


# --- what else is inside ----------------------------------------------------------------------------------------------


def test_weight_decay_and_clipping_inside_act_in_the_first_half_step_alone(x64):
    tx = mirrored(optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(RATE, weight_decay=0.3)), ascent=True)
    expected = by_hand(Adam(), 7, decay=0.3, clip=2.0)
    np.testing.assert_allclose(train(tx, 7)[0], expected, rtol=1e-12)


def test_coupled_weight_decay_acts_through_the_second_moment_alone(x64):
    class Coupled(Adam):
        def step(self, g):
            return super().step(g + 0.3 * self.params)

    rule, p = Coupled(), START.copy()
    for batch in range(4):
        rule.params = p
        p = p - RATE * rule.step(gradient(p))
        if batch % 3 == 0:
            p = p + RATE * ALPHA2 * rule.scale() * gradient(p)
    params, _ = train(mirrored(optimizers.make_optimizer("adam", RATE, weight_decay=0.3), ascent=True), 4)
    np.testing.assert_allclose(params, p, rtol=1e-12)


def test_max_norm_clips_the_ascent(x64):
    tx = mirrored(optax.sgd(RATE), max_norm=0.5, ascent=True)
    np.testing.assert_allclose(train(tx, 4)[0], train(mirrored(optax.sgd(RATE), max_norm=0.5), 4)[0], rtol=1e-12)


def test_a_schedule_inside_counts_batches(x64):
    schedule = optax.linear_schedule(0.1, 0.02, 8)
    expected = by_hand(Adam(), 7, rate=lambda batch: 0.1 - 0.01 * batch)
    params, _ = train(mirrored(optax.adam(schedule), ascent=True), 7)
    np.testing.assert_allclose(params, expected, rtol=1e-7)
    stretched, _ = train(mirrored(optax.adam(schedule_over_passes(schedule, INTERVAL)), ascent=True), 7)
    assert np.abs(stretched - expected).max() > 1e-4


def test_the_decay_of_the_epochs_reaches_the_ascent(x64):
    tx = decayed(mirrored(optax.adam(RATE), ascent=True), rate_factors((0.5, 2.0)))
    params, _ = train(tx, 7, between=next_epoch)
    np.testing.assert_allclose(params, by_hand(Adam(), 7, rate=lambda epoch: RATE * 0.5 ** (epoch / 2)), rtol=1e-6)


def test_groups_of_parameters_ascend_with_the_moments_of_their_own(x64):
    def both(params):
        return loss(params["a"]) + loss(params["b"])

    groups = {"a": optax.adam(RATE), "b": optimizers.rmsprop(RATE)}
    tx = mirrored(optax.partition(groups, {"a": "a", "b": "b"}), ascent=True)
    params = {"a": jnp.asarray(START), "b": jnp.asarray(START)}
    state, step = tx.init(params), jax.jit(mirror_step(both, tx))
    for _ in range(4):
        params, state, _ = step(params, state)
    np.testing.assert_allclose(params["a"], by_hand(Adam(), 4), rtol=1e-12)
    np.testing.assert_allclose(params["b"], by_hand(RMSprop(), 4), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*optimizers.optimizer_names()} - {"lion", "muon"}))
def test_every_optimizer_with_a_second_moment_goes_uphill(name):
    """With the ascent instead of no second half-step a mirror batch ends further along the gradient."""
    optimizer = optimizers.make_optimizer(name, 0.01)
    params = jnp.asarray(START)
    grads = jnp.asarray(gradient(START), jnp.float32)

    @jax.jit
    def steps(params):
        first, _ = optimizer.update(grads, optimizer.init(params), params)
        tx = mirrored(optimizer, ascent=True)
        both, _ = tx.update(grads, tx.init(params), params, grad_fn=jax.grad(loss))
        return first, both - first

    first, second = steps(params)
    uphill = jax.grad(loss)(params + first)
    assert (second * uphill > 0).all()


def test_an_entry_without_any_gradient_stays(x64):
    def half(params):
        return jnp.sum(params[:1] ** 2)

    for optimizer in (optax.adam(RATE), optimizers.adagrad(RATE), optimizers.rmsprop(RATE)):
        tx = mirrored(optimizer, ascent=True)
        params = jnp.asarray(START)
        state, step = tx.init(params), jax.jit(mirror_step(half, tx))
        updates = step(params, state)[0] - params
        assert updates[1] == 0
        assert 0 < abs(updates[0]) < 1


# --- an ascent of its own ---------------------------------------------------------------------------------------------


def test_an_optimizer_of_its_own_takes_the_second_half_step(x64):
    p, adam, trace = START.copy(), Adam(), 0.0
    for batch in range(7):
        p = p - RATE * adam.step(gradient(p))
        if batch % INTERVAL == 0:
            trace = -ALPHA2 * gradient(p) + 0.5 * trace
            p = p - 0.03 * trace
    tx = mirrored(optax.adam(RATE), ascent=optax.sgd(0.03, momentum=0.5))
    params, state = train(tx, 7)
    np.testing.assert_allclose(params, p, rtol=1e-12)
    assert len(state.inner_state) == 3


def test_what_is_no_optimizer_gets_a_sentence():
    with pytest.raises(ValueError, match=r"`ascent` must be True, False or an optimizer, not 0\.1"):
        mirrored(optax.adam(RATE), ascent=0.1)


def opaque():
    """A custom optimizer whose moment nobody knows."""
    return optax.GradientTransformation(lambda params: {"secret": params}, lambda g, state, params=None: (g, state))


@pytest.mark.parametrize(
    "optimizer",
    [optax.lion(RATE), optax.rmsprop(RATE, centered=True), optax.novograd(RATE), optax.adafactor(RATE), opaque()],
    ids=["lion", "centered", "novograd", "adafactor", "custom"],
)
@pytest.mark.parametrize("params", [1.0, START], ids=["scalar", "vector"])
def test_an_optimizer_without_a_known_second_moment_is_refused_in_a_sentence(optimizer, params):
    tx = mirrored(optimizer, ascent=True)
    with pytest.raises(ValueError, match=r"No second moment is found .* pass ascent= an optimizer of its own"):
        tx.init(jnp.asarray(params, jnp.float32))


# --- loops ------------------------------------------------------------------------------------------------------------


def test_scan_jit_and_the_plain_loop_agree():
    tx = mirrored(optax.adam(RATE), ascent=True)
    eager, _ = train(tx, 2, jit=lambda step: step)
    step, params = mirror_step(loss, tx), jnp.asarray(START)

    def body(carry, _):
        params, state, value = step(*carry)
        return (params, state), value

    (scanned, _), _ = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=4))(params)
    np.testing.assert_allclose(scanned, train(tx, 4)[0], rtol=1e-6)
    np.testing.assert_allclose(eager, train(tx, 2)[0], rtol=1e-6)


def test_a_grid_of_factors_trains_at_once():
    def one(alpha2):
        tx = mirrored(optax.adam(RATE), 1.0, alpha2, ascent=True)
        params = jnp.asarray(START)
        state, step = tx.init(params), mirror_step(loss, tx)
        for _ in range(4):
            params, state, _ = step(params, state)
        return params

    grid = jax.jit(jax.vmap(one))(jnp.asarray([0.1, ALPHA2]))
    np.testing.assert_allclose(grid[1], train(mirrored(optax.adam(RATE), ascent=True), 4)[0], rtol=1e-5)
    assert np.abs(grid[0] - grid[1]).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
    params, state = train(mirrored(optax.adam(RATE), ascent=True), 1, dtype=dtype)
    assert params.dtype == dtype
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state) if leaf.ndim)
    np.testing.assert_allclose(params.astype(np.float32), by_hand(Adam(), 1), rtol=2e-2)
