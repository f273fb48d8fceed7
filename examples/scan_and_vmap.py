"""A grid of alpha1 and alpha2 as one program: an epoch is a scan over passes, the grid is a vmap.

The scan goes over `pass_schedule`, in which a mirror batch appears twice. No condition is left in the program, so the
grid costs what Algorithm 1 costs, 1 + 1/interval gradients per batch, and not two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mgrad_jax import mirror_gradient
from mgrad_jax.mirror import pass_schedule, restart_epoch

N_BATCHES, N_EPOCHS, INTERVAL = 10, 20, 3
# Outside the program, since it fixes the length of the scan; it does not depend on alpha.
PASSES = jnp.asarray(pass_schedule(mirror_gradient(interval=INTERVAL).init(None), N_BATCHES))
Carry = tuple[jax.Array, optax.OptState]  # parameters and the optimizer's state


def loss_fn(params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Logistic loss."""
    return jnp.mean(jax.nn.softplus(-y * (x @ params)))


def train(alpha1: jax.Array, alpha2: jax.Array, xs: jax.Array, ys: jax.Array) -> jax.Array:
    """Train one member of the grid and return its final loss; alpha1 and alpha2 may be traced."""
    optimizer = optax.chain(mirror_gradient(alpha1, alpha2, INTERVAL), optax.adam(0.05))
    params = jnp.zeros(xs.shape[-1])
    opt_state = optimizer.init(params)

    def one_pass(carry: Carry, batch: jax.Array) -> tuple[Carry, None]:
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params, xs[batch], ys[batch])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry: Carry, _: None) -> tuple[Carry, None]:
        params, opt_state = carry
        return jax.lax.scan(one_pass, (params, restart_epoch(opt_state)), PASSES)[0], None

    (params, _), _ = jax.lax.scan(epoch, (params, opt_state), length=N_EPOCHS)
    return jnp.mean(jax.vmap(loss_fn, (None, 0, 0))(params, xs, ys))


def main() -> None:
    """Train nine members at once."""
    xs = jax.random.normal(jax.random.key(0), (N_BATCHES, 64, 5))
    ys = jnp.sign(xs.sum(-1) + 0.5 * jax.random.normal(jax.random.key(1), (N_BATCHES, 64)))
    alpha1, alpha2 = jnp.array([0.6, 0.8, 1.0]), jnp.array([0.1, 0.2, 0.3])
    over_grid = jax.vmap(jax.vmap(train, (None, 0, None, None)), (0, None, None, None))
    losses = jax.jit(over_grid)(alpha1, alpha2, xs, ys)
    for first, row in zip(alpha1, losses, strict=True):
        print(f"alpha1 {first:.1f}:", "  ".join(f"alpha2 {a:.1f} {v:.4f}" for a, v in zip(alpha2, row, strict=True)))


if __name__ == "__main__":
    main()
