"""Mirror Gradient as an Optax transformation, in a visible and an opaque form.

On every ``interval``-th batch of an epoch the optimizer makes two updates on the same batch: one along the gradient,
scaled by ``alpha1``, and one against the gradient taken afresh at the moved parameters, scaled by ``alpha2``. To second
order in the step size that is gradient descent with a penalty on the squared gradient norm, which prefers flat minima.

======================  ==============================================================================================
`mirror_gradient`       visible form: a link of `optax.chain`; the loop makes the second pass when the state asks for it
`mirror_step`           one jit-able training step for any loss and any optimizer; makes the second pass itself
`mirrored`              opaque form: wraps a whole optimizer, both updates inside one call of ``update``
`replay`, `replayed`    the control with equally many updates: the second pass repeats the batch with factor +1
`second_pass_pending`   does the state ask for a second pass over the same batch?
`pass_schedule`         the batch of every pass of one epoch, for a scan without conditions
`restart_epoch`         numbers the batches from 0 again
======================  ==============================================================================================

This file needs JAX and Optax only, so that it can be copied into any project.

References:
    Zhong, Huang, Li, Wen, Qin and Lin, *Mirror Gradient: Towards Robust Multimodal Recommender Systems via Exploring
    Flat Local Minima*, WWW 2024, https://arxiv.org/abs/2402.11262: Section 3, Algorithm 1, Eqs. 2-3, Theorem 3.2.
"""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

ScalarOrSchedule: TypeAlias = float | jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]
GradFn: TypeAlias = Callable[[Any, int], Any]

_CLIP_EPSILON = 1e-6


