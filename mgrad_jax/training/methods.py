"""The table of training methods: how each is built, which settings it takes, what it costs, how it is spoken of.

The command line, configurations, grids, the rule of what must be equal to resume a run, results and comparisons read
this table. A method is an entry here, or is registered from outside (`register_method`), and is named nowhere else.
JAX is imported once a method is built, so that `mgrad-jax train --help` need not wait for it.
"""

from __future__ import annotations

import functools
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgrad_jax.declaration import check_names
from mgrad_jax.errors import UserError, shown

if TYPE_CHECKING:
    import optax

# Settings of a run that are there for methods, and without effect in those that do not take them.
SETTINGS = ("alpha1", "alpha2", "interval")
# What else a method may take from the run; of these, its arguments may say `seed` and `epochs` otherwise.
_OF_THE_RUN = ("seed", "epochs", "steps_per_epoch", "max_norm")
_NO_ARGUMENTS = ("steps_per_epoch", "max_norm")


def _one_a_batch(epoch: int, run: Mapping[str, Any]) -> int:
    del epoch
    return int(run["batches"])


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: on the command line and in files.
        build: makes the Optax transformation of the optimizer, its first argument. The names of the others say what it
            takes: `alpha1`, `alpha2`, `interval` are settings of the run, numbers that may be traced; `seed`, `epochs`,
            `steps_per_epoch` and `max_norm` follow from the run; all others are arguments of the method's own
            (`RunConfig.flat_minima_args`). The gradient is clipped before a method that does not take `max_norm`. Also
            as text, "package.module:name", from where it is imported when it is needed.
        help: what it does, in a few words.
        words: how messages speak of a training with it; may hold settings in braces.
        evaluations: gradient evaluations in an epoch, of the epoch (from 0) and a mapping with all that `build` takes,
            `batches` (in an epoch), `batch_size` and `n_train`. By default one per batch.
        record: where `result.json` holds its numbers besides "method", for readers of earlier versions.
    """

    name: str
    build: Callable[..., optax.GradientTransformation] | str
    help: str = ""
    words: str = ""
    evaluations: Callable[[int, Mapping[str, Any]], int] = _one_a_batch
    record: str | None = None

    @functools.cached_property
    def function(self) -> Callable[..., optax.GradientTransformation]:
        """`build`, imported."""
        return pkgutil.resolve_name(self.build) if isinstance(self.build, str) else self.build

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What `build` takes besides the optimizer, by name."""
        named = list(inspect.signature(self.function).parameters.values())[1:]
        return {p.name: p for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    @property
    def uses(self) -> tuple[str, ...]:
        """The settings among `SETTINGS` that have an effect."""
        return tuple(name for name in SETTINGS if name in self.parameters)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the method's own arguments."""
        return tuple(name for name in self.parameters if name not in (*SETTINGS, *_NO_ARGUMENTS))

    def check_arguments(self, given: Mapping[str, Any]) -> None:
        """Raise a `UserError` for an argument that the method does not have."""
        if given and not self.arguments:
            (name, *_) = given
            raise UserError(f"{self.name} training takes no flat-minima argument {shown(name)}; leave it out.")
        check_names(f"{self.name} has no argument", given, self.arguments)

    def transformation(
        self, optimizer: optax.GradientTransformation, values: Mapping[str, Any]
    ) -> optax.GradientTransformation:
        """The method around an optimizer; `values` are the settings of the run by name, and `steps_per_epoch`."""
        import optax

        from mgrad_jax.optimizers import clip

        if values["max_norm"] is not None and "max_norm" not in self.parameters:
            optimizer = optax.chain(clip(values["max_norm"]), optimizer)
        return self.function(optimizer, **self._taken(values))

    def gradient_evaluations(self, epochs: int, values: Mapping[str, Any], n_train: int) -> list[int]:
        """Gradient evaluations in each of the first epochs of a run with these settings."""
        batches = math.ceil(n_train / values["batch_size"])
        defaults = {name: p.default for name, p in self.parameters.items()}
        sizes = {"batches": batches, "batch_size": values["batch_size"], "n_train": n_train}
        run = {**defaults, **self._taken({**values, "steps_per_epoch": batches}), **sizes}
        return [self.evaluations(epoch, run) for epoch in range(epochs)]

    def description(self, values: Mapping[str, Any]) -> str:
        """A training with these settings in words.

        >>> METHODS["replay"].description({"interval": 3})
        'replay (interval 3)'
        """
        return (self.words or self.name).format_map(values)

    def numbers(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that have an effect, and the method's own arguments that were given."""
        return {**{name: values[name] for name in self.uses}, **values["flat_minima_args"]}

    def _taken(self, values: Mapping[str, Any]) -> dict[str, Any]:
        of_the_run = {name: values[name] for name in (*SETTINGS, *_OF_THE_RUN) if name in self.parameters}
        return {**of_the_run, **values["flat_minima_args"]}


def _mirror(optimizer: Any, alpha1: Any, alpha2: Any, interval: int, max_norm: Any) -> optax.GradientTransformation:
    import optax

    from mgrad_jax.mirror import mirror_gradient

    return optax.chain(mirror_gradient(alpha1, alpha2, interval, max_norm=max_norm), optimizer)


def _mirror_ascent(
    optimizer: Any, alpha1: Any, alpha2: Any, interval: int, max_norm: Any
) -> optax.GradientTransformation:
    import jax.numpy as jnp

    from mgrad_jax.ascent import check_own_ascent
    from mgrad_jax.mirror import mirrored

    try:
        check_own_ascent(optimizer, jnp.zeros((2, 2)))
    except ValueError:
        raise UserError(
            "mirror-ascent takes its step sizes from the optimizer's second moment, and none is known of this "
            "optimizer; choose one such as adam, adamw, rmsprop or adagrad, or sgd, or train with mirror."
        ) from None
    return mirrored(optimizer, alpha1, alpha2, interval, max_norm=max_norm, ascent=True)


def _replay(optimizer: Any, interval: int, max_norm: Any) -> optax.GradientTransformation:
    import optax

    from mgrad_jax.mirror import replay

    return optax.chain(replay(interval, max_norm=max_norm), optimizer)


def _one_a_pass(epoch: int, run: Mapping[str, Any]) -> int:
    """Mirror batches, every `interval`-th one, take two."""
    mirrored: int = math.ceil(run["batches"] / run["interval"])
    return _one_a_batch(epoch, run) + mirrored


def _two_a_batch(epoch: int, run: Mapping[str, Any]) -> int:
    return 2 * _one_a_batch(epoch, run)


def _with_renewals(epoch: int, run: Mapping[str, Any]) -> int:
    """SSAM-F: one more for every sample it looks at where it renews its mask."""
    # The renewal at batch 0 draws from the full batches, which leave the last, partial one out.
    samples = run["n_train"] // run["batch_size"] * run["batch_size"] or run["n_train"]
    renewal = min(run["fisher_samples"], samples) if epoch % run["refresh_epochs"] == 0 else 0
    return _two_a_batch(epoch, run) + renewal


# Whose numbers earlier versions keep under this name.
_flat_minima = functools.partial(Method, evaluations=_two_a_batch, record="flat_minima")
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "mirror",
            _mirror,
            "Mirror Gradient",
            "mirror gradient (alpha1 {alpha1:g}, alpha2 {alpha2:g}, interval {interval})",
            evaluations=_one_a_pass,
            record="mirror",
        ),
        Method(
            "mirror-ascent",
            _mirror_ascent,
            "Mirror Gradient whose second half-step is gradient ascent, which Adam's own is not",
            "mirror gradient with ascent (alpha1 {alpha1:g}, alpha2 {alpha2:g}, interval {interval})",
            evaluations=_one_a_pass,
        ),
        Method("plain", lambda optimizer: optimizer, "the optimizer alone", "plain training"),
        Method(
            "replay",
            _replay,
            "the control with as many updates: mirror batches are repeated with +1",
            "replay (interval {interval})",
            evaluations=_one_a_pass,
            record="replay",
        ),
        _flat_minima("sam", "mgrad_jax.sharpness_aware:sam", "sharpness-aware minimization"),
        _flat_minima(
            "ssam-f",
            "mgrad_jax.sharpness_aware:ssam_f",
            "sparse SAM, masked by Fisher information",
            evaluations=_with_renewals,
        ),
        _flat_minima("ssam-d", "mgrad_jax.sharpness_aware:ssam_d", "sparse SAM, dynamically masked"),
    )
}


