"""Mirror Gradient as an Optax transformation, in a visible and an opaque form.

On every ``interval``-th batch of an epoch the optimizer makes two updates on the same batch: one along the gradient,
scaled by ``alpha1``, and one against the gradient taken afresh at the moved parameters, scaled by ``alpha2``. To second
order in the step size that is gradient descent with a penalty on the squared gradient norm, which prefers flat minima.

======================  ==============================================================================================
`mirror_step`           one jit-able training step for any loss and any optimizer; makes the second pass itself
`mirrored`              opaque form: wraps a whole optimizer, both updates inside one call of ``update``
`mirror_gradient`       visible form: a link of `optax.chain`; the loop makes the second pass when the state asks for it
`replay`, `replayed`    the control with equally many updates: the second pass repeats the batch with factor +1
`second_pass_pending`   does the state ask for a second pass over the same batch?
`close_batch`           ends a batch whose second pass did not happen
`schedule_over_passes`  a schedule over batches for what counts updates, such as the optimizer behind the mirror
`pass_schedule`         the batch of every pass of the next batches, for a scan without conditions
`restart_epoch`         numbers the batches from 0 again
`check_loop`            can a loop that makes the passes use this optimizer?
`update_with`           calls an ``update`` with those extra arguments that it accepts
======================  ==============================================================================================

This file needs JAX and Optax only, so that it can be copied into any project; ``ascent=True`` needs `mgrad_jax.ascent`
beside it.

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
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

ScalarOrSchedule: TypeAlias = float | jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]
GradFn: TypeAlias = Callable[[Any, int], Any]

_CLIP_EPSILON = 1e-6

# States, by the name of their class, of what holds updates back until several have come together.
_ACCUMULATING = {
    "MultiStepsState": "optax.MultiSteps",
    "ApplyEvery": "optax.apply_every",
    "AccumulateAvgUpdatesState": "optax.experimental.accumulate_avg_updates",
}
# States of forms that step along the gradient of their own `grad_fn`, whatever gradient comes in.
_OWN_GRADIENT = ("MirroredState", "SAMState", "SSAMState")

_MIRROR_OUTSIDE = (
    "The mirror stands before an optimizer that takes its gradient from `grad_fn`, where the factors alpha1 and "
    "-alpha2 do not reach it: put the mirror inside, for example sam(optax.chain(mirror_gradient(), optimizer)) with "
    "mirror_step."
)
_FORM_OUTSIDE = (
    "An optimizer that evaluates the gradient again (mirrored, sam) stands inside optax.masked or optax.partition, "
    "where it sees one group of the parameters, but `grad_fn` needs all of them: put it outside, "
    "mirrored(optax.partition(...)), or use mirror_gradient in the group's chain, with mirror_step."
)
PASS_GRAD_FN = (
    "pass `grad_fn=`, a function of (params, index). What hands no such argument on, as optax.lookahead does not, goes "
    "inside the form; in place of flax's TrainState.apply_gradients use mirror_step(loss_fn, tx)."
)

# Where `_declared` collects what the mirrors of one optimizer were built with.
_made: ContextVar[list[tuple[int, int]] | None] = ContextVar("_made", default=None)


class MirrorState(NamedTuple):
    """State of `mirror_gradient` and `replay`.

    Attributes:
        count: completed batches, over all epochs; what schedules of alpha are called with. Shape (), int32.
        phase: number of the current batch, modulo ``steps_per_epoch``, or modulo ``interval`` where the numbering
            never restarts. Shape (), int32.
        second: the next update is the second pass over the current batch. Shape (), bool.
        interval: every how many batches one is mirrored. Shape (), int32.
        steps_per_epoch: batches in an epoch; 0 where the numbering never restarts by itself. Shape (), int32.

    A restored state brings its position along (``count``, ``phase``, ``second``); factors and ``max_norm`` are those of
    the transformation that goes on with it. Its ``interval`` and ``steps_per_epoch`` have to be the transformation's:
    ``update`` refuses others wherever it knows the values, outside `jax.jit`; inside, those of the state hold.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as optax's own states do
    phase: jax.Array
    second: jax.Array
    interval: jax.Array
    steps_per_epoch: jax.Array


class MirroredState(NamedTuple):
    """State of `mirrored` and `replayed`.

    Attributes:
        inner_state: state of ``optax.chain(mirror_gradient(...), optimizer)``, always between two batches; where
            ``ascent`` is an optimizer of its own, its state follows as a third.
    """

    inner_state: Any


