r"""Flat-minima baselines: SAM, and its sparse variants SSAM-F and SSAM-D, as Optax transformations.

Each wraps a whole optimizer. Inside one ``update`` it moves the parameters up the gradient, to the nearby place where
the loss is worst, takes the gradient afresh there, and lets the optimizer make one step with it from where it was. The
sparse variants move only the parameters that a mask chooses, which is renewed every few epochs.

===============  ========================================================================================
`sam`            every parameter is perturbed; runs on `optax.contrib.sam`
`ssam_f`         those with the largest Fisher information
`ssam_d`         a random set in dynamic training: flat parameters are dropped from it, others grow at random
===============  ========================================================================================

References:
    Foret, Kleiner, Mobahi and Neyshabur, *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
    2021, https://arxiv.org/abs/2010.01412.
    Mi, Shen, Ren, Zhou, Sun, Ji and Tao, *Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
    Approach*, NeurIPS 2022, https://arxiv.org/abs/2210.05177.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgrad_jax.mirror import PASS_GRAD_FN, GradFn, Wrapping, gradient_again, update_with
from mgrad_jax.selection import top_k_mask
from mgrad_jax.sparse_masks import exchange_counts, fisher_information, flat, refreshed, unflat, wide

Renew: TypeAlias = Callable[["SSAMState", jax.Array, Any, Any, dict[str, Any]], Any]

_SAM_EPSILON = 1e-12  # keeps a gradient of zero finite; no other float32 gradient notices
_SSAM_EPSILON = 1e-7


class SSAMState(NamedTuple):
    """State of `ssam_f` and `ssam_d`.

    Attributes:
        count: completed batches, over all epochs. Shape (), int32.
        key: data of the random key that every renewal of the mask draws from. Shape (2,), uint32.
        mask: which parameters the next batch perturbs. Shaped like the parameters, bool.
        inner_state: state of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as optax's own states do
    key: jax.Array
    mask: Any
    inner_state: Any


