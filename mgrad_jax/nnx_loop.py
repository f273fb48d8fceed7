"""One training step for Flax NNX that makes the second pass of Mirror Gradient where the optimizer asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mgrad_jax.mirror import check_loop, close_batch, second_pass_pending, update_with


def nnx_step(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """Build a training step for a model and its ``nnx.Optimizer``: `mirror_step` for Flax NNX.

    ``optimizer.update(model, grads)``, called once a batch, knows of no second pass; this step makes it. What the loss
    changes in the model, such as the statistics of batch normalization and the counters of random streams, is kept from
    both passes, so that each draws its own dropout.

    Args:
        loss_fn: ``loss_fn(model, *args, **kwargs)`` returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
        has_aux: ``loss_fn`` returns ``(scalar, aux)``.

    Returns:
        ``step(model, optimizer, *args, **kwargs) -> loss``, to be wrapped in ``nnx.jit``; it changes model and
        optimizer in place. ``loss`` (``(loss, aux)`` with ``has_aux``) is that of the first pass. The gradient is taken
        for ``optimizer.wrt``; opaque forms and line searches get what they need, as from `mirror_step`.
        ``optimizer.step`` counts updates.

    Raises:
        ValueError: by the step, as `mirror_step`.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from mgrad_jax import mirror_gradient, nnx_step
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> tx = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3), optax.adam(0.1))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> step = nnx.jit(nnx_step(lambda model, x, y: jnp.mean((model(x) - y) ** 2)))
        >>> losses = [float(step(model, optimizer, jnp.eye(2), jnp.ones((2, 1)))) for _ in range(3)]
        >>> losses[-1] < losses[0], int(optimizer.step[...])
        (True, 4)

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1, Eqs. 2 and 3.
    """

    def step(model: Any, optimizer: nnx.Optimizer[Any], *args: Any, **kwargs: Any) -> Any:
        check_loop(optimizer.opt_state, optimizer.tx, nnx.state(model, optimizer.wrt))

        def one_pass(model: Any, optimizer: nnx.Optimizer[Any]) -> Any:
            wanted = nnx.DiffState(0, optimizer.wrt)
            out, grads = nnx.value_and_grad(loss_fn, argnums=wanted, has_aux=has_aux)(model, *args, **kwargs)
            # From the state after the pass: the random streams have moved on.
            parts: tuple[Any, ...] = nnx.split(model, optimizer.wrt, ...)
            graph, _, rest = parts

            def value_fn(params: Any) -> jax.Array:
                out = loss_fn(nnx.merge(graph, params, rest), *args, **kwargs)
                value: jax.Array = out[0] if has_aux else out
                return value

            offered = {
                "value": out[0] if has_aux else out,
                "grad": grads,
                "value_fn": value_fn,
                "obj_fn": value_fn,
                "grad_fn": lambda params, index: jax.grad(value_fn)(params),
                "batch": (args, kwargs),
            }
            update_with(optimizer.update, model, grads, **offered)
            return out

        def second_pass(model: Any, optimizer: nnx.Optimizer[Any]) -> None:
            one_pass(model, optimizer)
            nnx.update(optimizer.opt_state, nnx.state(close_batch(optimizer.opt_state)))

        out = one_pass(model, optimizer)
        pending = second_pass_pending(optimizer.opt_state)
        if isinstance(pending, jax.core.Tracer):
            nnx.cond(pending, second_pass, lambda *unchanged: None, model, optimizer)
        elif pending:
            second_pass(model, optimizer)
        return out

    return step
