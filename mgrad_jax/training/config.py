"""The configuration of a run: its settings, and what is built of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.declaration import is_a, plain
from mgrad_jax.errors import UserError, shown
from mgrad_jax.models.adversarial import adversarial
from mgrad_jax.optimizers import make_optimizer
from mgrad_jax.processes import together
from mgrad_jax.training.decay import decayed, rate_factors
from mgrad_jax.training.memory import Part, check_memory, estimate
from mgrad_jax.training.settings import RunSettings

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
class RunConfig(RunSettings):
    """Everything that determines a run, checked when it is made; `mgrad_jax.training.settings` declares each setting.

    Raises:
        UserError: a name that does not exist, a value out of range, or what model, method or optimizer do not take.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.model_config
        try:
            self._check_update(self.transformation, self.training, self.flat_minima_args)
        except UserError:  # of which the optimizer inside, or an argument that does not exist, may be the cause
            self._check_update(self._optimizer, f"the {self.optimizer} optimizer", self.optimizer_args)
            self.method.check_arguments(self.flat_minima_args)
            raise
        self.method.check_arguments(self.flat_minima_args)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration that `to_dict` wrote, perhaps in a file.

        Raises:
            UserError, TypeError, LookupError: it wrote no such values.
        """
        lists = {name for name, default in cls.defaults().items() if isinstance(default, tuple)}
        given: dict[str, Any] = {name: tuple(value) if name in lists else value for name, value in values.items()}
        return cls(**given)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings that need not be given, as they are then; tables of arguments are empty."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}

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

    @functools.cached_property
    def model_config(self) -> models.ModelConfig:
        """The model's hyper-parameters, its defaults included."""
        return models.make_config(self.model, dict(self.hyper_parameters))

    @property
    def summary(self) -> str:
        """The settings of training in words, for messages."""
        training = self.method.description(self.values)
        return f"{self.model} with {training}, {self.optimizer}, learning rate {self.learning_rate:g}"

    @property
    def suspicion(self) -> str:
        """A sentence on the settings that are far from what is usual, for a training that diverged; mostly empty."""
        own = dataclasses.asdict(self.model_config)
        values: dict[str, Any] = {**own, **self.optimizer_args, **(self.adversarial or {})}
        values |= {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay, "max_norm": self.max_norm}
        values |= self.method.numbers(self.values)
        odd = [
            f"{name} {values[name]:g}"
            for name, most in _USUAL.items()
            if is_a(float, values.get(name)) and values[name] > most
        ]
        if {"alpha1", "alpha2"} <= {*self.method.uses} and self.alpha2 >= self.alpha1:
            odd.append(f"alpha2 {self.alpha2:g} beside alpha1 {self.alpha1:g}, at which mirror batches ascend")
        if self.learning_rate_decay[0] > 1:
            odd.append(f"learning_rate_decay {self.learning_rate_decay[0]:g}, with which the rate grows")
        return f" Far from what is usual: {', '.join(odd)}." if odd else ""

    def create_model(
        self, data: Interactions, *, training: bool = True, mesh: Mesh | None = None
    ) -> models.Recommender:
        """The run's model before training.

        Args:
            data: what it is built for.
            training: whether it will be trained, which takes more memory than the model.
            mesh: of several devices that are to share it. Where these are those of several processes, all of them make
                this call, of equal data.

        Raises:
            UserError: the data lack what the model needs, or a device has not the memory that it takes.
        """
        parts = self.memory(data, training=training)
        settings = {**dataclasses.asdict(self.model_config), "batch_size": self.batch_size, "ks": self.ks}
        if not training:
            parts = {"parameters": parts["parameters"]._replace(size=parts["parameters"].size // 2)}
        # The memory is each process's own; what the data lack, all of them find.
        together(lambda: check_memory(parts, self.model, settings, devices=1 if mesh is None else mesh.size))
        how: dict[str, Any] = {"seed": self.seed, "feature_dtype": jnp.dtype(self.feature_dtype), "mesh": mesh}
        model = models.create(self.model, data, **how, **self.hyper_parameters)
        return model if self.adversarial is None else adversarial(model, **self.adversarial)

    def memory(self, data: Interactions, *, training: bool = True) -> dict[str, Part]:
        """The largest arrays of a training on the data, or of its model, see `mgrad_jax.training.memory.estimate`."""
        tx = self.transformation(data) if training else optax.identity()
        return estimate(self.model, self.model_config, data, tx, batch_size=self.batch_size, ks=self.ks)

    @functools.cached_property
    def rate_factors(self) -> np.ndarray | None:
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
        values["hyper_parameters"] = dataclasses.asdict(self.model_config)
        if self.keep_every is None:  # as in the files of runs that keep none
            del values["keep_every"]
        return {name: plain(value) for name, value in values.items()}