class MirrorState(NamedTuple):
    """State of `mirror_gradient` and `replay`.

    Attributes:
        count: completed batches, over all epochs; what schedules of alpha are called with. Shape (), int32.
        phase: number of the current batch, modulo ``steps_per_epoch``, or modulo ``interval`` where the numbering
            never restarts. Shape (), int32.
        second: the next update is the second pass over the current batch. Shape (), bool.
        interval: every how many batches one is mirrored. Shape (), int32.
        steps_per_epoch: batches in an epoch; 0 where the numbering never restarts by itself. Shape (), int32.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as optax's own states do
    phase: jax.Array
    second: jax.Array
    interval: jax.Array
    steps_per_epoch: jax.Array


class MirroredState(NamedTuple):
    """State of `mirrored` and `replayed`.

    Attributes:
        inner_state: state of ``optax.chain(mirror_gradient(...), optimizer)``, always between two batches.
    """

    inner_state: Any


def mirror_gradient(
    alpha1: ScalarOrSchedule = 1.0,
    alpha2: ScalarOrSchedule = 0.2,
    interval: int = 3,
    steps_per_epoch: int | None = None,
    max_norm: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale gradients as Mirror Gradient asks, pass by pass.

    Put it first in a chain, before the optimizer. With :math:`\Phi` one update of that optimizer, :math:`g` the
    gradient and :math:`j` the number of the batch :math:`b_j` in its epoch, a batch with
    :math:`j \bmod \beta \neq 0` is trained as usual, and one with :math:`j \bmod \beta = 0` takes two updates:

    .. math::
        \theta' = \theta + \Phi(\alpha_1\, g(\theta; b_j)), \qquad
        \theta'' = \theta' + \Phi(-\alpha_2\, g(\theta'; b_j)).

    For gradient descent with step :math:`\eta` both together are

    .. math::
        \theta'' = \theta - \eta \nabla \left[ (\alpha_1 - \alpha_2) L(\theta)
        + \tfrac{1}{2} \eta \alpha_1 \alpha_2 \lVert \nabla L(\theta) \rVert^2 \right] + O(\eta^3).

    The training loop makes the second pass whenever `second_pass_pending` says so; `mirror_step` is such a loop body.

    Args:
        alpha1: factor of the first pass over a mirror batch; a number, a scalar array (also traced: one program can
            train a whole grid with `jax.vmap`) or an Optax schedule, which is called with the number of completed
            batches.
        alpha2: factor of the second pass, which takes ``-alpha2``; like ``alpha1``, and smaller than it: at
            ``alpha1 == alpha2`` the first-order descent vanishes, below that it becomes ascent.
        interval: one batch in how many is a mirror batch; the paper's beta. A Python integer.
        steps_per_epoch: batches in an epoch; the numbering restarts after that many, so that the first batch of every
            epoch is a mirror batch. By default the interval runs over all batches, and a loop can call
            `restart_epoch`. A Python integer.
        max_norm: clip by global norm before the last update of every batch: on a mirror batch the second pass, after
            its factor, and never the first, as the published trainer does; `optax.clip_by_global_norm` in the chain
            would clip every pass. Coefficient ``min(1, max_norm / (norm + 1e-6))``.

    Returns:
        A transformation with a `MirrorState`. Dtypes of the gradients are kept, and ``params`` is not used.

    Raises:
        ValueError: if a factor or ``max_norm`` is not positive and finite (where its value is known), or ``interval``
            or ``steps_per_epoch`` is not a positive Python integer.

    Warns:
        UserWarning: if ``alpha1 <= alpha2``, where both values are known.

    Notes:
        - `optax.inject_hyperparams` needs ``static_args=("interval", "steps_per_epoch")``. A schedule handed to it
          counts passes; a schedule handed to this function counts batches.
        - In `optax.MultiSteps`, ``MultiSteps(chain(mirror_gradient(), adam(lr)), k)``, a batch is k mini-batches,
          and the second pass replays the same k mini-batches.
        - In `optax.partition` or `optax.masked` the second pass steps every optimizer again, with a factor of 1 where
          there is no mirror; ``max_norm`` sees the masked-in gradients only.
        - `optax.apply_if_finite` belongs outside the chain: a rejected first pass then skips the batch.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mgrad_jax import mirror_gradient, second_pass_pending
        >>> tx = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3), optax.sgd(0.1))
        >>> params = jnp.array(1.0)
        >>> state = tx.init(params)
        >>> for batch in (1.0, 2.0, 3.0):
        ...     for _ in range(2):
        ...         grads = jax.grad(lambda p: 0.5 * batch * p**2)(params)
        ...         updates, state = tx.update(grads, state, params)
        ...         params = optax.apply_updates(params, updates)
        ...         print(f"batch {batch:.0f}: {params:.4f}")
        ...         if not second_pass_pending(state):
        ...             break
        batch 1: 0.9000
        batch 1: 0.9180
        batch 2: 0.7344
        batch 3: 0.5141

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1, Eqs. 2 and 3, Theorem 3.2.
    """
    return _mirror(alpha1, alpha2, interval, steps_per_epoch, max_norm)


