"""Mirror Gradient in a plain Optax loop: one more line in the chain, and `mirror_step` for the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mgrad_jax import mirror_gradient, mirror_step

N_BATCHES, N_EPOCHS = 16, 10


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared error of a small network."""
    hidden = jnp.tanh(x @ params["in"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def make_data(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Noisy samples of a smooth function, cut into batches."""
    key_x, key_noise = jax.random.split(key)
    x = jax.random.normal(key_x, (N_BATCHES, 32, 8))
    y = jnp.sin(x).sum(-1) + 0.1 * jax.random.normal(key_noise, (N_BATCHES, 32))
    return x, y


def train(optimizer: optax.GradientTransformation) -> float:
    """Train from a fixed start and return the mean loss of the last epoch."""
    key_data, key_in, key_out = jax.random.split(jax.random.key(0), 3)
    xs, ys = make_data(key_data)
    params = {"in": 0.3 * jax.random.normal(key_in, (8, 32)), "out": 0.1 * jax.random.normal(key_out, (32,))}
    opt_state = optimizer.init(params)
    step = jax.jit(mirror_step(loss_fn, optimizer))
    for _ in range(N_EPOCHS):
        losses = []
        for x, y in zip(xs, ys, strict=True):
            params, opt_state, loss = step(params, opt_state, x, y)
            losses.append(loss)
    return float(jnp.mean(jnp.stack(losses)))


def main() -> None:
    """Compare Adam with and without Mirror Gradient, by the same loop."""
    plain = optax.adam(1e-2)
    mirror = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3, steps_per_epoch=N_BATCHES), plain)
    print(f"training loss after {N_EPOCHS} epochs: adam {train(plain):.4f}, with Mirror Gradient {train(mirror):.4f}")


if __name__ == "__main__":
    main()
