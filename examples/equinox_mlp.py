"""Mirror Gradient with Equinox: `mirror_step` over the arrays of the model. Needs `pip install equinox`."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from mgrad_jax import mirror_gradient, mirror_step


def main() -> None:
    """Fit a smooth function."""
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(x).sum(-1)
    model = eqx.nn.MLP(8, "scalar", width_size=32, depth=1, key=jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    tx = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3), optax.adam(1e-2))
    opt_state = tx.init(params)
    step = jax.jit(mirror_step(loss_fn, tx))
    losses = []
    for _ in range(100):
        params, opt_state, loss = step(params, opt_state, x, y)
        losses.append(float(loss))
    print(f"loss of batch 1: {losses[0]:.4f}, of batch {len(losses)}: {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