def sam(optimizer: optax.GradientTransformation, rho: jax.typing.ArrayLike = 0.05) -> Wrapping:
    r"""Wrap an optimizer in sharpness-aware minimization, through `optax.contrib.sam`.

    With :math:`g` the gradient of the batch and :math:`\Phi` one update of the optimizer,

    .. math::
        \epsilon = \rho\, \frac{g(\theta)}{\lVert g(\theta) \rVert_2}, \qquad
        \theta' = \theta + \Phi(g(\theta + \epsilon)).

    Args:
        optimizer: any Optax optimizer; it makes one step a batch.
        rho: length of the perturbation; a number or a scalar array (also traced).

    Returns:
        A transformation with the state of ``optax.contrib.sam(..., opaque_mode=True)``. Its ``update`` needs ``params``
        and ``grad_fn``, a function of (params, index) that gives the gradient of the same batch; it is called once,
        with index 0. Further arguments go to ``optimizer``; ``grad``, if given, becomes the gradient it steps along.

    Raises:
        ValueError: if ``rho`` is not positive and finite (where its value is known), and by ``update`` without
            ``params`` or ``grad_fn``.

    Notes:
        `optax.contrib.normalize` divides a gradient of zero by zero; here such a batch is left unperturbed.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mgrad_jax import sam
        >>> tx = sam(optax.sgd(0.5), rho=5.0)
        >>> params, grad_fn = jnp.array([3.0, 4.0]), lambda p, index: p
        >>> updates, state = tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)
        >>> print(updates)  # at (6, 8), the perturbed parameters, the gradient is twice as long
        [-3. -4.]

    References:
        Foret et al., https://arxiv.org/abs/2010.01412: Algorithm 1, Eqs. 2 and 3.
    """
    _check_rho(rho)
    unit = optax.stateless(lambda updates, params: _scaled_to(1.0, updates, _SAM_EPSILON))
    ascent = optax.chain(unit, optax.sgd(rho))

    def form(extra_args: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
        # optax.contrib.sam hands no extra arguments on, so the optimizer it gets already has them.
        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            offered = _renewed(extra_args, updates)
            updated: tuple[Any, Any] = update_with(optimizer.update, updates, state, params, **offered)
            return updated

        return optax.contrib.sam(optax.GradientTransformation(optimizer.init, update), ascent, opaque_mode=True)

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, grad_fn: GradFn | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _check_call(params, grad_fn)
        assert grad_fn is not None
        whole = form({**extra_args, "grad_fn": grad_fn})
        # The perturbation is at least float32, whatever the parameters are.
        with jax.numpy_dtype_promotion("standard"):
            updated: tuple[Any, Any] = whole.update(updates, state, params, grad_fn=partial(gradient_again, grad_fn))
            return updated

    return Wrapping.of(optimizer, lambda other: sam(other, rho), form({}).init, update_fn)


def ssam_f(
    optimizer: optax.GradientTransformation,
    rho: jax.typing.ArrayLike = 0.05,
    sparsity: float = 0.2,
    refresh_epochs: int = 5,
    fisher_samples: int = 1024,
    *,
    steps_per_epoch: int,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer in sparse SAM whose mask follows the Fisher information.

    With :math:`g` the gradient of the batch, :math:`m \in \{0, 1\}^P` the mask over all :math:`P` parameters and
    :math:`\Phi` one update of the optimizer,

    .. math::
        \epsilon = \rho\, \frac{g(\theta)}{\lVert g(\theta) \rVert_2 + 10^{-7}} \odot m, \qquad
        \theta' = \theta + \Phi(g(\theta + \epsilon)).

    In the epochs :math:`0, f, 2f, \dots`, right after the step of batch 0, the mask is renewed: it becomes one for the
    :math:`\lfloor P (1 - s) \rfloor` parameters, of all tables together, with the largest

    .. math::
        F = \sum_{n=1}^{N_F} g(\theta'; x_n)^2,

    where each :math:`x_n` is a single training sample. Of equal values the one that comes first in the flattened
    parameters wins.

    Args:
        optimizer: any Optax optimizer; it makes one step a batch, with the full gradient :math:`g(\theta + \epsilon)`.
        rho: length of the unmasked perturbation; a number or a scalar array (also traced).
        sparsity: fraction s of the parameters that is not perturbed, from 0 to below 1.
        refresh_epochs: every how many epochs the mask is renewed; f.
        fisher_samples: samples in the estimate, :math:`N_F`; drawn anew for each without replacement, and all where
            there are fewer. A renewal costs as many gradients, one after another.
        steps_per_epoch: batches in an epoch.
        seed: of the draw of the samples.

    Returns:
        A transformation with an `SSAMState`. Its ``update`` needs ``params``; ``grad_fn``, a function of (params,
        index) that gives the gradient of the same batch and is called with index 0; ``sample_grad_fn``, a function of
        (params, index) that gives the gradient of the one training sample of that index; and ``n_samples``, how many
        there are, a Python integer.
        Further arguments go to ``optimizer``; ``grad``, if given, becomes the gradient it steps along.

    Raises:
        ValueError: if an argument is out of range, or one other than ``rho`` is an array; and by ``update`` without
            what it needs.

    Notes:
        - As published, the mask starts empty, so the very first step is the plain optimizer's; and the norm is that of
          the whole gradient, so the perturbation is shorter than ``rho``.
        - All parameters count. One that never gets a gradient still uses up its share of the mask; leave it out.
        - A loss that contrasts the members of a batch has nothing to contrast in a batch of one sample; its Fisher
          information is that of its other terms.
        - :math:`\theta'` is ``params`` plus the returned updates; what is applied to these afterwards is not in it.
        - `optax.inject_hyperparams` needs every other argument in ``static_args``.
        - Under `jax.vmap` the renewal still runs only where it is due: on the batches where it is for any member.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mgrad_jax import ssam_f
        >>> samples = jnp.array([[1.0, 0.0, 2.0], [1.0, 0.0, -2.0]])
        >>> grad_fn = jax.grad(lambda p, index: jnp.mean((samples @ p - 1.0) ** 2))
        >>> sample_grad_fn = jax.grad(lambda p, index: (samples[index] @ p - 1.0) ** 2)
        >>> tx = ssam_f(optax.sgd(0.1), sparsity=0.6, steps_per_epoch=1)
        >>> params = jnp.zeros(3)
        >>> updates, state = tx.update(
        ...     grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn, sample_grad_fn=sample_grad_fn, n_samples=2
        ... )
        >>> print(state.mask)  # the third parameter, though the batch has no gradient there
        [False False  True]

    References:
        Mi et al., https://arxiv.org/abs/2210.05177: SSAM-F; the details are those of their code.
    """
    _check_fraction("sparsity", sparsity)
    _check_count("fisher_samples", fisher_samples)

    def empty_mask(key: jax.Array, params: Any) -> Any:
        del key
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bool_), params)

    def renew(state: SSAMState, epoch: jax.Array, grads: Any, moved: Any, extra_args: dict[str, Any]) -> Any:
        del grads
        sample_grad_fn, n_samples = extra_args.get("sample_grad_fn"), extra_args.get("n_samples")
        if sample_grad_fn is None or n_samples is None:
            raise ValueError(
                "SSAM-F estimates the Fisher information sample by sample: pass `sample_grad_fn=`, a function of "
                "(params, index), and `n_samples=`."
            )
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), epoch)
        chosen = jax.random.choice(key, n_samples, (min(fisher_samples, n_samples),), replace=False)
        fisher = flat(fisher_information(sample_grad_fn, moved, chosen))
        return unflat(top_k_mask(fisher, int(fisher.size * (1 - sparsity))), moved)

    return _sparse(optimizer, rho, refresh_epochs, steps_per_epoch, seed, empty_mask, renew)


def ssam_d(
    optimizer: optax.GradientTransformation,
    rho: jax.typing.ArrayLike = 0.05,
    sparsity: float = 0.2,
    refresh_epochs: int = 5,
    drop_rate: float = 0.5,
    *,
    steps_per_epoch: int,
    epochs: int,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer in sparse SAM whose mask is itself trained: flat parameters drop out, random ones grow in.

    A step is that of `ssam_f`. The mask starts with :math:`P - \lceil P s \rceil` random ones. In the epochs
    :math:`e = 0, f, 2f, \dots`, at batch 0, it is renewed from that batch's first gradient :math:`g(\theta)`, after the
    perturbation was made with the old mask. With

    .. math::
        q(e) = \frac{q_0}{2} \left( 1 + \cos \frac{\pi e}{E} \right)

    and :math:`u` uniform in [0, 1), the new mask is one

    - where it *stays*: the :math:`\lfloor P (1 - s) (1 - q) \rfloor` largest of :math:`(|g| + 10^{-7})\, m`, and
    - where it *grows*: the :math:`\lfloor \min(P (1 - s) q, P s) \rfloor` largest of :math:`(u + 10^{-7}) (1 - m)`.

    Of equal values the one that comes first in the flattened parameters wins.

    Args:
        optimizer: any Optax optimizer; it makes one step a batch, with the full gradient :math:`g(\theta + \epsilon)`.
        rho: length of the unmasked perturbation; a number or a scalar array (also traced).
        sparsity: fraction s of the parameters that is not perturbed, from 0 to below 1.
        refresh_epochs: every how many epochs the mask is renewed; f.
        drop_rate: fraction :math:`q_0` of the mask that is exchanged at first, from 0 to below 1.
        steps_per_epoch: batches in an epoch.
        epochs: planned epochs E; from then on nothing is exchanged. Where early stopping ends the training long before,
            the rate hardly falls: choose E for the epochs that are expected.
        seed: of the first mask and of what grows.

    Returns:
        A transformation with an `SSAMState`. Its ``update`` needs ``params`` and ``grad_fn``, a function of (params,
        index) that gives the gradient of the same batch; it is called once, with index 0. Further arguments go to
        ``optimizer``; ``grad``, if given, becomes the gradient it steps along.

    Raises:
        ValueError: if an argument is out of range, or one other than ``rho`` is an array; and by ``update`` without
            ``params`` or ``grad_fn``.

    Notes:
        As published:

        - what is dropped cannot grow back in the same renewal;
        - no more can grow than P s, so below :math:`s = q / (1 + q)` the mask gets sparser than asked for: with the
          defaults 0.6 P are perturbed after the first renewal, and not 0.8 P. As q falls it recovers;
        - where more are to stay than are alive, the first of the others in the flattened parameters join them;
        - the rest is as in `ssam_f`: the norm, parameters without a gradient, `optax.inject_hyperparams`, `jax.vmap`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mgrad_jax import ssam_d
        >>> tx = ssam_d(optax.sgd(0.1), sparsity=0.5, steps_per_epoch=1, epochs=10)
        >>> params, grad_fn = jnp.arange(8.0), lambda p, index: p
        >>> state = tx.init(params)
        >>> int(state.mask.sum())
        4
        >>> updates, renewed = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        >>> int((state.mask & renewed.mask).sum()), int((renewed.mask & ~state.mask).sum())
        (2, 2)

    References:
        Mi et al., https://arxiv.org/abs/2210.05177: SSAM-D; the details are those of their code.
    """
    _check_fraction("sparsity", sparsity)
    _check_fraction("drop_rate", drop_rate)
    _check_count("epochs", epochs)
    _check_count("refresh_epochs", refresh_epochs)

    def random_mask(key: jax.Array, params: Any) -> Any:
        size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
        return unflat(top_k_mask(jax.random.uniform(key, (size,)), size - math.ceil(size * sparsity)), params)

    def renew(state: SSAMState, epoch: jax.Array, grads: Any, moved: Any, extra_args: dict[str, Any]) -> Any:
        del moved, extra_args
        alive, steepness = flat(state.mask), jnp.abs(flat(grads))
        stay, grow = exchange_counts(alive.size, sparsity, drop_rate, refresh_epochs, epochs)
        now = jnp.minimum(epoch // refresh_epochs, len(stay) - 1)
        drawn = jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(state.key), epoch), alive.shape)
        staying = top_k_mask(jnp.where(alive, steepness + _SSAM_EPSILON, 0), jnp.asarray(stay)[now])
        growing = top_k_mask(jnp.where(alive, 0, drawn + _SSAM_EPSILON), jnp.asarray(grow)[now])
        return unflat(staying | growing, state.mask)

    return _sparse(optimizer, rho, refresh_epochs, steps_per_epoch, seed, random_mask, renew)


def _sparse(
    optimizer: optax.GradientTransformation,
    rho: jax.typing.ArrayLike,
    refresh_epochs: int,
    steps_per_epoch: int,
    seed: int,
    first_mask: Callable[[jax.Array, Any], Any],
    renew: Renew,
) -> Wrapping:
    """The machinery of `ssam_f` and `ssam_d`, which differ in their masks only."""
    _check_rho(rho)
    _check_count("refresh_epochs", refresh_epochs)
    _check_count("steps_per_epoch", steps_per_epoch)
    _check_count("seed", seed, least=0)

    def init_fn(params: Any) -> SSAMState:
        # The key is state, not a constant: members of one vmapped program have seeds of their own.
        first, following = jax.random.split(jax.random.key(seed))
        return SSAMState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key_data(following),
            mask=first_mask(first, params),
            inner_state=optimizer.init(params),
        )

    def update_fn(
        updates: Any, state: SSAMState, params: Any = None, *, grad_fn: GradFn | None = None, **extra_args: Any
    ) -> tuple[Any, SSAMState]:
        _check_call(params, grad_fn)
        assert grad_fn is not None
        ascent = _scaled_to(rho, updates, _SSAM_EPSILON)
        ascent = jax.tree.map(lambda step, chosen: jnp.where(chosen, step, 0), ascent, state.mask)
        with jax.numpy_dtype_promotion("standard"):  # the perturbation is at least float32, whatever the parameters are
            perturbed = optax.apply_updates(params, ascent)
        grads = gradient_again(grad_fn, perturbed, 0)
        descent, inner_state = update_with(
            optimizer.update, grads, state.inner_state, params, grad_fn=grad_fn, **_renewed(extra_args, grads)
        )
        epoch, batch = state.count // steps_per_epoch, state.count % steps_per_epoch
        mask = refreshed(
            (batch == 0) & (epoch % refresh_epochs == 0),
            lambda: renew(state, epoch, updates, optax.apply_updates(params, descent), extra_args),
            state.mask,
        )
        return descent, SSAMState(optax.safe_increment(state.count), state.key, mask, inner_state)

    def around(other: optax.GradientTransformation) -> Wrapping:
        return _sparse(other, rho, refresh_epochs, steps_per_epoch, seed, first_mask, renew)

    return Wrapping.of(optimizer, around, init_fn, update_fn)


def _scaled_to(length: jax.typing.ArrayLike, updates: Any, epsilon: float) -> Any:
    """Updates of this global norm, but for epsilon; at least float32, in which squares neither overflow nor vanish."""
    updates = jax.tree.map(lambda leaf: leaf.astype(wide(leaf)), updates)
    with jax.numpy_dtype_promotion("standard"):
        norm = optax.tree.norm(updates)
        return jax.tree.map(lambda leaf: length * leaf / (norm + epsilon), updates)


def _renewed(extra_args: dict[str, Any], grads: Any) -> dict[str, Any]:
    """Extra arguments for the optimizer's step, which is made along these gradients."""
    return {**extra_args, "grad": grads} if "grad" in extra_args else extra_args


def _check_call(params: Any, grad_fn: GradFn | None) -> None:
    if params is None:
        raise ValueError("A sharpness-aware optimizer perturbs the parameters: pass `params`.")
    if grad_fn is None:
        raise ValueError(f"A sharpness-aware optimizer evaluates the gradient again: {PASS_GRAD_FN}")


def _check_rho(rho: Any) -> None:
    if isinstance(rho, bool) or not isinstance(rho, int | float | jax.Array | np.ndarray | np.generic):
        raise ValueError(f"`rho` must be a number or a scalar array, not {rho!r}.")
    shape = getattr(rho, "shape", ())
    if shape != ():
        raise ValueError(f"`rho` has shape {shape}; it must be a scalar. Train a grid with jax.vmap.")
    known = 1.0 if isinstance(rho, jax.core.Tracer) else float(rho)
    if not (math.isfinite(known) and known > 0):
        raise ValueError(f"`rho` must be positive and finite, not {known}.")


def _check_fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a Python number from 0 to below 1, not {value!r}.")


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"`{name}` must be a Python integer of at least {least}, not {value!r}.")
