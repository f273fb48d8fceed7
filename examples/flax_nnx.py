"""Mirror Gradient in a Flax NNX loop: `nnx_step` in place of `optimizer.update(model, grads)`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mgrad_jax import mirror_gradient, nnx_step


class Network(nnx.Module):
    """A small network with dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Predict one number a row."""
        return self.out(self.dropout(nnx.relu(self.hidden(x))))[:, 0]


def loss_fn(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared error."""
    return jnp.mean((model(x) - y) ** 2)


def main() -> None:
    """Fit a smooth function."""
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(x).sum(-1)
    model = Network(nnx.Rngs(0))
    tx = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3), optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # Calling optimizer.update once a batch instead would climb the loss of every fourth batch.
    step = nnx.jit(nnx_step(loss_fn))
    losses = [float(step(model, optimizer, x, y)) for _ in range(100)]
    print(f"loss of batch 1: {losses[0]:.4f}, of batch {len(losses)}: {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
