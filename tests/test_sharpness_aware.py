"""The flat-minima baselines: exact on small problems, and through the epoch program that trains the models."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mgrad_jax
from mgrad_jax import SSAMState, models, sam, sparse_masks, ssam_d, ssam_f
from mgrad_jax.data import load_interactions
from mgrad_jax.errors import UserError
from mgrad_jax.training import fit
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.epoch import EpochPlan, TrainState, run_epoch, split_model, training_data

RNG = np.random.default_rng(0)
P = 10
X = RNG.normal(size=(7, P)) * np.geomspace(1, 3, P)
Y = RNG.normal(size=7)


def regression(rows):
    """The gradient of the mean squared error over these rows, written down without JAX."""
    return lambda w: 2 * X[rows].T @ (X[rows] @ w - Y[rows]) / len(rows)


BATCHES = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6])]


def tree(flat):
    return {"a": jnp.asarray(flat[:6]).reshape(3, 2), "b": jnp.asarray(flat[6:])}


def flat(params):
    return np.concatenate([np.ravel(params["a"]), np.ravel(params["b"])])


def loss(params, x, y):
    w = jnp.concatenate([params["a"].ravel(), params["b"]])
    return jnp.mean((x @ w - y) ** 2)


def gradients(rows):
    """What an update needs, for the batch of these rows."""
    x, y = jnp.asarray(X), jnp.asarray(Y)
    return {
        "grad_fn": lambda p, index: jax.grad(loss)(p, x[rows], y[rows]),
        "sample_grad_fn": lambda p, index: jax.grad(loss)(p, x[index][None], y[index][None]),
        "n_samples": len(Y),
    }


def step(tx, params, state, rows):
    arguments = gradients(rows)
    updates, state = tx.update(arguments["grad_fn"](params, 0), state, params, **arguments)
    return optax.apply_updates(params, updates), state


def jitted_step(tx):
    """`step`, compiled once for all batches of a size."""
    return jax.jit(partial(step, tx))


FORMS = {
    "sam": lambda optimizer, **options: sam(optimizer, **options),
    "ssam-f": lambda optimizer, **options: ssam_f(optimizer, steps_per_epoch=3, refresh_epochs=2, **options),
    "ssam-d": lambda optimizer, **options: ssam_d(optimizer, steps_per_epoch=3, refresh_epochs=2, epochs=6, **options),
}
every_form = pytest.mark.parametrize("form", FORMS)
START = RNG.normal(size=P)


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_sam_on_a_quadratic():
    curvature = np.array([1.0, 4.0, 0.5])
    theta, rho, rate = np.array([3.0, -1.0, 2.0]), 0.1, 0.2
    g = curvature * theta
    expected = theta - rate * curvature * (theta + rho * g / np.sqrt(9.0 + 16.0 + 1.0))
    tx, params = sam(optax.sgd(rate), rho), jnp.asarray(theta)
    updates, _ = tx.update(jnp.asarray(g), tx.init(params), params, grad_fn=lambda p, index: curvature * p)
    np.testing.assert_allclose(params + updates, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_masked_step_has_the_whole_norm_and_a_full_gradient():
    tx, params = ssam_f(optax.sgd(0.01), rho=0.3, steps_per_epoch=5), tree(START)
    mask = np.arange(P) % 3 == 0
    # Batch 3 of an epoch: no renewal is due.
    state = tx.init(params)._replace(mask=tree(mask), count=jnp.asarray(3, jnp.int32))
    seen = []

    def grad_fn(p, index):
        seen.append((flat(p), index))
        return gradients(BATCHES[0])["grad_fn"](p, index)

    g = regression(BATCHES[0])(START)
    arguments = {**gradients(BATCHES[0]), "grad_fn": grad_fn}
    updates, state = tx.update(tree(g), state, params, **arguments)
    perturbed = START + 0.3 * g / (np.sqrt((g**2).sum()) + 1e-7) * mask
    ((at, index),) = seen
    assert index == 0
    np.testing.assert_allclose(at, perturbed, rtol=1e-13)
    np.testing.assert_array_equal(at[~mask], START[~mask])
    np.testing.assert_allclose(flat(updates), -0.01 * regression(BATCHES[0])(perturbed), rtol=1e-12)
    np.testing.assert_array_equal(flat(state.mask), mask)


def test_first_step_of_ssam_f_is_plain():
    tx, plain = ssam_f(optax.adam(0.1), rho=5.0, steps_per_epoch=3), optax.adam(0.1)
    params = tree(START.astype(np.float32))
    moved, _ = step(tx, params, tx.init(params), BATCHES[0])
    expected, _ = plain.update(gradients(BATCHES[0])["grad_fn"](params, 0), plain.init(params), params)
    np.testing.assert_array_equal(flat(moved), flat(optax.apply_updates(params, expected)))


# --- the masks --------------------------------------------------------------------------------------------------------


def top_k_mask(values, count):
    return np.isin(np.arange(len(values)), np.argsort(-values, kind="stable")[:count])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.9])
def test_ssam_f_equals_numpy_over_epochs(sparsity):
    """Four epochs of three batches with f = 2: the mask changes after batches 0 and 6 only."""
    tx, params = ssam_f(optax.sgd(0.01), 0.5, sparsity, refresh_epochs=2, steps_per_epoch=3), tree(START)
    state, w, mask, advance = tx.init(params), START, np.zeros(P), jitted_step(tx)
    for t in range(12):
        rows = BATCHES[t % 3]
        g = regression(rows)(w)
        w = w - 0.01 * regression(rows)(w + 0.5 * g / (np.linalg.norm(g) + 1e-7) * mask)
        if t in (0, 6):
            fisher = sum(regression([n])(w) ** 2 for n in range(len(Y)))
            mask = top_k_mask(fisher, {0.0: 10, 0.35: 6, 0.9: 0}[sparsity])  # int(10 * (1 - 0.9)) is 0
        params, state = advance(params, state, rows)
        np.testing.assert_allclose(flat(params), w, rtol=1e-11, err_msg=f"batch {t}")
        np.testing.assert_array_equal(flat(state.mask), mask, err_msg=f"batch {t}")
    assert int(state.count) == 12


def test_fisher_information_is_that_of_the_moved_parameters():
    """The step goes from (3, 2) to (1, 2); a sample's gradient is the parameter, so the second one is now ahead."""
    tx, params = ssam_f(optax.sgd(1.0), sparsity=0.5, steps_per_epoch=1), jnp.asarray([3.0, 2.0])
    arguments = {"grad_fn": lambda p, i: p - jnp.asarray([1.0, 2.0]), "sample_grad_fn": lambda p, n: p, "n_samples": 1}
    _, state = tx.update(arguments["grad_fn"](params, 0), tx.init(params), params, **arguments)
    assert state.mask.tolist() == [False, True]