def replay(
    interval: int = 3, steps_per_epoch: int | None = None, max_norm: jax.typing.ArrayLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Repeat every ``interval``-th batch, unscaled: plain training with as many updates as Mirror Gradient.

    The control for a comparison at equal gradient evaluations:
    :math:`\theta' = \theta + \Phi(g(\theta; b_j))`, :math:`\theta'' = \theta' + \Phi(g(\theta'; b_j))` where
    `mirror_gradient` has the factors :math:`\alpha_1` and :math:`-\alpha_2`.

    Args:
        interval: one batch in how many is repeated.
        steps_per_epoch: batches in an epoch, as in `mirror_gradient`.
        max_norm: clip before the last update of every batch, as in `mirror_gradient`.

    Returns:
        A transformation with a `MirrorState`, to be used exactly like `mirror_gradient`.

    Raises:
        ValueError: as `mirror_gradient`.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from mgrad_jax import replay, second_pass_pending
        >>> tx = optax.chain(replay(interval=2), optax.sgd(1.0))
        >>> state = tx.init(jnp.array(0.0))
        >>> for _ in range(4):
        ...     update, state = tx.update(jnp.array(1.0), state)
        ...     print(float(update), bool(second_pass_pending(state)))
        -1.0 True
        -1.0 False
        -1.0 False
        -1.0 True

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: the schedule of Algorithm 1; the control itself is not theirs.
    """
    return _two_passes(lambda count: 1.0, lambda count: 1.0, interval, steps_per_epoch, max_norm)


def mirrored(
    optimizer: optax.GradientTransformation,
    alpha1: ScalarOrSchedule = 1.0,
    alpha2: ScalarOrSchedule = 0.2,
    interval: int = 3,
    steps_per_epoch: int | None = None,
    max_norm: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that one ``update`` per batch performs both updates of Mirror Gradient.

    The opaque form of `mirror_gradient`, for loops that call ``update`` once per batch. On a mirror batch it returns
    :math:`\theta'' - \theta = \Phi(\alpha_1 g(\theta; b_j)) + \Phi(-\alpha_2 g(\theta'; b_j))`, where the second
    gradient comes from ``grad_fn``; on any other batch it returns the optimizer's own update.

    ``update(grads, state, params, *, grad_fn, **extra_args)`` needs ``params`` and ``grad_fn(params, index)``, the
    convention of ``optax.contrib.sam(opaque_mode=True)``, so that one ``grad_fn`` serves both: ``index`` is the Python
    integer 0 in the first call inside ``update``, and the incoming ``grads`` were evaluated before it. For independent
    dropout in each pass, take ``grads`` with ``jax.random.fold_in(key, 0)`` and let ``grad_fn`` use
    ``jax.random.fold_in(key, 1 + index)``. In a data-parallel loop ``grad_fn`` returns the averaged gradient.

    Args:
        optimizer: any Optax optimizer; it is stepped in both passes, moments and counters included.
        alpha1: as in `mirror_gradient`.
        alpha2: as in `mirror_gradient`.
        interval: as in `mirror_gradient`.
        steps_per_epoch: as in `mirror_gradient`.
        max_norm: as in `mirror_gradient`.

    Returns:
        A transformation with a `MirroredState`. ``update`` raises ValueError without ``params`` or ``grad_fn``.
        Further arguments go to ``optimizer``, in both passes; ``grad``, if given, is renewed for the second.

    Raises:
        ValueError: as `mirror_gradient`.

    Warns:
        UserWarning: as `mirror_gradient`.

    Notes:
        Nesting: gradient processing goes inside, ``mirrored(optax.chain(optax.clip(1.0), optax.adam(lr)))``, so that
        the second gradient is processed too; so does `optax.apply_if_finite`, which looks only at the gradient that
        comes in. `optax.masked` and `optax.partition` go inside as well, since ``grad_fn`` returns the whole
        gradient. In ``optax.MultiSteps(mirrored(...), k)`` let ``grad_fn`` be the gradient over all k mini-batches.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mgrad_jax import mirrored
        >>> tx = mirrored(optax.sgd(0.1), alpha1=1.0, alpha2=0.2, interval=3)
        >>> params = jnp.array(1.0)
        >>> state = tx.init(params)
        >>> for batch in (1.0, 2.0, 3.0):
        ...     grad_fn = jax.grad(lambda p, index: 0.5 * batch * p**2)
        ...     updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"batch {batch:.0f}: {params:.4f}")
        batch 1: 0.9180
        batch 2: 0.7344
        batch 3: 0.5141

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1, Eqs. 2 and 3.
    """
    return _opaque(_mirror(alpha1, alpha2, interval, steps_per_epoch, max_norm), optimizer)


def replayed(
    optimizer: optax.GradientTransformation,
    interval: int = 3,
    steps_per_epoch: int | None = None,
    max_norm: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that one ``update`` per batch repeats every ``interval``-th batch: opaque `replay`.

    On a repeated batch it returns :math:`\Phi(g(\theta; b_j)) + \Phi(g(\theta'; b_j))`.

    Args:
        optimizer: any Optax optimizer.
        interval: as in `replay`.
        steps_per_epoch: as in `replay`.
        max_norm: as in `replay`.

    Returns:
        A transformation with a `MirroredState`, to be called exactly like that of `mirrored`.

    Raises:
        ValueError: as `replay`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mgrad_jax import replayed
        >>> tx = replayed(optax.sgd(0.5), interval=2)
        >>> params, grad_fn = jnp.array(8.0), lambda p, index: p
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params)
        2.0
        1.0

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: the schedule of Algorithm 1; the control itself is not theirs.
    """
    return _opaque(replay(interval, steps_per_epoch, max_norm), optimizer)


def second_pass_pending(opt_state: Any) -> jax.Array:
    """Tell whether the next update has to be the second pass over the same batch.

    Args:
        opt_state: any optimizer state; every `MirrorState` inside it is found, however it is nested.

    Returns:
        Bool scalar, usable under `jax.jit`; with the leading axes of the state where that is a stack of states. False
        without a `MirrorState`, and for `mirrored`, which finishes the pair inside ``update``.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from mgrad_jax import mirror_gradient, second_pass_pending
        >>> tx = optax.chain(mirror_gradient(), optax.adam(1e-3))
        >>> state = tx.init(jnp.zeros(2))
        >>> bool(second_pass_pending(state))
        False
        >>> _, state = tx.update(jnp.ones(2), state)
        >>> bool(second_pass_pending(state))
        True

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1.
    """
    pending = jnp.asarray(False)
    for state in _mirror_states(opt_state):
        pending = pending | _array(state.second)
    return pending


def restart_epoch(opt_state: Any) -> Any:
    """Number the batches from 0 again: the next one is a mirror batch, as at the start of every published epoch.

    Args:
        opt_state: any optimizer state, also a stack of states; `mirrored` is reached as well.

    Returns:
        The same state with ``phase`` 0 and ``second`` False in every `MirrorState`. Moments and counters stay.

    Examples:
        >>> import jax.numpy as jnp
        >>> from mgrad_jax import mirror_gradient
        >>> from mgrad_jax.mirror import restart_epoch
        >>> tx = mirror_gradient()
        >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        >>> bool(state.second), bool(restart_epoch(state).second)
        (True, False)

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1.
    """

    def restart(state: MirrorState) -> MirrorState:
        # tree.map: a framework may have wrapped the leaves in its own variables.
        return state._replace(
            phase=jax.tree.map(jnp.zeros_like, state.phase), second=jax.tree.map(jnp.zeros_like, state.second)
        )

    return _map_mirror_states(restart, opt_state)


def pass_schedule(opt_state: Any, n_batches: int) -> np.ndarray:
    r"""List the batch of every pass of one epoch, which starts at batch 0.

    A mirror batch appears twice, so the list has :math:`J + \lceil J / \beta \rceil` entries. A `jax.lax.scan` over it
    has no condition left; under `jax.vmap` a condition would compute both of its branches on every batch.

    Args:
        opt_state: concrete optimizer state; a stack of states (from `jax.vmap`) counts as one where they agree.
        n_batches: batches in the epoch.

    Returns:
        int32 array of batch numbers. ``0 .. n_batches - 1`` without a `MirrorState`, and for `mirrored`, which makes
        both passes by itself.

    Raises:
        ValueError: if the state is traced, if ``n_batches`` is no positive integer or contradicts the state's
            ``steps_per_epoch``, or if two schedules in one state differ.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from mgrad_jax import mirror_gradient
        >>> from mgrad_jax.mirror import pass_schedule
        >>> tx = optax.chain(mirror_gradient(interval=3), optax.adam(1e-3))
        >>> print(pass_schedule(tx.init(jnp.zeros(2)), 5))
        [0 0 1 2 3 3 4]

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1.
    """
    _check_positive_int("n_batches", n_batches)
    schedules: set[tuple[int, int]] = set()
    for state in _mirror_states(opt_state):
        fields = _array(state.interval), _array(state.steps_per_epoch)
        if any(isinstance(field, jax.core.Tracer) for field in fields):
            raise ValueError("The state is traced: call pass_schedule outside jax.jit, and pass its result in.")
        schedules |= {(int(interval), int(steps)) for interval, steps in zip(*map(np.ravel, fields), strict=True)}
    if len(schedules) > 1:
        raise ValueError(
            f"One optimizer state holds several mirror schedules, as (interval, steps_per_epoch): {sorted(schedules)}. "
            "Give all of them the same, or train them apart."
        )
    batches = np.arange(n_batches, dtype=np.int32)
    if not schedules:
        return batches
    ((interval, steps),) = schedules
    if steps not in (0, n_batches):
        raise ValueError(
            f"The optimizer was built with steps_per_epoch={steps}, but the epoch has {n_batches} batches."
        )
    return np.repeat(batches, np.where(batches % interval == 0, 2, 1))


def mirror_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any, Any]]:
    r"""Build a training step that makes the second pass of Mirror Gradient where the optimizer asks for it.

    The step evaluates the gradient, updates, and, if `second_pass_pending`, does so once more on the same batch at
    the moved parameters. It serves any optimizer: a plain one takes one pass and traces no second; an opaque one
    (`mirrored`, ``optax.contrib.sam(opaque_mode=True)``) is handed its ``grad_fn``.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs)`` returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
        optimizer: an Optax optimizer; ``update`` is also given ``value``, ``grad``, ``value_fn(params)`` and
            ``grad_fn(params, index)``, those of them that it accepts. (``optax.contrib.sam`` refuses arguments that it
            does not know, so it cannot be a link of a chain here.)
        has_aux: ``loss_fn`` returns ``(scalar, aux)``.

    Returns:
        ``step(params, opt_state, *args, key=None, **kwargs) -> (params, opt_state, loss)``, to be wrapped in
        `jax.jit`. ``loss`` (``(loss, aux)`` with ``has_aux``) is that of the first pass, which the published trainer
        adds up. With a ``key``, ``loss_fn`` is given ``key=jax.random.fold_in(key, pass_index)`` with the
        pass index 0 or 1, so each pass draws its own dropout.

    Raises:
        ValueError: by the step, if the optimizer is mirrored and accumulates gradients with `optax.MultiSteps`: the
            second pass would have to repeat all mini-batches, and the step sees only one.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mgrad_jax import mirror_gradient, mirror_step
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> tx = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3), optax.sgd(0.1))
        >>> step = jax.jit(mirror_step(loss_fn, tx))
        >>> params = jnp.zeros(2)
        >>> opt_state = tx.init(params)
        >>> for _ in range(3):
        ...     params, opt_state, loss = step(params, opt_state, jnp.eye(2))
        ...     print(f"{loss:.4f}")
        1.0000
        0.8427
        0.6826

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1, Eqs. 2 and 3.
    """

    def step(
        params: Any, opt_state: Any, *args: Any, key: jax.Array | None = None, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        _refuse_accumulation(opt_state)

        def loss_of(params: Any, pass_index: int) -> Any:
            keyed = {} if key is None else {"key": jax.random.fold_in(key, pass_index)}
            return loss_fn(params, *args, **kwargs, **keyed)

        def one_pass(params: Any, opt_state: Any, pass_index: int) -> tuple[Any, Any, Any]:
            def value_fn(params: Any) -> Any:
                out = loss_of(params, pass_index)
                return out[0] if has_aux else out

            def grad_fn(params: Any, index: int) -> Any:
                grads = jax.grad(loss_of, has_aux=has_aux)(params, pass_index + 1 + index)
                return grads[0] if has_aux else grads

            out, grads = jax.value_and_grad(loss_of, has_aux=has_aux)(params, pass_index)
            extra_args = {
                "value": out[0] if has_aux else out,
                "grad": grads,
                "value_fn": value_fn,
                "grad_fn": grad_fn,
            }
            updates, opt_state = optimizer.update(grads, opt_state, params, **_accepted(optimizer.update, extra_args))
            return optax.apply_updates(params, updates), opt_state, out

        def second_pass(params: Any, opt_state: Any) -> tuple[Any, Any]:
            params, opt_state, _ = one_pass(params, opt_state, 1)
            # A wrapper such as optax.apply_if_finite may have refused the update; the batch is over all the same.
            return params, _map_mirror_states(_close_batch, opt_state)

        params, opt_state, out = one_pass(params, opt_state, 0)
        if _mirror_states(opt_state):
            params, opt_state = _when(second_pass_pending(opt_state), second_pass, params, opt_state)
        return params, opt_state, out

    return step


def _mirror(
    alpha1: ScalarOrSchedule,
    alpha2: ScalarOrSchedule,
    interval: int,
    steps_per_epoch: int | None,
    max_norm: jax.typing.ArrayLike | None,
) -> optax.GradientTransformationExtraArgs:
    """`mirror_gradient`, one frame deeper, so that the warning points at the caller of either form."""
    _check_factor("alpha1", alpha1)
    _check_factor("alpha2", alpha2)
    first_value, second_value = _known(alpha1), _known(alpha2)
    if first_value is not None and second_value is not None and first_value <= second_value:
        warnings.warn(
            f"alpha1 = {first_value:g} is not larger than alpha2 = {second_value:g}: "
            "mirror batches no longer descend to first order.",
            UserWarning,
            stacklevel=3,
        )
    return _two_passes(
        lambda count: _at(alpha1, count),
        lambda count: jnp.negative(_at(alpha2, count)),
        interval,
        steps_per_epoch,
        max_norm,
    )


def _two_passes(
    first_factor: Callable[[jax.Array], jax.typing.ArrayLike],
    second_factor: Callable[[jax.Array], jax.typing.ArrayLike],
    interval: int,
    steps_per_epoch: int | None,
    max_norm: jax.typing.ArrayLike | None,
) -> optax.GradientTransformationExtraArgs:
    """The machinery of `mirror_gradient` and `replay`, which differ in their factors only."""
    _check_positive_int("interval", interval)
    if steps_per_epoch is not None:
        _check_positive_int("steps_per_epoch", steps_per_epoch)
    if max_norm is not None:
        _check_factor("max_norm", max_norm, schedule=False)

    def init_fn(params: Any) -> MirrorState:
        del params
        return MirrorState(
            count=jnp.zeros([], jnp.int32),
            phase=jnp.zeros([], jnp.int32),
            second=jnp.zeros([], jnp.bool_),
            interval=jnp.asarray(interval, jnp.int32),
            steps_per_epoch=jnp.asarray(steps_per_epoch or 0, jnp.int32),
        )

    def update_fn(updates: Any, state: MirrorState, params: Any = None, **extra_args: Any) -> tuple[Any, MirrorState]:
        del params, extra_args
        is_mirror = state.phase % state.interval == 0
        ends_batch = state.second | ~is_mirror
        first, second = first_factor(state.count), second_factor(state.count)
        factor = jnp.where(is_mirror, jnp.where(state.second, second, first), 1.0)
        updates = _scale(factor, updates)
        if max_norm is not None:
            clip = jnp.minimum(1.0, max_norm / (_global_norm(updates) + _CLIP_EPSILON))
            updates = _scale(jnp.where(ends_batch, clip, 1.0), updates)
        following = _next_batch(state)
        return updates, state._replace(
            count=jnp.where(ends_batch, following.count, state.count),
            phase=jnp.where(ends_batch, following.phase, state.phase),
            second=~ends_batch,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _opaque(
    scaling: optax.GradientTransformationExtraArgs, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Run both passes of the visible form inside one update."""
    visible = optax.with_extra_args_support(optax.chain(scaling, optimizer))

    def init_fn(params: Any) -> MirroredState:
        return MirroredState(visible.init(params))

    def update_fn(
        updates: Any,
        state: MirroredState,
        params: Any = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[Any, MirroredState]:
        if params is None:
            raise ValueError("A mirrored optimizer moves the parameters between its two passes: pass `params`.")
        if grad_fn is None:
            raise ValueError(
                "A mirrored optimizer evaluates the gradient again: pass `grad_fn=`, a function of (params, index)."
            )

        def second_pass(first: Any, inner_state: Any) -> tuple[Any, Any]:
            moved = optax.apply_updates(params, first)
            grads = grad_fn(moved, 0)
            renewed = {**extra_args, "grad": grads} if "grad" in extra_args else extra_args
            second, inner_state = visible.update(grads, inner_state, moved, grad_fn=grad_fn, **renewed)
            return jax.tree.map(lambda a, b: (a + b).astype(a.dtype), first, second), inner_state

        first, inner_state = visible.update(updates, state.inner_state, params, grad_fn=grad_fn, **extra_args)
        pending = inner_state[0].second
        total, inner_state = _when(pending, second_pass, first, inner_state)
        return total, MirroredState(inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _when(pending: jax.Array, function: Callable[..., tuple[Any, Any]], *operands: Any) -> tuple[Any, Any]:
    """``function(*operands)`` if ``pending``, else the operands."""
    if not isinstance(pending, jax.core.Tracer):
        # Outside jit, lax.cond would compile anew for every closure.
        return function(*operands) if bool(pending) else operands
    return jax.lax.cond(pending, function, lambda *unchanged: unchanged, *operands)


def _next_batch(state: MirrorState) -> MirrorState:
    period = jnp.where(state.steps_per_epoch > 0, state.steps_per_epoch, state.interval)
    return state._replace(
        count=optax.safe_increment(state.count),
        phase=(state.phase + 1) % period,
        second=jnp.zeros_like(state.second),
    )


def _close_batch(state: MirrorState) -> MirrorState:
    """Move on to the next batch if the second pass is still outstanding."""
    return jax.tree.map(lambda done, kept: jnp.where(state.second, done, kept), _next_batch(state), state)


def _scale(factor: jax.Array, updates: Any) -> Any:
    def scale(leaf: Any) -> Any:
        leaf = leaf if isinstance(leaf, jax.Array | np.ndarray) else jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf  # integer parameters: nothing to scale, and float0 cannot be
        return (factor * leaf).astype(leaf.dtype)

    return jax.tree.map(scale, updates)


def _global_norm(updates: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(updates) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # At least float32: squares of half-precision gradients overflow or vanish.
    squares = [jnp.sum(jnp.square(jnp.abs(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))))) for leaf in leaves]
    return jnp.sqrt(sum(squares, start=jnp.zeros([])))


def _at(value: ScalarOrSchedule, count: jax.Array) -> jax.typing.ArrayLike:
    return value(count) if callable(value) else value


def _known(value: Any) -> float | None:
    """The value as a Python float; None for a schedule or a traced array."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return None
    return float(value)


def _check_factor(name: str, value: Any, schedule: bool = True) -> None:
    if callable(value) and schedule:
        return
    if not isinstance(value, numbers.Real | jax.Array | np.ndarray | np.generic):
        kinds = "a number, a scalar array or a schedule" if schedule else "a number or a scalar array"
        raise ValueError(f"`{name}` must be {kinds}, not {value!r}.")
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"`{name}` has shape {shape}; it must be a scalar. Train a grid with jax.vmap.")
    known = _known(value)
    if known is not None and not (math.isfinite(known) and known > 0):
        raise ValueError(f"`{name}` must be positive and finite, not {known}.")


def _check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, jax.Array):
        raise ValueError(
            f"`{name}` must be a Python integer, not an array: it is static. "
            f'Under optax.inject_hyperparams declare static_args=("interval", "steps_per_epoch").'
        )
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, not {value!r}.")


def _accepted(update_fn: Callable[..., Any], extra_args: dict[str, Any]) -> dict[str, Any]:
    """Those extra arguments that an update function takes: not every one in Optax ignores the others."""
    parameters = inspect.signature(update_fn).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extra_args
    return {name: value for name, value in extra_args.items() if name in parameters}


def _array(leaf: Any) -> Any:
    """The array of a state's field, which a framework may have wrapped in a variable."""
    return jax.tree.leaves(leaf)[0]


def _mirror_states(opt_state: Any) -> list[MirrorState]:
    """Every visible `MirrorState`; not those of the opaque form, whose passes no loop has to make."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, MirrorState | MirroredState))
    return [node for node in nodes if isinstance(node, MirrorState)]


def _map_mirror_states(function: Callable[[MirrorState], MirrorState], opt_state: Any) -> Any:
    return jax.tree.map(
        lambda node: function(node) if isinstance(node, MirrorState) else node,
        opt_state,
        is_leaf=lambda node: isinstance(node, MirrorState),
    )


def _holds(opt_state: Any, kinds: type | tuple[type, ...]) -> bool:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(node, kinds) for node in nodes)


def _refuse_accumulation(opt_state: Any) -> None:
    if _holds(opt_state, optax.MultiStepsState) and _holds(opt_state, (MirrorState, MirroredState)):
        raise ValueError(
            "mirror_step cannot repeat the mini-batches of optax.MultiSteps: it sees one at a time. Accumulate inside "
            "`loss_fn`, or loop over the mini-batches yourself and once more while `second_pass_pending` is true."
        )
