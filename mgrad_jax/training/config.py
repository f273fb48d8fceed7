"""Everything that determines a training run, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mgrad_jax import models
from mgrad_jax.errors import UserError
from mgrad_jax.evaluation.metrics import METRICS
from mgrad_jax.mirror import mirror_gradient, replay
from mgrad_jax.optimizers import make_optimizer

TRAININGS = ("mirror", "plain", "replay")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
        model, hyper_parameters: the model and its hyper-parameters by published name; the rest keep their defaults.
        data: a directory in MMRec format, or "demo".
        training: "mirror", "plain" (the optimizer alone) or "replay" (the control with equally many updates).
        alpha1, alpha2, interval: of Mirror Gradient; replay uses the interval, plain none of them.
        optimizer, learning_rate, weight_decay, optimizer_args: see `mgrad_jax.optimizers.make_optimizer`.
        learning_rate_decay: (g, s): epoch e, from 0, trains at learning_rate * g ** (e / s).
        max_norm: clip gradients by global norm before a batch's last update; None: never.
        seed: of the initial parameters and of everything drawn in training.
        epochs, patience, batch_size, metric, ks, evaluate: see `mgrad_jax.training.fit`.
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
    out: str | None = None

    def __post_init__(self) -> None:
        models.make_config(self.model, dict(self.hyper_parameters))
        self._check_choices()
        self._check_numbers()
        if self.training != "plain":
            _positive("alpha1", self.alpha1)
            _positive("alpha2", self.alpha2)
            _at_least("interval", self.interval, 1)
        try:
            # Optax looks at most arguments only when it updates.
            transformation = self.transformation()
            params = jax.ShapeDtypeStruct((2, 2), jnp.float32)
            jax.eval_shape(lambda p: transformation.update(p, transformation.init(p), p), params)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"the {self.optimizer} optimizer does not take {dict(self.optimizer_args)} ({reason}); "
                "correct its arguments."
            ) from None

    def _check_choices(self) -> None:
        for what, value, choices in (
            ("training", self.training, TRAININGS),
            ("evaluate", self.evaluate, ("fresh", "stale")),
            ("metric", self.metric, self.metric_names),
        ):
            if value not in choices:
                raise UserError(f"unknown {what} '{value}'; choose one of {', '.join(choices)}.")

    def _check_numbers(self) -> None:
        _positive("learning_rate", self.learning_rate)
        for number in self.learning_rate_decay:
            _positive("learning_rate_decay", number)
        if self.max_norm is not None:
            _positive("max_norm", self.max_norm)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"weight_decay is {self.weight_decay}; it must be finite and not negative.")
        for name, least in (("seed", 0), ("epochs", 1), ("patience", 0), ("batch_size", 1)):
            _at_least(name, getattr(self, name), least)
        for k in self.ks:
            _at_least("ks", k, 1)
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}; it must be below 2**32.")

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
    def mirror(self) -> dict[str, Any] | None:
        """The factors and interval of Mirror Gradient, None in other trainings."""
        if self.training != "mirror":
            return None
        return {"alpha1": self.alpha1, "alpha2": self.alpha2, "interval": self.interval}

    @property
    def summary(self) -> str:
        """The settings of training in words, for messages."""
        details = {
            "mirror": f"mirror gradient (alpha1 {self.alpha1:g}, alpha2 {self.alpha2:g}, interval {self.interval})",
            "replay": f"replay (interval {self.interval})",
            "plain": "plain training",
        }
        return f"{self.model} with {details[self.training]}, {self.optimizer}, learning rate {self.learning_rate:g}"

    def transformation(self) -> optax.GradientTransformation:
        """The Optax chain of the run."""
        optimizer = make_optimizer(
            self.optimizer, self.learning_rate, weight_decay=self.weight_decay, **self.optimizer_args
        )
        if self.training == "mirror":
            return optax.chain(
                mirror_gradient(self.alpha1, self.alpha2, self.interval, max_norm=self.max_norm), optimizer
            )
        if self.training == "replay":
            return optax.chain(replay(self.interval, max_norm=self.max_norm), optimizer)
        return optimizer if self.max_norm is None else optax.chain(clip(self.max_norm), optimizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, the model's defaults filled in."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["data"] = self.data if self.data == "demo" else str(Path(self.data).absolute())
        values["out"] = str(self.directory)
        values["hyper_parameters"] = dataclasses.asdict(models.make_config(self.model, dict(self.hyper_parameters)))
        values["optimizer_args"] = dict(self.optimizer_args)
        values["learning_rate_decay"] = list(self.learning_rate_decay)
        values["ks"] = list(self.ks)
        return values


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} is {value}; it must be a positive number.")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value}; it must be a whole number of at least {least}.")


def clip(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)), PyTorch's rule for clipping by global norm.

    >>> clip(1.0).update(jnp.array([3.0, 4.0]), optax.EmptyState())[0].round(3)
    Array([0.6, 0.8], dtype=float32)
    """

    def update(updates: Any, params: Any) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)

    return optax.stateless(update)