def test_fisher_samples_are_distinct_and_drawn_anew():
    """Sample n has a gradient in parameter n only, so the mask shows which were drawn."""
    tx = ssam_f(optax.sgd(0.0), sparsity=0.89, refresh_epochs=1, fisher_samples=4, steps_per_epoch=1, seed=3)
    params = jnp.zeros(40)
    arguments = {"grad_fn": lambda p, i: p, "sample_grad_fn": lambda p, n: jnp.zeros(40).at[n].set(1.0 + n)}
    state, drawn = tx.init(params), []
    for _ in range(3):
        _, state = tx.update(params, state, params, n_samples=40, **arguments)
        drawn.append(tuple(np.flatnonzero(state.mask)))
    assert [len(chosen) for chosen in drawn] == [4, 4, 4]
    assert len(set(drawn)) == 3


def test_equal_values_go_to_the_first():
    tx, params = ssam_f(optax.sgd(0.1), sparsity=0.5, steps_per_epoch=1), tree(np.ones(P, np.float32))
    arguments = {"grad_fn": lambda p, i: p, "sample_grad_fn": lambda p, n: p, "n_samples": 2}
    _, state = tx.update(params, tx.init(params), params, **arguments)
    np.testing.assert_array_equal(flat(state.mask), np.arange(P) < 5)


@pytest.mark.parametrize(("sparsity", "ones"), [(0.0, 10), (0.25, 7), (0.4, 6), (0.99, 0)])
def test_ssam_d_starts_at_random(sparsity, ones):
    masks = [
        flat(ssam_d(optax.sgd(0.1), sparsity=sparsity, steps_per_epoch=1, epochs=1, seed=seed).init(tree(START)).mask)
        for seed in range(6)
    ]
    assert {int(mask.sum()) for mask in masks} == {ones}
    assert len({mask.tobytes() for mask in masks}) > (1 if 0 < ones < 10 else 0)


