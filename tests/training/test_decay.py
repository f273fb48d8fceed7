"""The learning rate's decay acts inside every form, epoch by epoch, however often the optimizer is updated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgrad_jax import mirror_gradient, mirrored, replayed, sam, ssam_d
from mgrad_jax.errors import UserError
from mgrad_jax.training.decay import DecayState, decayed, next_epoch, rate_factors, with_decay

DECAY = (0.5, 1.0)
PARAMS = jnp.array([1.0, -2.0])


def grad_fn(params: Any, index: Any = 0) -> Any:
    return params * jnp.array([1.0, 3.0])


def after(tx: optax.GradientTransformation, epochs: int, steps: int = 3) -> Any:
    """Parameters after some epochs of one update a batch."""
    params, state = PARAMS, tx.init(PARAMS)
    tx = optax.with_extra_args_support(tx)
    for _ in range(epochs):
        for _ in range(steps):
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
        state = next_epoch(state)
    return params


# How often an epoch of three batches updates the optimizer inside each form.
FORMS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "alone": (lambda optimizer: optimizer, 3),
    "mirrored": (lambda optimizer: mirrored(optimizer, 1.0, 0.5, interval=2, steps_per_epoch=3), 5),
    "replayed": (lambda optimizer: replayed(optimizer, interval=3), 4),
    "sam": (sam, 3),
    "ssam_d": (lambda optimizer: ssam_d(optimizer, steps_per_epoch=3, epochs=2), 3),
    "sam of mirrored": (lambda optimizer: sam(mirrored(optimizer, interval=3)), 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_with_decay_is_the_form_around_an_optimizer_with_a_schedule(form: str) -> None:
    around, updates_per_epoch = FORMS[form]
    scheduled = optax.sgd(lambda count: 0.1 * jnp.asarray(rate_factors(DECAY))[count // updates_per_epoch])
    with_link = with_decay(around(optax.sgd(0.1)), DECAY, PARAMS)
    np.testing.assert_allclose(after(with_link, 2), after(around(scheduled), 2), rtol=1e-6)


def test_a_factor_is_the_double_precision_one_and_goes_on_beyond_the_table() -> None:
    factors = rate_factors((0.96, 50.0))
    assert factors is not None
    assert factors[777] == np.float32(0.96 ** (777 / 50.0))
    tx = decayed(optax.identity(), rate_factors((0.9999, 1.0)))
    _, link = tx.init(PARAMS)
    updates, _ = tx.update(PARAMS, (optax.EmptyState(), link._replace(epoch=jnp.int32(20_000))))
    np.testing.assert_allclose(updates, PARAMS * 0.9999**20_000, rtol=1e-3)


def test_a_constant_rate_has_no_link() -> None:
    assert rate_factors((1.0, 3.0)) is None
    tx = optax.sgd(0.1)
    assert with_decay(tx, (1.0, 50.0), PARAMS) is tx
    assert decayed(tx, None) is tx


def test_a_rate_that_outgrows_its_type_is_infinite_and_no_error() -> None:
    factors = rate_factors((1e300, 1e-3))
    assert factors is not None
    assert factors[0] == 1
    assert np.isinf(factors[1])


def test_updates_that_are_refused_do_not_hold_the_decay_up() -> None:
    tx = optax.apply_if_finite(decayed(optax.sgd(1.0), rate_factors(DECAY)), 5)
    state = tx.init(PARAMS)
    _, state = tx.update(PARAMS * jnp.nan, state, PARAMS)
    updates, _ = tx.update(PARAMS, next_epoch(state), PARAMS)
    np.testing.assert_allclose(updates, -0.5 * PARAMS)


def test_narrow_parameters_stay_narrow() -> None:
    tx = decayed(optax.sgd(1.0), rate_factors(DECAY))
    params = PARAMS.astype(jnp.bfloat16)
    updates, _ = tx.update(params, next_epoch(tx.init(params)), params)
    assert updates.dtype == jnp.bfloat16


def test_the_same_decay_twice_is_applied_once_and_another_one_is_refused() -> None:
    tx = optax.chain(mirror_gradient(), decayed(optax.sgd(0.1), rate_factors(DECAY)))
    assert with_decay(tx, DECAY, PARAMS) is tx
    with pytest.raises(
        UserError, match=r"learning_rate_decay is .* the optimizer's own decay multiplies .* by 0.5 per epoch"
    ):
        with_decay(tx, (0.9, 1.0), PARAMS)


@pytest.mark.parametrize(
    "tx",
    [
        optax.lbfgs(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
        optax.contrib.schedule_free_sgd(0.1),
        optax.chain(optax.clip(1.0), mirrored(optax.sgd(0.1))),
        mirrored(optax.contrib.schedule_free_sgd(0.1)),
    ],
    ids=[
        "lbfgs",
        "line search",
        "opaque sam of optax",
        "sam of optax",
        "schedule-free",
        "mirrored in a chain",
        "mirrored",
    ],
)
def test_an_optimizer_that_has_acted_on_its_update_already_is_refused(tx: optax.GradientTransformation) -> None:
    with pytest.raises(UserError, match="learning_rate_decay cannot reach the learning rate inside this optimizer"):
        with_decay(tx, DECAY, PARAMS)


def test_what_is_refused_can_be_built_with_the_decay_inside() -> None:
    def form(optimizer: Any) -> Any:
        return optax.contrib.sam(optimizer, optax.sgd(0.05), opaque_mode=True)

    tx = form(decayed(optax.sgd(0.1), rate_factors(DECAY)))
    assert with_decay(tx, DECAY, PARAMS) is tx
    state = next_epoch(tx.init(PARAMS))
    assert isinstance(state.opt_state[1], DecayState)
    updates, _ = tx.update(grad_fn(PARAMS), state, PARAMS, grad_fn=grad_fn)
    alone = form(optax.sgd(0.05))
    expected, _ = alone.update(grad_fn(PARAMS), alone.init(PARAMS), PARAMS, grad_fn=grad_fn)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