def register_method(
    name: str,
    *,
    help: str = "",
    words: str = "",
    evaluations: Callable[[int, Mapping[str, Any]], int] = _one_a_batch,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a training method, which `RunConfig`, `train_run`, sweeps and studies then know by its name.

    Args:
        name: what it is called; a part of directory names.
        help, words, evaluations: see `Method`.

    Returns:
        A decorator for the function that builds the transformation (`Method.build`); it returns the function.

    Raises:
        ValueError: a name that is taken or cannot be in the name of a directory, or a function without an optimizer.

    >>> @register_method("every-second", help="an update every second batch")
    ... def every_second(optimizer, n_batches=2):
    ...     return optax.MultiSteps(optimizer, n_batches)
    >>> METHODS.pop("every-second").arguments
    ('n_batches',)
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
        raise ValueError(f"{name!r} is no name of a method; use lower-case letters, digits, '-', '_' and '.'.")
    if name in METHODS:
        raise ValueError(f"There is a method {name!r} already; choose another name.")

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(build).parameters.values())
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise ValueError(f"The function of method {name!r} must take the optimizer as its first argument.")
        METHODS[name] = Method(name, build, help, words, evaluations)
        return build

    return register


def unused(name: Any) -> tuple[str, ...]:
    """The settings among `SETTINGS` without effect in a method; none where there is no such method.

    >>> unused("replay")
    ('alpha1', 'alpha2')
    """
    method = METHODS.get(name) if isinstance(name, str) else None
    return () if method is None else tuple(setting for setting in SETTINGS if setting not in method.uses)


def follows_epochs(settings: Mapping[str, Any]) -> bool:
    """Whether a method's schedule is spread over the planned epochs, so that their number changes a run's numbers."""
    method = METHODS.get(settings["training"]) if isinstance(settings.get("training"), str) else None
    own = settings.get("flat_minima_args")
    return method is not None and "epochs" in method.parameters and not (isinstance(own, Mapping) and "epochs" in own)
