"""Mirror Gradient in a Flax NNX loop: the opaque form needs one more argument, `grad_fn`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mgrad_jax import mirrored


class Network(nnx.Module):
    """A small network with dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Predict one number a row."""
        return self.out(self.dropout(nnx.relu(self.hidden(x)), rngs=key))[:, 0]


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    """One batch: one update, inside which a mirror batch takes its second pass."""
    graph, start, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: nnx.State, pass_index: int) -> jax.Array:
        prediction = nnx.merge(graph, params, rest)(x, jax.random.fold_in(key, pass_index))
        return jnp.mean((prediction - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(start, 0)
    # `index` counts the calls inside `update`: every pass draws its own dropout mask.
    optimizer.update(model, grads, grad_fn=lambda params, index: jax.grad(loss_fn)(params, 1 + index))
    return loss


def main() -> None:
    """Fit a smooth function."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (256, 8))
    y = jnp.sin(x).sum(-1)
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, mirrored(optax.adam(1e-2), alpha1=1.0, alpha2=0.2, interval=3), wrt=nnx.Param)
    losses = [float(train_step(model, optimizer, x, y, jax.random.fold_in(key, j))) for j in range(100)]
    print(f"loss of batch 1: {losses[0]:.4f}, of batch {len(losses)}: {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