class Wrapping(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # which has no types for the checker
    """What an opaque form returns: an optimizer around another, which can be had around a changed one as well.

    For who adds to an optimizer what has to act before the form does, such as a decay of its learning rate.

    Attributes:
        inner: the optimizer inside.
        around: builds the same form around another optimizer.
    """

    inner: optax.GradientTransformation
    around: Callable[[optax.GradientTransformation], Wrapping]

    @classmethod
    def of(
        cls,
        optimizer: optax.GradientTransformation,
        around: Callable[[optax.GradientTransformation], Wrapping],
        init_fn: Callable[..., Any],
        update_fn: Callable[..., Any],
    ) -> Wrapping:
        """The form with these two functions, built by ``around(optimizer)``."""
        form = cls(init_fn, update_fn)
        form.inner, form.around = optimizer, around
        return form


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

    The training loop makes the second pass whenever `second_pass_pending` says so: train with `mirror_step`. A loop
    that calls ``update`` once a batch ascends instead: it takes the next batch for the second pass.

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
        - What stands behind the mirror counts passes, not batches: a learning-rate schedule, Adam's bias correction,
          the patience of ``optax.contrib.reduce_on_plateau``, the period of `optax.lookahead`. A decay meant for N
          batches ends after N passes, at interval 1 half-way through: `schedule_over_passes` stretches it. A schedule
          of alpha, handed to this function, counts batches.
        - Behind Adam the second half-step goes on along the first instead of back (projection +0.87, FREEDOM on TikTok,
          alpha2 = 0.2), for the moments hold the first gradient; behind gradient descent it goes back (-0.2), as the
          theorem has it. ``mirrored(optimizer, ascent=True)`` goes back under Adam, too.
        - `optax.inject_hyperparams` needs ``static_args=("interval", "steps_per_epoch")``. A schedule handed to it
          counts passes.
        - In `optax.MultiSteps`, ``MultiSteps(chain(mirror_gradient(), adam(lr)), k)``, a batch is k mini-batches,
          and the second pass replays the same k mini-batches.
        - In `optax.partition` or `optax.masked` the second pass steps every optimizer again, with a factor of 1 where
          there is no mirror; ``max_norm`` sees the masked-in gradients only.
        - `optax.apply_if_finite` belongs outside the chain: a rejected first pass then skips the batch. A rejected
          second one leaves its batch open, which `close_batch` ends.
        - ``update`` ignores extra arguments. To test a loop of your own, wrap the mirror in `mgrad_jax.checked`.

    Examples:
        With `mirror_step`:

        >>> import jax, jax.numpy as jnp, optax
        >>> from mgrad_jax import close_batch, mirror_gradient, mirror_step, second_pass_pending
        >>> tx = optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3), optax.sgd(0.1))
        >>> step = jax.jit(mirror_step(lambda p, batch: 0.5 * batch * p**2, tx))
        >>> params = jnp.array(1.0)
        >>> state = tx.init(params)
        >>> for batch in (1.0, 2.0, 3.0):
        ...     params, state, loss = step(params, state, batch)
        ...     print(f"batch {batch:.0f}: {params:.4f}")
        batch 1: 0.9180
        batch 2: 0.7344
        batch 3: 0.5141

        The same in a loop that calls ``update`` itself, at most twice a batch:

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
        ...     state = close_batch(state)  # in case the second pass was refused
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
    ascent: bool | optax.GradientTransformation = False,
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

    With ``ascent`` the second half-step is taken by an ascent :math:`A` of its own, and the optimizer, moments and
    counters, is stepped once a batch:

    .. math::
        \theta'' = \theta' + A(-\alpha_2\, g(\theta'; b_j)), \qquad
        A(\tau) = -\eta\, \tau / (\sqrt{\hat v} + \epsilon)

    for Adam, with the learning rate :math:`\eta` of the first half-step and the second moment :math:`\hat v` after it.

    Args:
        optimizer: any Optax optimizer; it is stepped in both passes, moments and counters included.
        alpha1: as in `mirror_gradient`.
        alpha2: as in `mirror_gradient`.
        interval: as in `mirror_gradient`.
        steps_per_epoch: as in `mirror_gradient`.
        max_norm: as in `mirror_gradient`.
        ascent: False: the optimizer takes both half-steps. True: gradient ascent with the step sizes that the
            optimizer's own second moment gives (Adam and its relatives, RMSprop, Adagrad), and with its learning rate
            alone where it has none (SGD, whose momentum takes no part). An optimizer: its update along
            :math:`-\alpha_2 g(\theta')`, with a state of its own.

    Returns:
        A transformation with a `MirroredState`. ``update`` raises ValueError without ``params`` or ``grad_fn``.
        Further arguments go to ``optimizer``, those of them that it accepts, in both passes; ``grad``, if given, is
        renewed for the second.

    Raises:
        ValueError: as `mirror_gradient`; by ``init``, if ``ascent`` is True and the optimizer's state holds neither a
            second moment that is known nor momentum alone.

    Warns:
        UserWarning: as `mirror_gradient`.

    Notes:
        - Nesting: gradient processing goes inside, ``mirrored(optax.chain(optax.clip(1.0), optax.adam(lr)))``, so that
          the second gradient is processed too; so does `optax.apply_if_finite`, which looks only at the gradient that
          comes in. `optax.masked`, `optax.partition` and `optax.lookahead` go inside as well, since ``grad_fn`` returns
          the whole gradient, or is not handed on. In ``optax.MultiSteps(mirrored(...), k)`` let ``grad_fn`` be the
          gradient over all k mini-batches.
        - The optimizer inside counts passes, as in `mirror_gradient`: give a learning-rate schedule through
          `schedule_over_passes`.
        - A ``value`` that is handed over is renewed for the second pass where ``value_fn(params)`` comes with it.
        - With ``ascent=True`` clipping, weight decay, trust ratios and noise inside the optimizer act in the first
          half-step alone; ``max_norm`` clips the second gradient. Schedules inside count batches: give them without
          `schedule_over_passes`. In the very first batch an entry whose gradient was nearly 0 at first has a second
          moment to match, and its ascent may be long.

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
    if not isinstance(ascent, bool | optax.GradientTransformation):
        raise ValueError(f"`ascent` must be True, False or an optimizer, not {ascent!r}.")
    return _opaque(_mirror(alpha1, alpha2, interval, steps_per_epoch, max_norm), ascent, optimizer)


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
    return _opaque(replay(interval, steps_per_epoch, max_norm), False, optimizer)


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


