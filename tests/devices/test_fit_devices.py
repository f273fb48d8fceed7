"""Training over several devices: the same run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mgrad_jax import devices, mirror_gradient, mirrored, models
from mgrad_jax.data import demo_interactions
from mgrad_jax.models.adversarial import adversarial
from mgrad_jax.optimizers import make_optimizer
from mgrad_jax.sharpness_aware import sam, ssam_d, ssam_f
from mgrad_jax.training import fit
from mgrad_jax.training.checkpoint import Checkpoints
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.run import train_run

STEPS = {"steps_per_epoch": 3, "refresh_epochs": 1}


@pytest.fixture(scope="module")
def data():
    return demo_interactions(n_users=90, n_items=60)


def chain():
    return optax.chain(mirror_gradient(), optax.adam(1e-3))


def run(name, data, n, tx=None, *, change=lambda model: model, dtype=jnp.float64, **options):
    """Losses, test metrics and parameters of a run over n devices."""
    config = {key: options.pop(key) for key in list(options) if key in ("embedding_dim",)}
    model = models.create(name, data, dtype=dtype, **config)
    model = change(model)
    mesh = None if n == 1 else devices.mesh(n)
    result = fit(model, data, chain() if tx is None else tx, **{"epochs": 2, "batch_size": 360, **options}, mesh=mesh)
    losses = [report.loss for report in result.history]
    return losses, result.test, nnx.state(model, nnx.Param)


def assert_same(found, expected):
    """Equal but for the order of sums, in float64."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    assert found[1] == expected[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found[2], expected[2])


@pytest.mark.usefixtures("x64")
def test_a_run_is_the_same_on_eight_devices_and_its_tables_are_split(data):
    found = run("vbpr", data, 8)
    assert_same(found, run("vbpr", data, 1))
    users, kernel = found[2]["user_embedding"][...], found[2]["item_linear"]["kernel"][...]
    assert users.addressable_shards[0].data.shape == (data.n_users, users.shape[1] // 8)
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0] // 8, kernel.shape[1])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_run_is_the_same_on_any_number_of_devices(data):
    expected = run("freedom", data, 1)
    for n in (2, 4, 8):
        assert_same(run("freedom", data, n), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", sorted(set(models.names()) - {"vbpr", "freedom"}))
def test_every_model_s_run_is_the_same_on_eight_devices(name, data):
    assert_same(run(name, data, 8), run(name, data, 1))


FORMS = {
    "max_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), chain()),
    "mirrored": lambda: mirrored(optax.adam(1e-3)),
    "sam": lambda: sam(optax.adam(1e-3)),
    "ssam_f": lambda: ssam_f(optax.adam(1e-3), fisher_samples=8, **STEPS),
    "ssam_d": lambda: ssam_d(optax.adam(1e-3), epochs=2, **STEPS),
    "muon": lambda: make_optimizer("muon", learning_rate=1e-3),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_s_run_is_the_same_on_eight_devices(form, data):
    assert_same(run("vbpr", data, 8, FORMS[form]()), run("vbpr", data, 1, FORMS[form]()))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{"evaluate": "stale"}, {"learning_rate_decay": (0.5, 1.0)}])
def test_a_run_with_other_settings_is_the_same_on_eight_devices(options, data):
    assert_same(run("vbpr", data, 8, **options), run("vbpr", data, 1, **options))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_an_adversarial_run_is_the_same_on_eight_devices(data):
    def change(model):
        return adversarial(model, epsilon=0.1, weight=1.0)

    assert_same(run("vbpr", data, 8, change=change), run("vbpr", data, 1, change=change))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:tables of width 20 are kept whole")
def test_a_width_that_the_devices_do_not_divide_gives_the_same_run(data):
    assert_same(run("freedom", data, 8, embedding_dim=20), run("freedom", data, 1, embedding_dim=20))


def test_a_run_goes_on_from_its_checkpoint_on_another_number_of_devices(tmp_path):
    def trained(name, epochs, devices=1, resume=False):
        settings = {"model": "vbpr", "data": "demo", "batch_size": 3600, "epochs": epochs, "out": str(tmp_path / name)}
        return train_run(RunConfig(**settings), resume=resume, devices=devices)

    trained("spread", 1, devices=8)
    with pytest.warns(UserWarning, match=r"devices was 8 and is 2\); the last bits of its numbers may differ"):
        trained("spread", 2, devices=2, resume=True)
    with pytest.warns(UserWarning, match=r"devices was 2 and is 1\)"):
        resumed = trained("spread", 3, resume=True)
    whole = trained("whole", 3)
    assert resumed["epochs_run"] == 3
    np.testing.assert_allclose(list(resumed["test"].values()), list(whole["test"].values()), atol=1e-6)


@pytest.mark.slow
def test_the_same_devices_give_the_same_bits(data, tmp_path):
    first = run("vbpr", data, 4, dtype=jnp.float32, checkpoints=Checkpoints(tmp_path), epochs=1)
    resumed = run("vbpr", data, 4, dtype=jnp.float32, checkpoints=Checkpoints(tmp_path), resume=True)
    unbroken = run("vbpr", data, 4, dtype=jnp.float32)
    assert unbroken[0] == first[0] + resumed[0]
    jax.tree.map(np.testing.assert_array_equal, resumed[2], unbroken[2])
