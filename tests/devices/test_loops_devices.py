"""Mirror Gradient and its relatives in loops of one's own, whatever way JAX is told to split the parameters."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mgrad_jax import mirror_gradient, mirror_step, mirrored
from mgrad_jax.sharpness_aware import sam, ssam_d, ssam_f

SAMPLES, WIDTH, OUTPUTS = 16, 16, 8
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(SAMPLES, WIDTH)), rng.normal(size=(SAMPLES, OUTPUTS))
PARAMS = {"kernel": rng.normal(size=(WIDTH, OUTPUTS)), "bias": np.zeros(OUTPUTS)}
FORMS = {
    "chain": lambda: optax.chain(mirror_gradient(interval=2), optax.adam(1e-2)),
    "mirrored": lambda: mirrored(optax.adam(1e-2), interval=2),
    "sam": lambda: sam(optax.adam(1e-2)),
    "ssam_d": lambda: ssam_d(optax.adam(1e-2), steps_per_epoch=2, epochs=4, refresh_epochs=1),
    "ssam_f": lambda: ssam_f(optax.adam(1e-2), steps_per_epoch=2, refresh_epochs=1, fisher_samples=4),
}
pytestmark = pytest.mark.usefixtures("x64")


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["kernel"] + params["bias"][None]) - y) ** 2)


def trained(form, mesh=None, spec=None, steps=5):
    """The kernel after some steps, and how often the step was traced."""
    traces = []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        params, (x, y) = jax.tree.map(jnp.asarray, (PARAMS, (X, Y)))
        if mesh is not None:
            whole = NamedSharding(mesh, P())
            kernel = jax.device_put(params["kernel"], NamedSharding(mesh, spec))
            params, (x, y) = (
                {"kernel": kernel, "bias": jax.device_put(params["bias"], whole)},
                jax.device_put((x, y), whole),
            )
        tx = FORMS[form]()
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            traces.append(1)
            if form != "ssam_f":
                return mirror_step(lambda params: loss(params, x, y), tx)(params, state)[:2]

            def of_sample(params, i):
                return jax.grad(loss)(params, x[i][None], y[i][None])

            grads = jax.grad(loss)(params, x, y)
            arguments = {"grad_fn": lambda params, _: jax.grad(loss)(params, x, y), "sample_grad_fn": of_sample}
            updates, state = tx.update(grads, state, params, n_samples=SAMPLES, **arguments)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
    return params["kernel"], len(traces)


@pytest.fixture(scope="module")
def of_one_device():
    with jax.enable_x64(True):
        return {form: np.asarray(trained(form)[0]) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_split_parameters_are_trained_as_whole_ones_and_stay_split(form, mode, of_one_device):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    kernel, traces = trained(form, mesh, P("x", None))
    np.testing.assert_allclose(kernel, of_one_device[form], rtol=0, atol=1e-12)
    assert kernel.addressable_shards[0].data.shape == (WIDTH // 8, OUTPUTS)
    assert traces == 1


@pytest.mark.parametrize("form", ["chain", "mirrored", "sam"])
def test_inside_shard_map_the_loss_is_averaged_over_the_devices(form, of_one_device):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = FORMS[form]()

    def step(params, state, x, y):
        return mirror_step(lambda params: jax.lax.pmean(loss(params, x, y), "x"), tx)(params, state)[:2]

    spread = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("x"), P("x")), out_specs=P()))
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    for _ in range(5):
        params, state = spread(params, state, jnp.asarray(X), jnp.asarray(Y))
    np.testing.assert_allclose(params["kernel"], of_one_device[form], rtol=0, atol=1e-12)