@pytest.mark.usefixtures("x64")
def test_ssam_d_equals_numpy_over_epochs():
    """P (1 - s) = 6 of 10 parameters, E = 4 and f = 1: q = 0.5, 0.427, 0.25, 0.073, 0 and from there on 0."""
    tx = ssam_d(optax.sgd(0.01), 0.5, 0.4, refresh_epochs=1, steps_per_epoch=3, epochs=4, seed=1)
    params = tree(START)
    state, w, advance = tx.init(params), START, jitted_step(tx)
    for t in range(18):
        rows, old = BATCHES[t % 3], flat(state.mask)
        g = regression(rows)(w)
        w = w - 0.01 * regression(rows)(w + 0.5 * g / (np.linalg.norm(g) + 1e-7) * old)
        params, state = advance(params, state, rows)
        new = flat(state.mask)
        np.testing.assert_allclose(flat(params), w, rtol=1e-11, err_msg=f"batch {t}")
        if t % 3:
            np.testing.assert_array_equal(new, old, err_msg=f"batch {t}")
            continue
        stay, grow = [(3, 3), (3, 2), (4, 1), (5, 0), (6, 0), (6, 0)][t // 3]
        staying = top_k_mask((np.abs(g) + 1e-7) * old, stay)
        assert (staying & ~new).sum() == 0, t
        assert (new & ~staying).sum() == grow, t
        assert (new & ~staying & old).sum() == 0, f"batch {t}: what was dropped grew back"


def test_ssam_d_gets_sparser_than_asked_for_where_little_is_left_to_grow():
    tx, params = ssam_d(optax.sgd(0.1), steps_per_epoch=1, epochs=1000), tree(START.astype(np.float32))
    state = tx.init(params)
    assert flat(state.mask).sum() == 8
    assert flat(step(tx, params, state, BATCHES[0])[1].mask).sum() == 4 + 2


def test_counts_are_exact_for_large_models():
    """Products of odd counts that float32 would round."""
    stay, grow = sparse_masks.exchange_counts(50_000_019, 0.5, 0.5, 5, 10)
    assert stay.tolist() == [12_500_004, 18_750_007, 25_000_009]
    assert grow.tolist() == [12_500_004, 6_250_002, 0]


def test_growth_is_uniform_over_the_dead():
    """Every parameter outside the mask grows in equally often, and those of each seed differ."""
    params, arguments = jnp.arange(1.0, 11.0), {"grad_fn": lambda p, i: p}
    first = jnp.arange(10) < 4
    grown = np.zeros(10, int)
    for seed in range(200):
        tx = ssam_d(optax.sgd(0.1), sparsity=0.6, steps_per_epoch=1, epochs=9, seed=seed)
        _, state = tx.update(params, tx.init(params)._replace(mask=first), params, **arguments)
        grown += np.asarray(state.mask)
    assert grown[:4].tolist() == [0, 0, 200, 200]
    assert grown[4:].sum() == 400
    assert np.all(np.abs(grown[4:] - 400 / 6) < 4 * np.sqrt(200 * (1 / 3) * (2 / 3)))


# --- what Optax asks of a transformation ------------------------------------------------------------------------------


def scan(tx, params, rho=None):
    """Twelve batches, in four epochs, as one program."""
    rows = jnp.asarray([[0, 1], [2, 3], [4, 5]])
    tx = tx if rho is None else tx(rho)

    def body(carry, t):
        return step(tx, *carry, rows[t % 3]), None

    return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(12))[0]


@every_form
def test_scan_equals_loop(form):
    tx, params = FORMS[form](optax.adam(0.05), rho=0.3), tree(START.astype(np.float32))
    scanned = jax.jit(partial(scan, tx))(params)
    state, advance = tx.init(params), jitted_step(tx)
    for t in range(12):
        params, state = advance(params, state, np.asarray([[0, 1], [2, 3], [4, 5]])[t % 3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), scanned, (params, state))
    adam_state = (state.inner_state if isinstance(state, SSAMState) else state.opt_state)[0]
    assert int(adam_state.count) == 12, "the optimizer steps once a batch"