def close_batch(opt_state: Any) -> Any:
    """End a batch: if its second pass did not happen, the next update belongs to the next batch all the same.

    A pass may be refused, by `optax.apply_if_finite`, a loss scaler or ``should_skip_update_fn`` of `optax.MultiSteps`.
    The state then still asks for the second pass, and would take the next batch for it. A loop that makes at most two
    passes a batch and calls this function after them neither runs for ever nor mistakes a batch.

    Args:
        opt_state: any optimizer state, also a stack of states.

    Returns:
        The same state, its batch counted where the second pass was outstanding. What `optax.MultiSteps` around a mirror
        has accumulated is dropped: a pass that is not complete at the end of its batch. A batch that is over, a batch
        whose first pass was refused and the opaque form stay as they are.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from mgrad_jax import close_batch, mirror_gradient, second_pass_pending
        >>> tx = optax.apply_if_finite(optax.chain(mirror_gradient(interval=3), optax.sgd(0.1)), 5)
        >>> params = jnp.array(1.0)
        >>> state = tx.init(params)
        >>> for gradient in (2.0, jnp.nan):  # the two passes of one batch
        ...     updates, state = tx.update(jnp.array(gradient), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(second_pass_pending(state)), bool(second_pass_pending(close_batch(state)))
        (True, False)

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1.
    """
    kinds = (MirrorState, MirroredState, optax.MultiStepsState)

    def close(node: Any) -> Any:
        if isinstance(node, MirrorState):
            return _close_batch(node)
        if isinstance(node, optax.MultiStepsState) and _mirror_states(node):
            emptied = {name: jax.tree.map(jnp.zeros_like, getattr(node, name)) for name in ("mini_step", "acc_grads")}
            return node._replace(inner_opt_state=close_batch(node.inner_opt_state), **emptied)
        return node

    return jax.tree.map(close, opt_state, is_leaf=lambda node: isinstance(node, kinds))


