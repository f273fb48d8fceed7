"""Everything that determines a training run, checked when it is made."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError, did_you_mean, shown
from mgrad_jax.evaluation.metrics import METRICS
from mgrad_jax.models.adversarial import adversarial
from mgrad_jax.optimizers import make_optimizer
from mgrad_jax.training.decay import decayed, rate_factors
from mgrad_jax.training.memory import check_memory, estimate
from mgrad_jax.training.methods import METHODS, Method
from mgrad_jax.training.numerics import MATMUL_PRECISIONS

# The numbers that the compiled programs hold: 32 bits, smaller ones are taken for zero.
_INT32 = 2**31 - 1
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# The most that a setting usually is; beyond, it is named where a training diverges.
_USUAL = {
    "learning_rate": 0.5,
    "alpha1": 10.0,
    "alpha2": 10.0,
    "weight_decay": 1.0,
    "momentum": 0.999,
    "rho": 5.0,
    "epsilon": 10.0,
    "weight": 100.0,
    "reg_weight": 100.0,
    "cl_weight": 100.0,
    "ssl_alpha": 100.0,
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
        model, hyper_parameters: the model and its hyper-parameters by published name; the rest keep their defaults.
        data: a directory in MMRec format, or "demo".
        training: the method, by its name in `mgrad_jax.training.methods`: "mirror", "plain" (the optimizer alone),
            "replay" (the control with equally many updates) ...
        alpha1, alpha2, interval: of Mirror Gradient; a method uses those it takes.
        flat_minima_args: arguments of the method's own, as of `mgrad_jax.sharpness_aware.ssam_f`.
        adversarial: None, or "epsilon" and "weight" of `mgrad_jax.models.adversarial.adversarial`.
        feature_dtype: type in which tables of features are held, "float32" or "bfloat16".
        matmul_precision: of dense float32 products, see docs/gpu.md: "highest" (float32), "high" or "default" (as the
            device likes, TF32 on recent NVIDIA cards). A CPU computes the same in all of them.
        deterministic: whether a GPU has to add in one order always, see docs/gpu.md.
        optimizer, learning_rate, weight_decay, optimizer_args: see `mgrad_jax.optimizers.make_optimizer`.
        learning_rate_decay: (g, s): epoch e, from 0, trains at learning_rate * g ** (e / s).
        max_norm: clip gradients by global norm before a batch's last update; None: never.
        seed: of the initial parameters and of everything drawn in training.
        epochs, patience, batch_size, metric, ks, evaluate: see `mgrad_jax.training.fit`.
        start_from: a run whose best parameters this one begins with, see `mgrad_jax.training.start`; None: its own.
        keep_every: keep the parameters of one epoch in how many (`mgrad_jax.training.kept`); None: of none.
        out: the run's directory; None: `runs/<model>-<data>-<training>-s<seed>`.

    Raises:
        UserError: a name that does not exist or a value out of range.
    """

    model: str
    data: str
    training: str = "mirror"
    alpha1: float = 1.0
    alpha2: float = 0.2
    interval: int = 3
    flat_minima_args: Mapping[str, Any] = field(default_factory=dict)
    adversarial: Mapping[str, float] | None = None
    feature_dtype: str = "float32"
    matmul_precision: str = "highest"
    deterministic: bool = False
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    learning_rate_decay: tuple[float, float] = (1.0, 50.0)
    max_norm: float | None = None
    seed: int = 999
    epochs: int = 1000
    patience: int = 20
    batch_size: int = 2048
    metric: str = "recall@5"
    ks: tuple[int, ...] = (5, 10, 20, 50)
    evaluate: str = "fresh"
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    keep_every: int | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        models.make_config(self.model, dict(self.hyper_parameters))
        self._check_numbers()
        self._check_choices()
        self._check_adversarial()
        self._check_method()

    def _check_method(self) -> None:
        """The method takes its settings and arguments, and the optimizer its own."""
        for name in self.method.uses:
            if name == "interval":
                _at_least(name, self.interval, 1)
            else:
                _positive(name, getattr(self, name))
        self._check_update(self._optimizer, f"the {self.optimizer} optimizer", self.optimizer_args)
        self.method.check_arguments(self.flat_minima_args)
        self._check_update(self.transformation, self.training, self.flat_minima_args)

    def _check_update(
        self, build: Callable[[], optax.GradientTransformation], what: str, arguments: Mapping[str, Any]
    ) -> None:
        """Build and update once in the abstract: Optax looks at most arguments only when it updates."""
        try:
            tx = optax.with_extra_args_support(build())
            params = jax.ShapeDtypeStruct((2, 2), jnp.float32)
            gradients = {"grad_fn": lambda p, i: p, "sample_grad_fn": lambda p, i: p, "n_samples": 1}
            jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, **gradients), params)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"{what} does not take {shown(dict(arguments))} ({reason}); correct its arguments."
            ) from None

    def _check_adversarial(self) -> None:
        if self.adversarial is None:
            return
        for name in self.adversarial:
            if name not in ("epsilon", "weight"):
                near = did_you_mean(name, ("epsilon", "weight"))
                raise UserError(
                    f"adversarial training has no argument {shown(name)}; choose among epsilon, weight{near}."
                )
        for name in ("epsilon", "weight"):
            if name not in self.adversarial:
                raise UserError(f"adversarial training lacks its {name}; give epsilon and weight.")
            _positive(name, self.adversarial[name])

    def _check_choices(self) -> None:
        for what, value, choices in (
            ("training", self.training, tuple(METHODS)),
            ("evaluate", self.evaluate, ("fresh", "stale")),
            ("feature dtype", self.feature_dtype, ("float32", "bfloat16")),
            ("matmul precision", self.matmul_precision, MATMUL_PRECISIONS),
            ("metric", self.metric, self.metric_names),
        ):
            if value not in choices:
                raise UserError(
                    f"unknown {what} {shown(value)}; choose one of {', '.join(choices)}{did_you_mean(value, choices)}."
                )

    def _check_numbers(self) -> None:
        _positive("learning_rate", self.learning_rate)
        if self.max_norm is not None:
            _positive("max_norm", self.max_norm)
        if not is_number(self.weight_decay) or not 0 <= self.weight_decay <= _LARGEST:
            raise UserError(
                f"weight_decay is {shown(self.weight_decay)}; it must be a number from 0 to {_LARGEST:.2g}."
            )
        for name, least in (("seed", 0), ("epochs", 1), ("patience", 0), ("batch_size", 1)):
            _at_least(name, getattr(self, name), least, 2**32 - 1 if name == "seed" else _INT32)
        if self.keep_every is not None:
            _at_least("keep_every", self.keep_every, 1)
        if not self.ks:
            raise UserError("ks is empty; name at least one cut-off of the metrics.")
        for k in self.ks:
            _at_least("ks", k, 1)
        self._check_decay()

    def _check_decay(self) -> None:
        """The learning rate must be a number in every epoch that is asked for."""
        if len(self.learning_rate_decay) != 2:
            raise UserError(f"learning_rate_decay is {shown(self.learning_rate_decay)}; it must be two numbers.")
        base, scale = self.learning_rate_decay
        _positive("learning_rate_decay", base)
        _positive("learning_rate_decay", scale)
        exponent = (self.epochs - 1) / scale
        if math.log(self.learning_rate) + exponent * math.log(base) > math.log(_LARGEST):
            raise UserError(
                f"learning_rate_decay {base:g} {scale:g} takes the learning rate above {_LARGEST:.2g} by epoch "
                f"{self.epochs}; bring the first number closer to 1, raise the second, or ask for fewer epochs."
            )

    @property
    def directory(self) -> Path:
        """The run's directory."""
        name = Path(self.data).resolve().name if self.data != "demo" else "demo"
        return Path(self.out or f"runs/{self.model}-{name}-{self.training}-s{self.seed}")

    @property
    def metric_names(self) -> list[str]:
        """All metrics, e.g. "recall@5", in the order of files and tables."""
        return [f"{name}@{k}" for name in METRICS for k in self.ks]

    @property
    def method(self) -> Method:
        """The entry of the training's method."""
        return METHODS[self.training]

    @property
    def values(self) -> dict[str, Any]:
        """All settings by name, as they are."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def summary(self) -> str:
        """The settings of training in words, for messages."""
        training = self.method.description(self.values)
        return f"{self.model} with {training}, {self.optimizer}, learning rate {self.learning_rate:g}"

    @property
    def suspicion(self) -> str:
        """A sentence on the settings that are far from what is usual, for a training that diverged; mostly empty."""
        own = dataclasses.asdict(models.make_config(self.model, dict(self.hyper_parameters)))
        values: dict[str, Any] = {**own, **self.optimizer_args, **(self.adversarial or {})}
        values |= {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay, "max_norm": self.max_norm}
        values |= self.method.numbers(self.values)
        odd = [
            f"{name} {values[name]:g}"
            for name, most in _USUAL.items()
            if is_number(values.get(name)) and values[name] > most
        ]
        if {"alpha1", "alpha2"} <= {*self.method.uses} and self.alpha2 >= self.alpha1:
            odd.append(f"alpha2 {self.alpha2:g} beside alpha1 {self.alpha1:g}, at which mirror batches ascend")
        if self.learning_rate_decay[0] > 1:
            odd.append(f"learning_rate_decay {self.learning_rate_decay[0]:g}, with which the rate grows")
        return f" Far from what is usual: {', '.join(odd)}." if odd else ""

    def create_model(self, data: Interactions, *, training: bool = True) -> models.Recommender:
        """The run's model before training.

        Args:
            data: what it is built for.
            training: whether it will be trained, which takes more memory than the model.

        Raises:
            UserError: the data lack what the model needs, or the device has not the memory that it takes.
        """
        config = models.make_config(self.model, dict(self.hyper_parameters))
        tx = self.transformation(data) if training else optax.identity()
        parts = estimate(self.model, config, data, tx, batch_size=self.batch_size, ks=self.ks)
        settings = {**dataclasses.asdict(config), "batch_size": self.batch_size, "ks": self.ks}
        check_memory(parts if training else {"parameters": parts["parameters"].shrunk(2)}, self.model, settings)
        feature_dtype = jnp.dtype(self.feature_dtype)
        model = models.create(self.model, data, seed=self.seed, feature_dtype=feature_dtype, **self.hyper_parameters)
        return model if self.adversarial is None else adversarial(model, **self.adversarial)

    @functools.cached_property
    def rate_factors(self) -> Any:
        """The factor on the learning rate in each epoch, None where the rate stays as it is."""
        return rate_factors(tuple(self.learning_rate_decay))

    def _optimizer(self, numbers: Mapping[str, Any] = MappingProxyType({})) -> optax.GradientTransformation:
        values = {**self.values, "rate_factors": self.rate_factors, **numbers}
        decay, arguments = values["weight_decay"], self.optimizer_args
        optimizer = make_optimizer(self.optimizer, values["learning_rate"], weight_decay=decay, **arguments)
        return decayed(optimizer, values["rate_factors"])

    def transformation(
        self, data: Interactions | None = None, numbers: Mapping[str, Any] = MappingProxyType({})
    ) -> optax.GradientTransformation:
        """The Optax chain of the run.

        Args:
            data: what it trains on, for methods whose masks are renewed by its batches (`ssam-f`, `ssam-d`).
            numbers: settings, and `rate_factors`, that take the place of the configuration's; they may be traced.
        """
        steps = 1 if data is None else -(-len(data.train) // self.batch_size)
        values = {**self.values, **numbers, "steps_per_epoch": steps}
        return self.method.transformation(self._optimizer(numbers), values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, the model's defaults filled in."""
        values = self.values
        values["data"] = self.data if self.data == "demo" else str(Path(self.data).absolute())
        values["out"] = str(self.directory)
        values["start_from"] = None if self.start_from is None else str(Path(self.start_from).absolute())
        values["hyper_parameters"] = dataclasses.asdict(models.make_config(self.model, dict(self.hyper_parameters)))
        values["optimizer_args"] = dict(self.optimizer_args)
        values["flat_minima_args"] = dict(self.flat_minima_args)
        values["adversarial"] = None if self.adversarial is None else dict(self.adversarial)
        values["learning_rate_decay"] = list(self.learning_rate_decay)
        values["ks"] = list(self.ks)
        if self.keep_every is None:  # as in the files of runs that keep none
            del values["keep_every"]
        return values


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not one of the truth values that Python counts among them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _positive(name: str, value: Any) -> None:
    if not is_number(value) or not _SMALLEST <= value <= _LARGEST:
        if is_number(value) and value > 0:
            raise UserError(f"{name} is {shown(value)}; it must be a number from {_SMALLEST:.2g} to {_LARGEST:.2g}.")
        raise UserError(f"{name} is {shown(value)}; it must be a positive number.")


def _at_least(name: str, value: Any, least: int, most: int = _INT32) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {shown(value)}; it must be a whole number of at least {least}.")
    if value > most:
        raise UserError(f"{name} is {shown(value)}; it must be at most {most}.")