@every_form
def test_vmap_over_rho_equals_loop(form):
    params, rhos = tree(START.astype(np.float32)), jnp.asarray([0.05, 0.3, 1.0])
    program = partial(scan, lambda rho: FORMS[form](optax.sgd(0.01), rho=rho))
    together = jax.jit(jax.vmap(lambda rho: program(params, rho)))(rhos)
    run_alone = jax.jit(lambda rho: program(params, rho))
    for n, rho in enumerate(rhos):
        alone = run_alone(rho)
        jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-6), together, alone)
    assert not np.allclose(together[0]["a"][0], together[0]["a"][2])


@pytest.mark.parametrize("form", ["ssam-f", "ssam-d"])
def test_members_keep_their_own_seed_and_the_renewal_its_condition_under_vmap(form):
    """A condition that vmap turned into a select would renew the mask on every batch."""
    params = tree(START.astype(np.float32))
    options = {} if form == "ssam-d" else {"fisher_samples": 2}
    forms = [FORMS[form](optax.sgd(0.01), sparsity=0.5, seed=seed, **options) for seed in range(3)]
    states = [tx.init(params) for tx in forms]
    # Members at different batches: only the first and the last are due.
    states = [s._replace(count=jnp.asarray(c, jnp.int32)) for s, c in zip(states, (0, 4, 6), strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    program = jax.vmap(lambda state: step(forms[0], params, state, BATCHES[0])[1].mask)
    equations = jax.make_jaxpr(program)(stacked).eqns
    (condition,) = [equation for equation in equations if equation.primitive.name == "cond"]
    assert condition.invars[0].aval.shape == ()
    masks = jax.jit(program)(stacked)
    for n, (tx, state) in enumerate(zip(forms, states, strict=True)):
        alone = jitted_step(tx)(params, state, BATCHES[0])[1].mask
        jax.tree.map(lambda a, b, n=n: np.testing.assert_array_equal(a[n], b), masks, alone)


@every_form
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_is_a_fixed_point_and_dtypes_are_kept(form, dtype):
    params = {"a": jnp.asarray(START[:6], dtype).reshape(3, 2), "b": jnp.asarray(START[6:], jnp.float32)}
    grad_fn = jax.grad(lambda p, index: sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(p)))
    tx = FORMS[form](optax.adam(0.05))
    state = tx.init(params)
    arguments = {"grad_fn": grad_fn, "sample_grad_fn": grad_fn, "n_samples": 3}
    update = jax.jit(lambda p, s: tx.update(grad_fn(p, 0), s, p, **arguments))
    updates, after = update(params, state)
    describe = partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert describe(after) == describe(state)
    assert describe(updates) == describe(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert describe(update(optax.apply_updates(params, updates), after)[1]) == describe(state)


@every_form
def test_gradient_of_zero_stays_finite(form):
    params = tree(np.zeros(P, np.float32))
    arguments = {"grad_fn": lambda p, i: p, "sample_grad_fn": lambda p, n: p, "n_samples": 1}
    tx = FORMS[form](optax.sgd(0.1))
    updates, _ = tx.update(params, tx.init(params), params, **arguments)
    np.testing.assert_array_equal(flat(updates), 0)


@every_form
def test_extra_arguments(form):
    """Unknown ones are ignored; the optimizer gets them all, with the gradient it steps along."""
    seen = []

    def update(updates, state, params=None, *, grad, value, **extra_args):
        seen.append((float(updates), float(grad), value, "unknown" in extra_args))
        return updates, state

    tx = FORMS[form](optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), rho=2.0)
    params, grad_fn = jnp.asarray(1.0), lambda p, index: 2 * p
    state = tx.init(params)
    state = state._replace(mask=jnp.asarray(True)) if isinstance(state, SSAMState) else state
    arguments = {"grad_fn": grad_fn, "sample_grad_fn": grad_fn, "n_samples": 1, "unknown": 0}
    tx.update(2 * params, state, params, grad=2 * params, value=5, **arguments)
    assert seen == [(6.0, 6.0, 5, True)]
    plain = FORMS[form](optax.sgd(0.1))
    plain.update(2 * params, plain.init(params), params, value=5, **arguments)


@every_form
def test_inject_hyperparams_and_map_params(form):
    constructor = {"sam": sam, "ssam-f": ssam_f, "ssam-d": ssam_d}[form]
    options = {"ssam-f": {"steps_per_epoch": 3}, "ssam-d": {"steps_per_epoch": 3, "epochs": 6}}.get(form, {})
    static = () if form == "sam" else ("sparsity", "refresh_epochs", "steps_per_epoch", "seed")
    static += {"ssam-f": ("fisher_samples",), "ssam-d": ("epochs", "drop_rate")}.get(form, ())
    tx = optax.inject_hyperparams(constructor, static_args=static)(optax.adam(0.1), rho=0.4, **options)
    params = tree(START.astype(np.float32))
    moved, state = jax.jit(lambda p, s: step(tx, p, s, BATCHES[0]))(params, tx.init(params))
    assert float(state.hyperparams["rho"]) == np.float32(0.4)
    direct = constructor(optax.adam(0.1), rho=0.4, **options)
    expected, state = jitted_step(direct)(params, direct.init(params), BATCHES[0])
    np.testing.assert_allclose(flat(moved), flat(expected), rtol=1e-6)
    mapped = optax.tree.map_params(direct, lambda leaf: None, state, transform_non_params=lambda leaf: leaf)
    assert len(jax.tree.leaves(mapped)) == {"sam": 2, "ssam-f": 3, "ssam-d": 3}[form]


@every_form
def test_update_without_params_or_gradients(form):
    tx, params = FORMS[form](optax.sgd(0.1)), jnp.ones(3)
    with pytest.raises(ValueError, match="pass `params`"):
        tx.update(params, tx.init(params), grad_fn=lambda p, i: p)
    with pytest.raises(ValueError, match="pass `grad_fn=`"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("given", [{}, {"n_samples": 3}, {"sample_grad_fn": lambda p, i: p}])
def test_ssam_f_without_samples(given):
    tx, params = FORMS["ssam-f"](optax.sgd(0.1)), jnp.ones(3)
    with pytest.raises(ValueError, match="pass `sample_grad_fn=`"):
        jax.jit(lambda s: tx.update(params, s, params, grad_fn=lambda p, i: p, **given))(tx.init(params))


@pytest.mark.parametrize(
    ("constructor", "options", "message"),
    [
        (sam, {"rho": 0.0}, "`rho` must be positive and finite, not 0.0"),
        (sam, {"rho": "big"}, "`rho` must be a number or a scalar array, not 'big'"),
        (ssam_f, {"rho": float("nan")}, "`rho` must be positive and finite, not nan"),
        (ssam_d, {"rho": jnp.ones(2)}, r"`rho` has shape \(2,\)"),
        (ssam_f, {"sparsity": 1.0}, "`sparsity` must be a Python number from 0 to below 1, not 1.0"),
        (ssam_d, {"sparsity": -0.1}, "`sparsity` must be"),
        (ssam_d, {"sparsity": "half"}, "`sparsity` must be"),
        (ssam_f, {"sparsity": jnp.asarray(0.5)}, "`sparsity` must be a Python number"),
        (ssam_d, {"drop_rate": 1.5}, "`drop_rate` must be"),
        (ssam_f, {"fisher_samples": 0}, "`fisher_samples` must be a Python integer of at least 1, not 0"),
        (ssam_f, {"refresh_epochs": 2.5}, "`refresh_epochs` must be"),
        (ssam_d, {"refresh_epochs": 0}, "`refresh_epochs` must be"),
        (ssam_d, {"epochs": 0}, "`epochs` must be"),
        (ssam_d, {"steps_per_epoch": True}, "`steps_per_epoch` must be"),
        (ssam_f, {"seed": -1}, "`seed` must be a Python integer of at least 0"),
    ],
)
def test_bad_arguments(constructor, options, message):
    given = {sam: {}, ssam_f: {"steps_per_epoch": 3}, ssam_d: {"steps_per_epoch": 3, "epochs": 6}}[constructor]
    with pytest.raises(ValueError, match=message):
        constructor(optax.sgd(0.1), **{**given, **options})


def test_documentation():
    for name in ("sam", "ssam_f", "ssam_d"):
        text = getattr(mgrad_jax, name).__doc__
        assert name in mgrad_jax.__all__
        assert all(block in text for block in ("Args:", "Returns:", "Raises:", "Examples:", "References:"))
    assert all(f"\n    {field}: " in inspect.getdoc(SSAMState) for field in SSAMState._fields)


# --- the epoch program ------------------------------------------------------------------------------------------------

DEMO = load_interactions("demo")
SMALL = {"embedding_dim": 4}


def one_epoch(name, tx, data, batch_size, **options):
    parts = split_model(models.create(name, data, **SMALL, **options))
    plan = EpochPlan(batch_size, tuple(range(-(-len(data.train) // batch_size))))
    state = TrainState(parts.params, tx.init(parts.params), parts.epoch_state)
    program = jax.jit(lambda state: run_epoch(*parts[:1], tx, plan, state, parts.constants, training_data(data), KEY))
    return parts.params, program(state)[0]


KEY = jax.random.key(5)


def test_samples_of_the_epoch_make_up_its_batch():
    """Without its penalty LightGCN's loss is a mean over the batch, so samples' gradients average to the batch's."""

    def update(updates, state, params=None, *, sample_grad_fn, n_samples, **extra_args):
        assert n_samples == 24
        grads = jax.lax.map(lambda n: sample_grad_fn(params, n), jnp.arange(n_samples))
        mean = jax.tree.map(lambda leaf: leaf.mean(0), grads)
        return updates, (updates, mean)

    probe = optax.GradientTransformationExtraArgs(
        lambda params: (jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)), update
    )
    data = dataclasses.replace(DEMO, train=DEMO.train[:24])
    _, state = one_epoch("lightgcn", probe, data, 24, reg_weight=0.0)
    whole, mean = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)]) for part in state.opt_state)
    assert np.abs(whole).max() > 1e-4
    np.testing.assert_allclose(mean, whole, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vbpr", "lightgcn"])
@pytest.mark.parametrize("form", ["ssam-f", "ssam-d"])
def test_mask_and_optimizer_after_an_epoch(name, form):
    """7200 interactions are seven full batches of 1000 and one of 200."""
    options = {"steps_per_epoch": 8, "sparsity": 0.3}
    options |= {"fisher_samples": 5} if form == "ssam-f" else {"epochs": 1}
    tx = {"ssam-f": ssam_f, "ssam-d": ssam_d}[form](optax.adam(1e-3), **options)
    params, state = one_epoch(name, tx, DEMO, 1000)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = int(size * (1 - 0.3)) if form == "ssam-f" else int(size * 0.7 * 0.5) + int(size * 0.3)
    assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(state.opt_state.mask)) == expected
    assert int(state.opt_state.inner_state[0].count) == int(state.opt_state.count) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vbpr", "lightgcn"])
def test_fit_trains_each_form_in_its_own_way(name):
    """One epoch of each; what differs between them is the perturbation alone."""
    transformations = {
        "plain": optax.adam(1e-3),
        "sam": sam(optax.adam(1e-3)),
        "ssam-f": ssam_f(optax.adam(1e-3), fisher_samples=4, steps_per_epoch=4),
        "ssam-d": ssam_d(optax.adam(1e-3), steps_per_epoch=4, epochs=1),
    }
    losses = {}
    for form, tx in transformations.items():
        model = models.create(name, DEMO, **SMALL)
        result = fit(model, DEMO, tx, epochs=1, batch_size=2000)
        losses[form] = result.history[0].loss
    assert len(set(losses.values())) == 4, losses
    np.testing.assert_allclose(list(losses.values()), losses["plain"], rtol=0.05)


def test_configuration_builds_each_form():
    base = {"model": "vbpr", "data": "demo", "batch_size": 1000, "epochs": 7, "seed": 4}
    config = RunConfig(**base, training="ssam-d", flat_minima_args={"sparsity": 0.5})
    params = jnp.zeros(8)
    expected = ssam_d(config._optimizer(), sparsity=0.5, steps_per_epoch=8, epochs=7, seed=4)
    np.testing.assert_array_equal(config.transformation(DEMO).init(params).mask, expected.init(params).mask)
    for training, arguments, message in (
        ("ssam-f", {"sparsity": 1.0}, "ssam-f does not take .*sparsity. must be a Python number"),
        ("ssam-d", {"fisher_samples": 3}, "ssam-d has no argument 'fisher_samples'; choose among rho, sparsity"),
        ("sam", {"rho": -1.0}, "sam does not take .*positive and finite"),
    ):
        with pytest.raises(UserError, match=message):
            RunConfig(**base, training=training, flat_minima_args=arguments)