def schedule_over_passes(
    schedule: Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike],
    interval: int = 3,
    steps_per_epoch: int | None = None,
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    r"""Turn a schedule over batches into one over passes, for what stands behind a mirror.

    A mirror batch makes two updates, so a counter behind `mirror_gradient` or inside `mirrored` is ahead of the
    batches: a learning rate that is to decay over N batches would have done so after N passes, at interval 1 half-way
    through. With P passes an epoch of J batches (:math:`P = J + \lceil J / \beta \rceil`), pass t belongs to batch

    .. math::
        \lfloor t / P \rfloor J + \lfloor u / (\beta + 1) \rfloor \beta + \max(u \bmod (\beta + 1) - 1, 0),
        \qquad u = t \bmod P,

    and without epochs the same holds with u = t.

    Args:
        schedule: an Optax schedule, called with the number of completed batches.
        interval: that of the mirror.
        steps_per_epoch: that of the mirror; also where the loop calls `restart_epoch` after so many batches.

    Returns:
        A schedule of the number of completed updates. It is exact as long as every pass of the mirror is made.

    Raises:
        ValueError: if ``interval`` or ``steps_per_epoch`` is not a positive Python integer.

    Examples:
        >>> import optax
        >>> from mgrad_jax import mirror_gradient, schedule_over_passes
        >>> decay = optax.linear_schedule(0.6, 0.0, transition_steps=6)  # over 6 batches
        >>> rate = schedule_over_passes(decay, interval=3)
        >>> tx = optax.chain(mirror_gradient(interval=3), optax.adam(rate))
        >>> [round(float(rate(count)), 1) for count in range(8)]
        [0.6, 0.6, 0.5, 0.4, 0.3, 0.3, 0.2, 0.1]

    References:
        Zhong et al., https://arxiv.org/abs/2402.11262: Algorithm 1.
    """
    _check_positive_int("interval", interval)
    if steps_per_epoch is not None:
        _check_positive_int("steps_per_epoch", steps_per_epoch)

    def over_passes(count: jax.typing.ArrayLike) -> Any:
        within = jnp.asarray(count)
        completed = jnp.zeros_like(within)
        if steps_per_epoch is not None:
            passes = steps_per_epoch + -(-steps_per_epoch // interval)
            completed, within = within // passes * steps_per_epoch, within % passes
        cycles, position = within // (interval + 1), within % (interval + 1)
        return schedule(completed + cycles * interval + jnp.maximum(position - 1, 0))

    return over_passes


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
    r"""List the batch of every pass over the next batches, as the state will ask for them.

    A mirror batch appears twice, so that an epoch from batch 0 on has :math:`J + \lceil J / \beta \rceil` entries. A
    `jax.lax.scan` over the list has no condition left; under `jax.vmap` a condition would compute both of its branches
    on every batch.

    Args:
        opt_state: concrete optimizer state; a stack of states (from `jax.vmap`) counts as one where they agree. The
            list goes on from where it stands: to begin an epoch at batch 0, pass ``restart_epoch(opt_state)``, and
            begin the epoch with that state.
        n_batches: how many batches.

    Returns:
        int32 array of numbers from 0 to ``n_batches - 1``, 0 being the next batch. Each once without a `MirrorState`,
        and for `mirrored`, which makes both passes by itself.

    Raises:
        ValueError: if the state is traced, or between the two passes of a batch; if ``n_batches`` is no positive
            integer or contradicts the state's ``steps_per_epoch``; or if the mirrors in one state disagree.

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
    batches = np.arange(n_batches, dtype=np.int32)
    if not _mirror_states(opt_state):
        return batches
    agreed = _check_agreement(opt_state)
    if agreed is None:
        raise ValueError("The state is traced: call pass_schedule outside jax.jit, and pass its result in.")
    interval, steps, phase, second = agreed
    if second:
        raise ValueError(
            "The state is between the two passes of a batch: make the second one, or end the batch with close_batch "
            "(restart_epoch begins a new epoch)."
        )
    if steps not in (0, n_batches):
        raise ValueError(
            f"The optimizer was built with steps_per_epoch={steps}, but the epoch has {n_batches} batches."
        )
    numbers = (phase + batches) % (steps or interval)
    return np.repeat(batches, np.where(numbers % interval == 0, 2, 1))


def mirror_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any, Any]]:
    r"""Build a training step that makes the second pass of Mirror Gradient where the optimizer asks for it.

    The step evaluates the gradient, updates, and, if `second_pass_pending`, does so once more on the same batch at
    the moved parameters. A plain optimizer takes one pass and traces no second; an opaque one (`mirrored`,
    ``optax.contrib.sam(opaque_mode=True)``) is handed its ``grad_fn``, a line search its ``value_fn``.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs)`` returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
        optimizer: an Optax optimizer; ``update`` is also given ``value``, ``grad``, ``value_fn(params)`` (``obj_fn`` is
            the same), ``grad_fn(params, index)`` and the ``batch``, those of them that it accepts (`update_with`).
        has_aux: ``loss_fn`` returns ``(scalar, aux)``.

    Returns:
        ``step(params, opt_state, *args, key=None, **kwargs) -> (params, opt_state, loss)``, to be wrapped in
        `jax.jit`. ``loss`` (``(loss, aux)`` with ``has_aux``) is that of the first pass, which the published trainer
        adds up. With a ``key``, ``loss_fn`` is given ``key=jax.random.fold_in(key, pass_index)`` with the
        pass index 0 or 1, so each pass draws its own dropout. With `optax.lookahead` the parameters are its pair, and
        the gradient is that of the fast ones.

    Raises:
        ValueError: by the step, if `check_loop` refuses the optimizer.

    Notes:
        What stands behind the mirror decides what is left of it. A line search starts uphill in the second pass, and
        moves hardly or not at all. Where only the sign or the direction of a gradient counts (lion, sign_sgd), the
        factor cancels, so that the second pass undoes the first.

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
        check_loop(opt_state, optimizer, params)

        def loss_of(params: Any, pass_index: int) -> Any:
            keyed = {} if key is None else {"key": jax.random.fold_in(key, pass_index)}
            return loss_fn(params, *args, **kwargs, **keyed)

        def one_pass(params: Any, opt_state: Any, pass_index: int) -> tuple[Any, Any, Any]:
            def value_fn(params: Any) -> Any:
                out = loss_of(params, pass_index)
                return out[0] if has_aux else out

            def grad_fn(params: Any, index: int) -> Any:
                grads = jax.grad(loss_of, has_aux=has_aux)(params, pass_index + 1 + index)
                return _fast(grads[0] if has_aux else grads)

            out, grads = jax.value_and_grad(loss_of, has_aux=has_aux)(params, pass_index)
            grads = _fast(grads)
            extra_args = {
                "value": out[0] if has_aux else out,
                "grad": grads,
                "value_fn": value_fn,
                "obj_fn": value_fn,
                "grad_fn": grad_fn,
                "batch": (args, kwargs),
            }
            updates, opt_state = update_with(optimizer.update, grads, opt_state, params, **extra_args)
            return optax.apply_updates(params, updates), opt_state, out

        def second_pass(params: Any, opt_state: Any) -> tuple[Any, Any]:
            params, opt_state, _ = one_pass(params, opt_state, 1)
            # A wrapper such as optax.apply_if_finite may have refused the update; the batch is over all the same.
            return params, close_batch(opt_state)

        params, opt_state, out = one_pass(params, opt_state, 0)
        if states := _mirror_states(opt_state):
            if any(_array(state.second).dtype != jnp.bool_ for state in states):
                raise ValueError(
                    "A wrapper around the mirror rewrites its state, as optax.lookahead does with reset_state=True: "
                    "put the mirror outside, optax.chain(mirror_gradient(), wrapper(optimizer))."
                )
            params, opt_state = _when(second_pass_pending(opt_state), second_pass, params, opt_state)
        return params, opt_state, out

    return step


