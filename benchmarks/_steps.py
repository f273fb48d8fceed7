"""Training steps as programs of their own: some batches with the trainer's passes, and nothing done once an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _machine import program_memory

from mgrad_jax.data import Batch, Interactions
from mgrad_jax.data.sampling import sample_negatives, user_history
from mgrad_jax.training.epoch import SplitModel, train_pass


@dataclass
class Case:
    """One program, compiled.

    Attributes:
        start: makes fresh parameters and optimizer state, which `run` consumes.
        run: the compiled program.
        passes: times the scan's body runs.
        compile_seconds: tracing, lowering and compiling.
        program_bytes: XLA's own account of the program: arguments, results and temporaries.
        operations: floating-point operations of the dense products in one pass.
    """

    start: Callable[[], Any]
    run: Callable[[Any], Any]
    passes: int
    compile_seconds: float
    program_bytes: int
    operations: float


def random_batches(data: Interactions, n_batches: int, batch_size: int) -> Batch:
    """Batches (n_batches, batch_size) of random training interactions with negatives; small data are repeated."""
    rows = np.resize(np.random.default_rng(0).permutation(len(data.train)), n_batches * batch_size)
    users, positives = jnp.asarray(data.train[rows, 0]), jnp.asarray(data.train[rows, 1])
    negatives = sample_negatives(jax.random.key(0), users, user_history(data))
    batches: Batch = jax.tree.map(lambda x: x.reshape(n_batches, batch_size), Batch(users, positives, negatives))
    return batches


def compile_passes(
    parts: SplitModel, tx: optax.GradientTransformation, opt_state: Any, schedule: np.ndarray, batches: Batch
) -> Case:
    """The trainer's scan over passes, from the model's parameters and `opt_state`."""

    def start() -> Any:
        return jax.block_until_ready(jax.tree.map(jnp.copy, (parts.params, opt_state)))

    def passes(carry: Any, epoch_state: Any, constants: Any, batches: Batch, key: jax.Array) -> Any:
        step = partial(train_pass, parts.graphdef, tx, epoch_state, constants, key, batches)
        numbers = jnp.arange(len(schedule), dtype=jnp.int32)
        return jax.lax.scan(step, carry, (jnp.asarray(schedule), numbers))

    carry = start()
    arguments = (parts.epoch_state, parts.constants, batches, jax.random.key(0))
    started = time.perf_counter()
    traced = jax.jit(passes, donate_argnums=0).trace(carry, *arguments)
    compiled = traced.lower().compile()
    return Case(
        start=start,
        run=lambda carry: compiled(carry, *arguments),
        passes=len(schedule),
        compile_seconds=time.perf_counter() - started,
        program_bytes=program_memory(compiled),
        operations=_dense_operations(traced.jaxpr.jaxpr),
    )


def _dense_operations(jaxpr: Any) -> int:
    """Operations of the dense products in a program; the body of a loop counts once."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += _dense_operations(inner) if hasattr(inner, "eqns") else 0
    return total


def deviation(ours: Any, expected: Any) -> float:
    """The largest difference of two arrays over the largest number expected."""
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - expected).max() / np.abs(expected).max())
