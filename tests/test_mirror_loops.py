"""Loops around a mirror: which optimizers they can drive, how a batch ends, what counts passes, what is handed over."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from optax.experimental import aggregating

from mgrad_jax import (
    close_batch,
    mirror_gradient,
    mirror_step,
    mirrored,
    replay,
    replayed,
    sam,
    schedule_over_passes,
    second_pass_pending,
    ssam_f,
)
from mgrad_jax.mirror import check_loop, pass_schedule, restart_epoch, update_with


def square(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def train(tx, params, n, loss=square, jit=jax.jit):
    state, step = tx.init(params), jit(mirror_step(loss, tx))
    for _ in range(n):
        params, state, value = step(params, state)
    return params, state, value


def pair():
    return {"a": jnp.ones(2), "b": jnp.ones(3)}


LABELS = {"a": "x", "b": "y"}


def link(tx, rate=0.1):
    return optax.chain(tx, optax.sgd(rate))


# --- several mirrors in one optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [jax.jit, lambda step: step], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (mirror_gradient(interval=2), mirror_gradient(interval=3)),
        (mirror_gradient(interval=3), replay(interval=2)),
        (mirror_gradient(steps_per_epoch=4), mirror_gradient(steps_per_epoch=5)),
        (mirror_gradient(), mirror_gradient(steps_per_epoch=5)),
    ],
)
def test_groups_that_ask_for_other_passes_are_refused(x, y, jit):
    tx = optax.partition({"x": link(x), "y": link(y)}, LABELS)
    with pytest.raises(ValueError, match=r"several mirror schedules, as \(interval, steps_per_epoch\)"):
        train(tx, pair(), 1, jit=jit)
    with pytest.raises(ValueError, match="several mirror schedules"):
        pass_schedule(tx.init(pair()), 6)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.apply_if_finite(tx, 3)], ids=["alone", "wrapped"])
def test_groups_that_ask_for_the_same_passes_train_as_alone(wrap):
    tx = wrap(optax.partition({"x": link(mirror_gradient(1.0, 0.3)), "y": link(replay(), 0.05)}, LABELS))
    together, state, _ = train(tx, pair(), 4)
    for name, alone in (("a", link(mirror_gradient(1.0, 0.3))), ("b", link(replay(), 0.05))):
        expected, _, _ = train(alone, {name: pair()[name]}, 4)
        np.testing.assert_allclose(together[name], expected[name], rtol=1e-6)
    assert pass_schedule(state, 3).tolist() == [0, 1, 2, 2]


def test_groups_out_of_step_are_refused():
    tx = optax.partition({"x": link(mirror_gradient()), "y": link(mirror_gradient())}, LABELS)
    state = tx.init(pair())
    later = link(mirror_gradient()).init({"a": jnp.ones(2), "b": optax.MaskedNode()})
    later = (later[0]._replace(phase=jnp.asarray(1, jnp.int32)), later[1])
    state.inner_states["x"] = state.inner_states["x"]._replace(inner_state=later)
    with pytest.raises(ValueError, match=r"several mirror positions, as \(phase, second\)"):
        pass_schedule(state, 4)
    assert pass_schedule(restart_epoch(state), 4).tolist() == [0, 0, 1, 2, 3, 3]


def test_two_mirrors_over_the_same_parameters_are_refused():
    groups = optax.partition({"x": link(mirror_gradient()), "y": optax.sgd(0.1)}, LABELS)
    for tx in (link(optax.chain(mirror_gradient(), replay())), optax.chain(mirror_gradient(), groups)):
        with pytest.raises(ValueError, match="several mirrors for the same parameters"):
            train(tx, pair(), 1)
    with pytest.raises(ValueError, match="leave mirror_gradient out"):
        mirrored(link(mirror_gradient())).init(pair())


# --- a state goes on with the transformation that it was made with ----------------------------------------------------


def test_a_restored_state_refuses_another_interval():
    state = link(mirror_gradient(interval=3)).init(jnp.ones(2))
    with pytest.raises(ValueError, match="made with interval=3, this transformation with 2"):
        link(mirror_gradient(interval=2)).update(jnp.ones(2), state)
    with pytest.raises(ValueError, match="made with steps_per_epoch=0, this transformation with 5"):
        mirror_step(square, link(mirror_gradient(steps_per_epoch=5)))(jnp.ones(2), state)
    opaque = mirrored(optax.sgd(0.1), interval=3).init(jnp.ones(2))
    with pytest.raises(ValueError, match="made with interval=3, this transformation with 4"):
        mirrored(optax.sgd(0.1), interval=4).update(jnp.ones(2), opaque, jnp.ones(2), grad_fn=lambda p, index: p)


def test_a_restored_state_keeps_its_place_and_takes_the_new_factors():
    _, state = mirror_gradient(1.0, 0.2, interval=2).update(jnp.ones(()), mirror_gradient(interval=2).init(None))
    update, state = mirror_gradient(1.0, 0.5, interval=2).update(jnp.ones(()), state)
    assert float(update) == -0.5
    assert (int(state.phase), int(state.count)) == (1, 1)


# --- the schedule of passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "steps_per_epoch"), [(1, None), (3, None), (4, None), (3, 5), (7, 5)])
def test_pass_schedule_goes_on_where_the_state_stands(interval, steps_per_epoch):
    tx = mirror_gradient(interval=interval, steps_per_epoch=steps_per_epoch)
    state, update = tx.init(None), jax.jit(tx.update)
    for _ in range(9):
        if not second_pass_pending(state):
            asked, batch, following = [], 0, state
            while batch < 5:
                asked.append(batch)
                _, following = update(jnp.ones(()), following)
                batch += not second_pass_pending(following)
            assert pass_schedule(state, 5).tolist() == asked
        else:
            with pytest.raises(ValueError, match=r"between the two passes.*close_batch \(restart_epoch"):
                pass_schedule(state, 5)
        _, state = update(jnp.ones(()), state)


@pytest.mark.parametrize(("interval", "steps_per_epoch"), [(1, None), (3, None), (3, 4), (3, 6), (5, 3), (1, 2)])
def test_a_schedule_over_passes_is_that_of_the_batches(interval, steps_per_epoch):
    def rate(count):
        return 1.0 / (1.0 + jnp.asarray(count))

    stretched = jax.jit(schedule_over_passes(rate, interval, steps_per_epoch))
    tx = mirror_gradient(interval=interval, steps_per_epoch=steps_per_epoch)
    state, update = tx.init(None), jax.jit(tx.update)
    for count in range(25):
        assert float(stretched(count)) == float(rate(state.count))
        _, state = update(jnp.ones(()), state)


@pytest.mark.parametrize("form", ["visible", "opaque"])
def test_a_stretched_decay_ends_with_the_batches(form):
    decay = schedule_over_passes(optax.linear_schedule(1.0, 0.0, 4), interval=1)
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=decay)
    tx = optax.chain(mirror_gradient(interval=1), inner) if form == "visible" else mirrored(inner, interval=1)
    params, rates = jnp.ones(2), []
    state, step = tx.init(params), jax.jit(mirror_step(lambda p: 1e-3 * square(p), tx))
    for _ in range(5):
        params, state, _ = step(params, state)
        rates.append(float((state if form == "visible" else state.inner_state)[1].hyperparams["learning_rate"]))
    np.testing.assert_allclose(rates, [1.0, 0.75, 0.5, 0.25, 0.0], atol=1e-6)


def test_a_schedule_over_passes_wants_integers():
    for arguments in ({"interval": 0}, {"steps_per_epoch": 2.5}):
        with pytest.raises(ValueError, match=r"must be a positive integer"):
            schedule_over_passes(optax.constant_schedule(1.0), **arguments)


# --- the end of a batch -----------------------------------------------------------------------------------------------


def own_loop(tx, params, gradients):
    """The documented loop; ``gradients(params, batch, pass)``."""
    state, passes, update = tx.init(params), [], jax.jit(tx.update)
    for batch in range(4):
        for n in range(2):
            updates, state = update(gradients(params, batch, n), state, params)
            params = optax.apply_updates(params, updates)
            passes.append((batch, n))
            if not second_pass_pending(state):
                break
        state = close_batch(state)
        assert not bool(second_pass_pending(state))
    return params, state, passes


@pytest.mark.parametrize("bad_pass", [0, 1])
def test_a_loop_ends_every_batch_whatever_is_refused(bad_pass):
    tx = optax.apply_if_finite(link(mirror_gradient(interval=3)), 1)
    params, state, passes = own_loop(
        tx, jnp.ones(2), lambda p, batch, n: 2 * p * (jnp.nan if batch == 0 and n == bad_pass else 1.0)
    )
    assert bool(jnp.all(jnp.isfinite(params)))
    # A batch whose first pass is refused does not count; one whose second is refused does.
    assert int(state.inner_state[0].count) == (3 if bad_pass == 0 else 4)
    assert len(passes) == (5 if bad_pass == 0 else 6)


def test_a_batch_is_closed_for_the_next_one_to_be_a_batch_of_its_own():
    def gradients(params, batch, n):
        return jnp.ones(2) * (jnp.inf if (batch, n) == (0, 1) else 1.0)

    params, _, passes = own_loop(
        optax.apply_if_finite(link(mirror_gradient(interval=4), 1.0), 9), jnp.zeros(2), gradients
    )
    assert passes == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
    assert params.tolist() == [-4.0, -4.0]


@pytest.mark.parametrize("skipped", [(0, 0, 1), (0, 1, 0), (0, 1, 1)])
def test_skipped_mini_batches_leave_nothing_for_the_next_batch(skipped):
    """MultiSteps counts a skipped mini-batch as if it had not been; without an end its pass would go on in the next."""
    tx = optax.MultiSteps(link(mirror_gradient(interval=2), 1.0), 2, should_skip_update_fn=optax.skip_not_finite)
    params = jnp.zeros(2)
    state, moved, update = tx.init(params), [], jax.jit(tx.update)
    for batch in range(3):
        for n in range(2):
            for k in range(2):
                bad = (batch, n, k) == skipped
                updates, state = update(jnp.full(2, jnp.nan if bad else 10.0**batch), state, params)
                params = optax.apply_updates(params, updates)
            if not second_pass_pending(state):
                break
        state = close_batch(state)
        assert not bool(second_pass_pending(state))
        assert (int(state.mini_step), float(jnp.sum(jnp.abs(state.acc_grads)))) == (0, 0.0)
        moved.append(round(float(params[0]), 3))
    if skipped[1] == 0:  # the first pass was never complete: batch 0 does not count, batch 1 is the mirror batch
        assert moved == [0.0, -8.0, -108.0]
    else:
        assert moved == [-1.0, -11.0, round(-11.0 - 100.0 + 20.0, 3)]


def test_what_is_complete_is_left_as_it_is():
    tx = optax.chain(mirror_gradient(interval=2), optax.adam(0.1))
    state = tx.init(jnp.ones(2))
    for _ in range(2):
        _, state = tx.update(jnp.ones(2), state)
    jax.tree.map(np.testing.assert_array_equal, close_batch(state), state)
    for other in (optax.adam(0.1).init(jnp.ones(2)), mirrored(optax.sgd(0.1)).init(jnp.ones(2))):
        assert jax.tree.structure(close_batch(other)) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, close_batch(other), other)
    accumulating = optax.MultiSteps(optax.sgd(0.1), 3)
    _, halfway = accumulating.update(jnp.ones(2), accumulating.init(jnp.ones(2)))
    assert int(close_batch(halfway).mini_step) == 1, "without a mirror there is no pass to end"


def test_stacks_of_states_are_closed_member_by_member():
    tx = mirror_gradient(interval=2)
    state = jax.vmap(tx.init)(jnp.ones((2, 2)))._replace(second=jnp.asarray([True, False]))
    closed = jax.jit(close_batch)(state)
    assert (closed.phase.tolist(), closed.count.tolist(), closed.second.tolist()) == ([1, 0], [1, 0], [False, False])


# --- what a loop of two passes cannot drive ---------------------------------------------------------------------------


WITHHOLDING = {
    "optax.MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "optax.apply_every": lambda: optax.chain(optax.sgd(0.1), optax.apply_every(2)),
    "optax.conditionally_mask": lambda: optax.conditionally_mask(optax.sgd(0.1), lambda step: step % 2 == 1),
    "optax.conditionally_transform": lambda: optax.conditionally_transform(optax.sgd(0.1), lambda step: step % 2 == 1),
    "optax.experimental.accumulate_avg_updates": lambda: optax.chain(
        aggregating.accumulate_avg_updates(2), optax.sgd(0.1)
    ),
}


@pytest.mark.parametrize("name", WITHHOLDING)
def test_what_holds_updates_back_is_refused_with_a_mirror_only(name):
    inner = WITHHOLDING[name]()
    params = jnp.ones(2)
    for tx in (optax.chain(mirror_gradient(), inner), optax.chain(replay(), inner)):
        with pytest.raises(ValueError, match=name):
            check_loop(tx.init(params))
        with pytest.raises(ValueError, match=name):
            jax.jit(mirror_step(square, tx))(params, tx.init(params))
    for wrap in (mirrored, replayed):
        with pytest.raises(ValueError, match=name):
            wrap(inner).init(params)
    check_loop(inner.init(params))
    moved, _, _ = train(inner, params, 2)
    assert bool(jnp.any(moved != params))


def test_accumulation_around_a_mirror_is_refused():
    for tx in (optax.MultiSteps(link(mirror_gradient()), 2), optax.MultiSteps(mirrored(optax.sgd(0.1)), 2)):
        with pytest.raises(ValueError, match=r"MultiSteps.*mini-batches"):
            check_loop(tx.init(jnp.ones(2)))


@pytest.mark.parametrize(
    "form",
    [
        sam,
        lambda tx: ssam_f(tx, steps_per_epoch=3),
        mirrored,
        lambda tx: optax.contrib.sam(tx, optax.sgd(0.05), opaque_mode=True),
    ],
    ids=["sam", "ssam_f", "mirrored", "optax sam"],
)
def test_a_mirror_before_a_form_with_its_own_gradient_is_refused(form):
    tx = optax.chain(mirror_gradient(), form(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="put the mirror inside"):
        check_loop(tx.init(jnp.ones(2)))
    if form is not mirrored:
        with pytest.raises(ValueError, match="put the mirror inside"):
            mirrored(form(optax.sgd(0.1))).init(jnp.ones(2))
    check_loop(form(optax.sgd(0.1)).init(jnp.ones(2)))


def test_a_mirror_inside_sam_scales_the_gradient_that_sam_steps_along():
    tx = sam(optax.chain(mirror_gradient(1.0, 0.5, interval=2), optax.sgd(0.1)), rho=0.3)
    x, expected = 1.0, 1.0
    moved, _, _ = train(tx, jnp.asarray(x), 1)
    for factor in (1.0, -0.5):
        expected -= 0.1 * factor * 2 * (expected + 0.3)
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_a_sam_of_visible_steps_is_refused_beside_a_mirror():
    visible = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05))
    with pytest.raises(ValueError, match="opaque_mode=True"):
        train(optax.chain(mirror_gradient(), visible), jnp.ones(2), 1)
    check_loop(visible.init(jnp.ones(2)))


# --- extra arguments --------------------------------------------------------------------------------------------------


def bowl(params):
    return jnp.sum((params - jnp.arange(4.0)) ** 2 * jnp.arange(1.0, 5.0))


def optax_sam(rate=0.05):
    return optax.contrib.sam(optax.sgd(rate), optax.sgd(0.01), opaque_mode=True)


NEEDY = {
    "lbfgs": optax.lbfgs,
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
    "backtracking with its gradient": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, store_grad=True)
    ),
    "polyak": lambda: optax.polyak_sgd(0.5),
    "sophia": lambda: optax.contrib.sophia(0.3),
    "optax sam": optax_sam,
    "optax sam in a chain": lambda: optax.chain(optax.clip(10.0), optax_sam()),
    "optax sam in wrappers": lambda: optax.apply_if_finite(optax.chain(optax_sam(), optax.scale(1.0)), 3),
    "sam of a line search": lambda: sam(optax.lbfgs(), rho=1e-3),
    "plateau behind sam": lambda: optax.chain(sam(optax.sgd(0.05), 0.01), optax.contrib.reduce_on_plateau()),
    "line search in a partition": lambda: optax.partition({"all": optax.lbfgs()}, "all"),
    "mirrored polyak": lambda: mirrored(optax.polyak_sgd(0.5), 1.0, 0.2),
    "mirrored line search": lambda: mirrored(
        optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(3)), 1.0, 0.2, interval=3
    ),
}


@pytest.mark.parametrize("name", NEEDY)
def test_every_optimizer_gets_the_arguments_that_it_accepts(name):
    tx = NEEDY[name]()
    start = jnp.full(4, 3.0)
    state, step = tx.init(start), mirror_step(bowl, tx)

    @jax.jit
    def steps(params, state):
        return jax.lax.scan(lambda carry, _: (step(*carry)[:2], None), (params, state), length=15)[0]

    params, _ = steps(start, state)
    assert float(bowl(params)) < 0.5 * float(bowl(start))


def test_links_that_contradict_each_other_are_named():
    tx = optax.chain(optax_sam(), optax.contrib.reduce_on_plateau())
    with pytest.raises(ValueError, match=r"needs \['value'\], which another link refuses.*mgrad_jax\.sam"):
        train(tx, jnp.ones(2), 1)


def test_an_error_of_the_optimizer_itself_comes_through():
    def update(updates, state, params=None, **extra_args):
        raise TypeError("a fault of its own: 'value'")

    with pytest.raises(TypeError, match="a fault of its own"):
        update_with(update, jnp.ones(2), (), value=1.0)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'unknown'"):
        update_with(lambda updates, state, params=None, *, unknown, **extra: None, jnp.ones(2), (), value=1.0)


def test_a_suggestion_is_not_a_refusal():
    def update(updates, state, params=None, **extra_args):
        if "grad" in extra_args:
            raise TypeError("update() got an unexpected keyword argument 'grad'. Did you mean 'grad_fn'?")
        return sorted(extra_args)

    assert update_with(update, jnp.ones(2), (), grad=1.0, grad_fn=None) == ["grad_fn"]


def test_plain_optimizers_are_given_nothing():
    seen = []

    def update(updates, state, params=None):
        seen.append(params)
        return updates, state

    update_with(update, jnp.ones(2), (), 5, value=1.0, grad_fn=None)
    assert seen == [5]


def test_both_forms_agree_where_the_optimizer_uses_the_loss():
    """Regression: the second pass of the opaque form was given the loss of the first."""
    make = lambda: optax.polyak_sgd(0.5, variant="sps")  # noqa: E731
    visible, _, _ = train(optax.chain(mirror_gradient(1.0, 0.3, 2), make()), jnp.full(4, 3.0), 4, loss=bowl)
    opaque, _, _ = train(mirrored(make(), 1.0, 0.3, 2), jnp.full(4, 3.0), 4, loss=bowl)
    np.testing.assert_allclose(opaque, visible, rtol=1e-5)


# --- other people's wrappers ------------------------------------------------------------------------------------------


def test_lookahead_trains_with_the_gradient_of_its_fast_parameters():
    def run(wrap):
        tx = wrap(optax.sgd(0.1))
        params = optax.LookaheadParams.init_synced(jnp.ones(2))
        return train(tx, params, 4, loss=lambda pair: jnp.sum(pair.fast**2))[0]

    inside = run(lambda tx: optax.lookahead(optax.chain(mirror_gradient(interval=2), tx), 3, 0.5))
    outside = run(lambda tx: optax.chain(mirror_gradient(interval=2), optax.lookahead(tx, 3, 0.5)))
    opaque = run(lambda tx: mirrored(optax.lookahead(tx, 3, 0.5), interval=2))
    fast, slow = 1.0, 1.0
    for n, factor in enumerate((1.0, -0.2, 1.0, 1.0, -0.2, 1.0), start=1):
        fast -= 0.1 * factor * 2 * fast
        if n % 3 == 0:
            slow += 0.5 * (fast - slow)
            fast = slow
    for pair in (inside, outside, opaque):
        np.testing.assert_allclose([pair.fast[0], pair.slow[0]], [fast, slow], rtol=1e-6)


def test_lookahead_without_its_pair_gets_a_sentence():
    tx = optax.lookahead(optax.sgd(0.1), 3, 0.5)
    with pytest.raises(ValueError, match=r"pair of parameters, optax\.LookaheadParams\.init_synced"):
        train(tx, jnp.ones(2), 1)


def test_what_hands_no_grad_fn_on_gets_a_sentence():
    params = optax.LookaheadParams.init_synced(jnp.ones(2))
    with pytest.raises(ValueError, match=r"optax\.lookahead does not, goes inside"):
        train(optax.lookahead(mirrored(optax.sgd(0.1)), 3, 0.5), params, 1, loss=lambda pair: jnp.sum(pair.fast**2))
    for tx in (mirrored(optax.sgd(0.1)), sam(optax.sgd(0.1)), ssam_f(optax.sgd(0.1), steps_per_epoch=2)):
        state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
        with pytest.raises(ValueError, match=r"in place of flax's TrainState\.apply_gradients use mirror_step"):
            state.apply_gradients(grads=state.params)


def test_a_wrapper_that_rewrites_the_state_is_refused():
    params = optax.LookaheadParams.init_synced(jnp.ones(2))
    tx = optax.lookahead(link(mirror_gradient()), 3, 0.5, reset_state=True)
    with pytest.raises(ValueError, match=r"rewrites its state.*reset_state=True"):
        train(tx, params, 1, loss=lambda pair: jnp.sum(pair.fast**2))
    outside = optax.chain(mirror_gradient(), optax.lookahead(optax.adam(0.1), 3, 0.5, reset_state=True))
    assert bool(jnp.all(train(outside, params, 3, loss=lambda pair: jnp.sum(pair.fast**2))[0].fast < 1.0))


@pytest.mark.parametrize(
    "form",
    [mirrored, replayed, sam, lambda tx: ssam_f(tx, steps_per_epoch=2)],
    ids=["mirrored", "replayed", "sam", "ssam"],
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.partition({"x": tx, "y": optax.sgd(0.1)}, LABELS),
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
    ],
    ids=["partition", "masked"],
)
def test_opaque_forms_say_that_they_stand_outside_a_group(form, wrap):
    def coupled(params, index=0):
        return jnp.sum(params["a"]) * jnp.sum(params["b"])

    tx, params = wrap(form(optax.sgd(0.1))), pair()
    extra = {"sample_grad_fn": jax.grad(coupled), "n_samples": 2}
    for grad_fn in (jax.grad(coupled), lambda p, index: pair()):  # fails where it is masked, and returns too much
        with pytest.raises(ValueError, match=r"inside optax\.masked or optax\.partition.*put it outside"):
            tx.update(jax.grad(coupled)(params), tx.init(params), params, grad_fn=grad_fn, **extra)


@pytest.mark.parametrize("form", [mirrored, sam])
def test_a_tree_of_ones_own_may_hold_masked_nodes(form):
    params = {"a": jnp.ones(2), "b": optax.MaskedNode()}
    moved, _, _ = train(form(optax.sgd(0.1)), params, 2)
    assert bool(jnp.all(moved["a"] < 1.0))


# --- half precision under strict promotion ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, np.float32(0.2), jnp.asarray(0.2), optax.linear_schedule(0.2, 0.1, 5), None])
@pytest.mark.parametrize("form", ["visible", "opaque"])
def test_mirrors_run_under_strict_promotion(form, alpha):
    """None stands for replay."""
    if form == "visible":
        first = replay(2, max_norm=np.float32(1.0)) if alpha is None else mirror_gradient(1.0, alpha, 2, max_norm=1.0)
        tx = optax.chain(first, optax.sgd(0.1))
    else:
        tx = replayed(optax.sgd(0.1), 2) if alpha is None else mirrored(optax.sgd(0.1), 1.0, alpha, 2)
    results = []
    for promotion in ("standard", "strict"):
        with jax.numpy_dtype_promotion(promotion):
            params, _, _ = train(tx, {"w": jnp.ones(2, jnp.bfloat16)}, 2)
            results.append(params["w"])
            assert params["w"].dtype == jnp.bfloat16
    assert results[0].tolist() == results[1].tolist()


@pytest.mark.parametrize("name", ["sam", "ssam_f", "schedule"])
def test_other_forms_run_under_strict_promotion(name):
    tx = {
        "sam": lambda: sam(optax.sgd(0.1), rho=np.float32(0.05)),
        "ssam_f": lambda: ssam_f(optax.sgd(0.1), rho=jnp.asarray(0.05), steps_per_epoch=2, fisher_samples=2),
        "schedule": lambda: link(
            mirror_gradient(), schedule_over_passes(optax.linear_schedule(0.1, 0.0, 5), steps_per_epoch=4)
        ),
    }[name]()

    def update(params, state):
        grad_fn = jax.grad(lambda p, index: square(p))
        extra = {"grad_fn": grad_fn, "sample_grad_fn": grad_fn, "n_samples": 2}
        return update_with(tx.update, grad_fn(params, 0), state, params, **extra)

    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jax.jit(update)(params, tx.init(params))
    assert updates["w"].dtype == jnp.bfloat16
    assert bool(jnp.all(updates["w"] < 0))