def check_loop(opt_state: Any, optimizer: optax.GradientTransformation | None = None, params: Any = None) -> None:
    """Refuse an optimizer that no loop of two passes over a batch can drive rightly, by what its state holds.

    A loop that sees one batch at a time, such as `mirror_step`, cannot make the passes of a mirror where

    - updates are held back: by `optax.MultiSteps`, `optax.apply_every`, `optax.conditionally_mask` and their like. The
      first pass then moves nothing, or two passes over one batch count as two batches;
    - a form behind the mirror takes its gradient from ``grad_fn`` (`mirrored`, sharpness-aware minimization): the
      factors do not reach the gradient that it steps along. write ``sam(optax.chain(mirror_gradient(), optimizer))``;
    - ``optax.contrib.sam`` without ``opaque_mode`` takes the two passes for its own two steps;
    - there are several mirrors that do not ask for the second pass of the same batches, or scale the same gradient.

    Without a mirror nothing is refused, but for `optax.lookahead` over parameters that are not its pair.

    Args:
        opt_state: any optimizer state, also traced.
        optimizer: where the state is traced, the intervals that this optimizer was built with are compared instead.
        params: the parameters of the loop, needed with ``optimizer``.

    Raises:
        ValueError: one sentence, with the remedy.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from mgrad_jax import mirror_gradient
        >>> from mgrad_jax.mirror import check_loop
        >>> check_loop(optax.apply_every(2).init(jnp.zeros(2)))
        >>> try:
        ...     check_loop(optax.chain(mirror_gradient(), optax.apply_every(2)).init(jnp.zeros(2)))
        ... except ValueError as error:
        ...     print(str(error)[:50])
        optax.apply_every accumulates or holds back update
    """
    nodes = _nodes(opt_state)
    paired = params is None or isinstance(params, optax.LookaheadParams)
    if not paired and any(isinstance(node, optax.LookaheadState) for node in nodes):
        raise ValueError(
            "optax.lookahead trains a pair of parameters, optax.LookaheadParams.init_synced(params), of which this "
            "loop has one only: give the pair to mirror_step, or leave optax.lookahead out."
        )
    if not any(isinstance(node, MirrorState | MirroredState) for node in nodes):
        return
    for node in nodes:
        if (name := type(node).__name__) in _ACCUMULATING:
            raise ValueError(
                f"{_ACCUMULATING[name]} accumulates or holds back updates, and a second pass would have to repeat all "
                "mini-batches, of which this loop sees one at a time. Accumulate inside the loss, or loop over the "
                "mini-batches yourself and once more if `second_pass_pending` is true."
            )
        if isinstance(node, optax.ConditionallyMaskState | optax.ConditionallyTransformState):
            name = "mask" if isinstance(node, optax.ConditionallyMaskState) else "transform"
            raise ValueError(
                f"optax.conditionally_{name} counts passes, so that it may drop one pass of a mirror batch and keep "
                "the other: train in two stages, the first without it or without the mirror."
            )
        if isinstance(node, optax.contrib.SAMState) and node.cache is not None:
            raise ValueError(
                "optax.contrib.sam takes the two passes of a mirror for its own two steps: give it opaque_mode=True "
                "and put the mirror inside, sam(optax.chain(mirror_gradient(), optimizer), ...)."
            )
    kinds = ("MirrorState", *_OWN_GRADIENT)
    outermost = {
        type(node).__name__ for node in jax.tree.leaves(opt_state, is_leaf=lambda n: type(n).__name__ in kinds)
    }
    if "MirrorState" in outermost and outermost & set(_OWN_GRADIENT):
        raise ValueError(_MIRROR_OUTSIDE)
    _check_agreement(opt_state, optimizer, params)


