"""Mirror Gradient with Flax Linen's `TrainState`: `mirror_step` in place of `apply_gradients`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.training.train_state import TrainState

from mgrad_jax import mirror_gradient, mirror_step


class Network(linen.Module):
    """A small network with dropout."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Predict one number a row."""
        hidden = linen.Dropout(0.1, deterministic=False)(linen.relu(linen.Dense(32)(x)))
        return linen.Dense(1)(hidden)[:, 0]


def main() -> None:
    """Fit a smooth function."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (256, 8))
    y = jnp.sin(x).sum(-1)
    network = Network()
    params = network.init({"params": key, "dropout": key}, x)
    tx = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3), optax.adam(1e-2))
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    def loss_fn(params: optax.Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean((state.apply_fn(params, x, rngs={"dropout": key}) - y) ** 2)

    # TrainState.apply_gradients makes one update a batch, which would climb the loss of every fourth batch.
    step = jax.jit(mirror_step(loss_fn, state.tx))
    losses = []
    for number in range(100):
        # `key` is folded once more for each pass, so that each draws its own dropout mask.
        params, opt_state, loss = step(state.params, state.opt_state, x, y, key=jax.random.fold_in(key, number))
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        losses.append(float(loss))
    print(f"loss of batch 1: {losses[0]:.4f}, of batch {len(losses)}: {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
