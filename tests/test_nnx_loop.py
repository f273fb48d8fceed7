"""`nnx_step` makes the passes that `mirror_step` makes, and keeps what the loss changes in the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mgrad_jax import checked, close_batch, mirror_gradient, mirror_step, mirrored, nnx_step, sam, second_pass_pending

X, Y = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), jnp.ones((4, 2))
FORMS = {
    "visible": lambda: optax.chain(mirror_gradient(interval=2), optax.adam(0.1)),
    "checked": lambda: checked(optax.chain(mirror_gradient(interval=2), optax.adam(0.1))),
    "opaque": lambda: mirrored(optax.adam(0.1), interval=2),
    "sam": lambda: sam(optax.adam(0.1)),
    "optax sam": lambda: optax.contrib.sam(optax.adam(0.1), optax.sgd(0.05), opaque_mode=True),
    "line search": lambda: optax.chain(optax.sgd(0.5), optax.scale_by_backtracking_linesearch(5)),
}


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def linear():
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("form", FORMS)
def test_equals_mirror_step(form):
    model, tx = linear(), FORMS[form]()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    ours = nnx.jit(nnx_step(loss))
    step = jax.jit(mirror_step(lambda p, x, y: jnp.mean((x @ p["kernel"] + p["bias"][None] - y) ** 2), tx))
    state = tx.init(params)
    for _ in range(3):
        params, state, expected = step(params, state, X, Y)
        np.testing.assert_allclose(ours(model, optimizer, X, Y), expected, rtol=1e-5, atol=1e-12)
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, params)
    assert int(optimizer.step[...]) == (5 if form in ("visible", "checked") else 3)


def test_without_jit_the_passes_are_the_same():
    model, jitted = linear(), linear()
    for one, step in ((model, nnx_step(loss)), (jitted, nnx.jit(nnx_step(loss)))):
        optimizer = nnx.Optimizer(one, FORMS["visible"](), wrt=nnx.Param)
        for _ in range(3):
            step(one, optimizer, X, Y)
        assert int(optimizer.step[...]) == 5
    np.testing.assert_allclose(model.kernel[...], jitted.kernel[...], rtol=1e-5)


class Noisy(nnx.Module):
    """Batch statistics and dropout: what a loss changes in the model."""

    def __init__(self):
        self.linear, self.norm = linear(), nnx.BatchNorm(2, rngs=nnx.Rngs(1))
        self.dropout, self.calls = nnx.Dropout(0.5, rngs=nnx.Rngs(2)), nnx.BatchStat(jnp.asarray(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.norm(self.linear(x)))


def test_what_both_passes_change_in_the_model_is_kept():
    model = Noisy()
    optimizer = nnx.Optimizer(model, FORMS["visible"](), wrt=nnx.Param)
    step, seen = nnx.jit(nnx_step(lambda *args: (loss(*args), 7.0), has_aux=True)), []
    for _ in range(2):
        value, aux = step(model, optimizer, X, Y)
        seen.append((int(model.calls[...]), int(model.dropout.rngs.count[...]), float(aux)))
        assert bool(jnp.isfinite(value))
    assert seen == [(2, 2, 7.0), (3, 3, 7.0)]
    assert bool(jnp.any(model.norm.mean[...] != 0))


def test_the_gradient_is_that_of_what_the_optimizer_is_for():
    model = nnx.LoRALinear(3, 2, lora_rank=2, rngs=nnx.Rngs(0))
    kernel = jnp.copy(model.kernel[...])
    for form in ("visible", "opaque"):
        optimizer = nnx.Optimizer(model, FORMS[form](), wrt=nnx.LoRAParam)
        step = nnx.jit(nnx_step(loss))
        losses = [float(step(model, optimizer, X, Y)) for _ in range(4)]
        assert losses[-1] < losses[0]
    np.testing.assert_array_equal(kernel, model.kernel[...])


def test_a_refused_second_pass_closes_its_batch():
    model = Noisy()
    tx = optax.apply_if_finite(optax.chain(mirror_gradient(interval=3), optax.sgd(0.1)), 9)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def bad_at_first(model, x, y):
        return loss(model, x, y) * jnp.where(model.calls[...] == 2, jnp.nan, 1.0)

    step = nnx.jit(nnx_step(bad_at_first))
    for _ in range(2):
        assert bool(jnp.isfinite(step(model, optimizer, X, Y)))
        assert not bool(second_pass_pending(optimizer.opt_state))
    assert int(model.calls[...]) == 3
    assert int(optimizer.opt_state.inner_state[0].phase[...]) == 2


def test_close_batch_reaches_the_state_of_an_nnx_optimizer():
    model = linear()
    optimizer = nnx.Optimizer(model, FORMS["visible"](), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss)(model, X, Y))
    assert bool(second_pass_pending(optimizer.opt_state))
    nnx.update(optimizer.opt_state, nnx.state(close_batch(optimizer.opt_state)))
    assert not bool(second_pass_pending(optimizer.opt_state))


def test_what_no_loop_can_drive_is_refused():
    model = linear()
    for tx, words in (
        (optax.chain(mirror_gradient(), optax.apply_every(2)), r"optax\.apply_every"),
        (optax.chain(mirror_gradient(), mirror_gradient(), optax.sgd(0.1)), "several mirrors"),
        (optax.lookahead(optax.sgd(0.1), 3, 0.5), "pair of parameters"),
    ):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        with pytest.raises(ValueError, match=words):
            nnx.jit(nnx_step(loss))(model, optimizer, X, Y)