def update_with(update: Callable[..., Any], *args: Any, **extra_args: Any) -> Any:
    """Call an optimizer's ``update`` with those of these extra arguments that it accepts.

    Not every one in Optax ignores the others: ``optax.contrib.sam`` takes ``grad_fn`` alone, a line search hands what
    it does not know to ``value_fn``, and `optax.chain` hands everything to every link. Which of them refuses what is
    not written anywhere, so an argument that is refused by name is left out and the call made again; nothing has
    happened until then, since updates are pure.

    Args:
        update: ``optimizer.update``, or another function that ends up there, such as that of ``nnx.Optimizer``.
        *args: its positional arguments: gradients, state and parameters.
        **extra_args: what to offer.

    Returns:
        What ``update`` returns.

    Raises:
        ValueError: if one link needs an argument that another refuses.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from mgrad_jax.mirror import update_with
        >>> tx = optax.chain(optax.polyak_sgd(), optax.scale_by_backtracking_linesearch(5))
        >>> loss, params = lambda p: p**2, jnp.array(1.0)
        >>> offered = {"value": 1.0, "grad": 2 * params, "value_fn": loss, "grad_fn": lambda p, index: 2 * p}
        >>> updates, state = update_with(tx.update, 2 * params, tx.init(params), params, **offered)
        >>> float(loss(params + updates)) < 1.0
        True
    """
    given = _accepted(update, extra_args)
    while True:
        try:
            return update(*args, **given)
        except TypeError as error:
            words = str(error).split("Did you mean")[0]  # what newer Pythons suggest is not what was refused
            named = {name for name in extra_args if f"'{name}'" in words}
            if "unexpected keyword argument" not in words.lower() or not named & given.keys():
                if "missing" in words and named - given.keys():
                    raise ValueError(
                        f"One link of the optimizer needs {sorted(named)}, which another link refuses; write the one "
                        f"that refuses so that it takes **extra_args (mgrad_jax.sam does, optax.contrib.sam does not)."
                    ) from error
                raise
        given = {name: value for name, value in given.items() if name not in named}


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
        if (made := _made.get()) is not None:
            made.append((int(interval), int(steps_per_epoch or 0)))
        return MirrorState(
            count=jnp.zeros([], jnp.int32),
            phase=jnp.zeros([], jnp.int32),
            second=jnp.zeros([], jnp.bool_),
            interval=jnp.asarray(interval, jnp.int32),
            steps_per_epoch=jnp.asarray(steps_per_epoch or 0, jnp.int32),
        )

    def update_fn(updates: Any, state: MirrorState, params: Any = None, **extra_args: Any) -> tuple[Any, MirrorState]:
        del params, extra_args
        _check_made_with(state, interval, steps_per_epoch or 0)
        is_mirror = state.phase % state.interval == 0
        ends_batch = state.second | ~is_mirror
        # Factors and gradients may differ in dtype; the result has the gradient's, whatever the caller's promotion is.
        with jax.numpy_dtype_promotion("standard"):
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
    scaling: optax.GradientTransformationExtraArgs,
    ascent: bool | optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
) -> Wrapping:
    """Run both passes of the visible form inside one update; the second by the ascent, if there is one."""
    visible = optax.chain(scaling, optimizer)

    def init_fn(params: Any) -> MirroredState:
        own = () if isinstance(ascent, bool) else (ascent.init(params),)
        state = (*visible.init(params), *own)
        if _mirror_states(state[1:]):
            raise ValueError(
                "mirrored(optimizer) makes both passes by itself: leave mirror_gradient out of its optimizer."
            )
        check_loop(state)
        if ascent is True:
            from mgrad_jax.ascent import check_own_ascent

            check_own_ascent(optimizer, params)
        return MirroredState(state)

    def ascend(grads: Any, before: Any, after: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        """The second half-step by the ascent, and the state after it; ``before`` is that before the batch."""
        wanted, scaling_state = update_with(scaling.update, grads, after[0], params, **extra_args)
        if not isinstance(ascent, bool):
            step, own = update_with(ascent.update, wanted, after[2], params, **extra_args)
            return step, (scaling_state, after[1], own)
        from mgrad_jax.ascent import own_ascent

        nowhere = jax.tree.map(jnp.zeros_like, params)  # weight decay finds nothing to act on

        def update(gradient: Any, state: Any) -> tuple[Any, Any]:
            updated: tuple[Any, Any] = update_with(optimizer.update, gradient, state, nowhere, **extra_args)
            return updated

        return own_ascent(update, wanted, before[1], after[1]), (scaling_state, after[1])

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
            raise ValueError(f"A mirrored optimizer evaluates the gradient again: {PASS_GRAD_FN}")

        def second_pass(first: Any, inner_state: Any) -> tuple[Any, Any]:
            moved = optax.apply_updates(params, first)
            grads = gradient_again(grad_fn, moved, 0)
            renewed = dict(extra_args)
            if "grad" in extra_args:
                renewed["grad"] = grads
            if "value" in extra_args and "value_fn" in extra_args:
                renewed["value"] = extra_args["value_fn"](moved)
            renewed["grad_fn"] = grad_fn
            if ascent is False:
                second, inner_state = update_with(visible.update, grads, inner_state, moved, **renewed)
            else:
                second, inner_state = ascend(grads, state.inner_state, inner_state, moved, renewed)
            return jax.tree.map(lambda a, b: (a + b).astype(a.dtype), first, second), inner_state

        first, visible_state = update_with(
            visible.update, updates, state.inner_state[:2], params, grad_fn=grad_fn, **extra_args
        )
        pending = visible_state[0].second
        total, inner_state = _when(pending, second_pass, first, (*visible_state, *state.inner_state[2:]))
        return total, MirroredState(inner_state)

    return Wrapping.of(optimizer, partial(_opaque, scaling, ascent), init_fn, update_fn)


def gradient_again(grad_fn: GradFn, params: Any, index: int) -> Any:
    """``grad_fn(params, index)``, for an opaque form; says what is wrong where the form sees one group of them only."""
    try:
        grads = grad_fn(params, index)
    except Exception as error:
        if _is_masked(params):
            raise ValueError(_FORM_OUTSIDE) from error
        raise
    structure: Any = jax.tree.structure(params)
    if _is_masked(params) and jax.tree.structure(grads) != structure:
        raise ValueError(_FORM_OUTSIDE)
    return grads


def _when(pending: jax.Array, function: Callable[..., tuple[Any, Any]], *operands: Any) -> tuple[Any, Any]:
    """``function(*operands)`` if ``pending``, else the operands."""
    if not isinstance(pending, jax.core.Tracer):
        # Outside jit, lax.cond would compile anew for every closure.
        return function(*operands) if bool(pending) else operands
    results: tuple[Any, Any] = jax.lax.cond(pending, function, lambda *unchanged: unchanged, *operands)
    return results


def _next_batch(state: MirrorState) -> MirrorState:
    period = jnp.where(state.steps_per_epoch > 0, state.steps_per_epoch, state.interval)
    return state._replace(
        count=optax.safe_increment(state.count),
        phase=(state.phase + 1) % period,
        second=jnp.zeros_like(state.second),
    )


def _close_batch(state: MirrorState) -> MirrorState:
    """Move on to the next batch if the second pass is still outstanding."""
    fields, structure = jax.tree.flatten(state)  # a framework may have wrapped them in variables
    kept = MirrorState(*fields)
    closed = jax.tree.map(lambda done, open: jnp.where(kept.second, done, open), _next_batch(kept), kept)
    after: MirrorState = jax.tree.unflatten(structure, closed)
    return after


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


def _nodes(opt_state: Any) -> list[Any]:
    """Every named tuple in a state, those inside others included."""
    found: list[Any] = []

    def look(node: Any) -> bool:
        if hasattr(node, "_fields"):
            found.append(node)
        return False

    jax.tree.leaves(opt_state, is_leaf=look)
    return found


def _value(leaf: Any) -> np.ndarray | None:
    """The value of a state's field; None where it is traced or lies on other hosts."""
    leaf = _array(leaf)
    if isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return None
    return np.asarray(leaf)


def _check_agreement(opt_state: Any, optimizer: Any = None, params: Any = None) -> tuple[int, int, int, bool] | None:
    """The one check that all mirrors in one optimizer state go together; a loop makes its passes for all at once.

    Args:
        opt_state: any optimizer state, also a stack of states.
        optimizer, params: where the state is traced, what the optimizer was built with is compared instead.

    Returns:
        The common (interval, steps_per_epoch, phase, second); None where they are traced, or there is no mirror.
    """
    states = _mirror_states(opt_state)
    kinds = (MirrorState, MirroredState, optax.MaskedState)
    unmasked = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    if len(states) > 1 and any(isinstance(node, MirrorState) for node in unmasked):
        raise ValueError(
            "One optimizer holds several mirrors for the same parameters, whose factors multiply: keep one."
        )
    fields = [[_value(field) for field in state[1:]] for state in states]
    if any(value is None for field in fields for value in field):
        made = _declared(optimizer, params) if optimizer is not None and len(states) > 1 else []
        _refuse_several("schedules, as (interval, steps_per_epoch)", set(made))
        return None
    columns = ([np.ravel(np.asarray(value)).tolist() for value in state] for state in fields)
    rows = {row for state in columns for row in zip(*state, strict=True)}
    _refuse_several("schedules, as (interval, steps_per_epoch)", {row[2:] for row in rows})
    _refuse_several("positions, as (phase, second)", {row[:2] for row in rows})
    if not rows:
        return None
    ((phase, second, interval, steps),) = rows
    return interval, steps, phase, second


def _refuse_several(what: str, found: set[tuple[Any, ...]]) -> None:
    if len(found) > 1:
        raise ValueError(
            f"One optimizer state holds several mirror {what}: {sorted(found)}. "
            "Give all of them the same, or train them apart."
        )


def _declared(optimizer: optax.GradientTransformation, params: Any) -> list[tuple[int, int]]:
    """(interval, steps_per_epoch) of every mirror that an optimizer was built with."""
    made: list[tuple[int, int]] = []
    token = _made.set(made)
    try:
        jax.eval_shape(lambda params: optimizer.init(params), params)  # a new function: nothing of it is cached
    finally:
        _made.reset(token)
    return made


def _check_made_with(state: MirrorState, interval: int, steps_per_epoch: int) -> None:
    for name, given, held in (
        ("interval", interval, _value(state.interval)),
        ("steps_per_epoch", steps_per_epoch, _value(state.steps_per_epoch)),
    ):
        if held is not None and np.any(held != given):
            raise ValueError(
                f"The optimizer state was made with {name}={held}, this transformation with {given}: build it with the "
                "state's, or begin with a new state. (0 stands for no steps_per_epoch.)"
            )


def _is_masked(params: Any) -> bool:
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)


def _fast(grads: Any) -> Any:
    """The gradient that `optax.lookahead` wants, of the fast parameters alone; any other gradient as it is."""
    return grads.fast if isinstance(grads, optax.LookaheadParams) else grads
