"""Mirror Gradient in a loop that calls `update` itself: a second pass where it is asked for, and a check of that.

Where `mirror_step` or `mirrored` fits, it is shorter. A loop of one's own that makes one update a batch would climb the
loss of every fourth batch without a word; `checked` says so, and can be taken off again once the loop is right.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mgrad_jax import checked, close_batch, mirror_gradient, second_pass_pending


def loss_fn(params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Logistic loss."""
    return jnp.mean(jax.nn.softplus(-y * (x @ params)))


def main() -> None:
    """Train over sixteen batches, one of which is damaged."""
    xs = jax.random.normal(jax.random.key(0), (16, 64, 5)).at[3, 0, 0].set(jnp.nan)
    ys = jnp.sign(xs.sum(-1) + 0.1)
    optimizer = optax.chain(checked(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3)), optax.adam(0.05))
    optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=10)

    @jax.jit
    def one_pass(params: jax.Array, opt_state: Any, number: int) -> tuple[jax.Array, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, xs[number], ys[number])
        updates, opt_state = optimizer.update(grads, opt_state, params, batch=number)
        return optax.apply_updates(params, updates), opt_state, loss

    params = jnp.zeros(5)
    opt_state = optimizer.init(params)
    for number in range(len(xs)):
        for _ in range(2):
            params, opt_state, loss = one_pass(params, opt_state, number)
            if not second_pass_pending(opt_state):
                break
        opt_state = close_batch(opt_state)  # a second pass may have been refused
        if jnp.isfinite(loss):
            print(f"batch {number:2}: loss {loss:.4f}")


if __name__ == "__main__":
    main()
