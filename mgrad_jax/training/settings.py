"""The settings of a training, each declared once: configurations, the command line, `fit` and grids read them here.

A new setting is a field here and the place where it is used. What it is besides is said by marks:

- `axis`: it may vary in a grid;
- `traced`: it is a number that the program of a sweep takes as an argument, one for every member;
- `outside`: no compiled program depends on it, so that members which differ in it share one;
- `free`: it does not change the numbers of an epoch, so that a run may be resumed with another value.

Where and how a training runs (`--resume`, devices) is no setting: it is not kept with the run, nor compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mgrad_jax.declaration import INT32, LARGEST, UINT32, check_all, check_choice, check_names, marked, setting
from mgrad_jax.errors import UserError, shown
from mgrad_jax.training.methods import METHODS, Method, unused

MATMUL_PRECISIONS = ("default", "high", "highest")


@dataclass(frozen=True)
class FitSettings:
    """What `mgrad_jax.training.fit` is asked for besides model, data and optimizer.

    Attributes:
        learning_rate_decay: (g, s): the learning rate of epoch e, from 0, is multiplied by g ** (e / s).
        seed: of shuffling, negatives, dropout and resampling; of a run also of its initial parameters.
        epochs: the most epochs to run.
        patience: stop when more than this many epochs in a row bring no improvement.
        batch_size: interactions per batch; the last, partial batch is kept.
        metric: what selects the best epoch, on validation only.
        ks: cut-offs of the metrics.
        evaluate: "fresh" scores with the epoch's final parameters; "stale" with those before its last update, as the
            reference code of MMGCN, GRCN, DualGNN and SLMRec does.

    Raises:
        UserError: a value out of range.
    """

    learning_rate_decay: tuple[float, float] = setting(
        (1.0, 50.0), "Epoch e trains at learning rate * G ** (e / S).", above=0, metavar="G S", outside=True
    )
    seed: int = setting(
        999, "Of parameters, order, negatives and dropout.", least=0, limit=UINT32, axis=True, outside=True
    )
    epochs: int = setting(1000, "The most epochs to train.", least=1, limit=INT32, outside=True, free=True)
    patience: int = setting(
        20, "Epochs without improvement that are tolerated.", least=0, limit=INT32, outside=True, free=True
    )
    batch_size: int = setting(2048, "Interactions per batch.", least=1, limit=INT32, axis=True)
    metric: str = setting("recall@5", "What selects the best epoch, on validation.")
    ks: tuple[int, ...] = setting((5, 10, 20, 50), "Cut-offs of the metrics.", least=1, limit=INT32, option=())
    evaluate: str = setting(
        "fresh", "'fresh' parameters, or 'stale' ones from before an epoch's last update.", choices=("fresh", "stale")
    )

    def __post_init__(self) -> None:
        check_all(self, self._without_effect)
        if not self.ks:
            raise UserError("ks is empty; name at least one cut-off of the metrics.")
        check_choice("unknown metric", self.metric, self.metric_names)
        if len(self.learning_rate_decay) != 2:
            raise UserError(f"learning_rate_decay is {shown(self.learning_rate_decay)}; it must be two numbers.")

    @property
    def _without_effect(self) -> tuple[str, ...]:
        return ()

    @property
    def metric_names(self) -> list[str]:
        """All metrics, e.g. "recall@5", in the order of files and tables."""
        from mgrad_jax.evaluation.metrics import METRICS

        return [f"{name}@{k}" for name in METRICS for k in self.ks]

    @property
    def values(self) -> dict[str, Any]:
        """All settings by name, as they are."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Perturbation:
    """The arguments of `mgrad_jax.models.adversarial.adversarial`."""

    epsilon: float = setting(help="norm of a perturbed row's change", kind=float, above=0)
    weight: float = setting(help="of the loss on perturbed features", kind=float, above=0)


@dataclass(frozen=True)
class _Training:
    """What is trained, and how it is updated."""

    model: str = setting(help="A model's name; `mgrad-jax models` lists them.")
    data: str = setting(help="Directory in MMRec format, or 'demo'.", kind=object, outside=True, free=True)
    # The method's name in `mgrad_jax.training.methods`; it uses those of alpha1, alpha2 and interval that it takes.
    training: str = setting(
        "mirror",
        f"How to train: {'; '.join(f'{m.name}, {m.help}' for m in METHODS.values())}.",
        choices=METHODS,
        option=("--method",),
        metavar="NAME",
        axis=True,
    )
    alpha1: float = setting(1.0, "Factor of the first pass over a mirror batch.", above=0, traced=True)
    alpha2: float = setting(0.2, "Factor of the second pass, taken with the minus sign.", above=0, traced=True)
    interval: int = setting(3, "One batch in how many is a mirror batch (beta).", least=1, limit=INT32, axis=True)
    flat_minima_args: Mapping[str, Any] = setting(
        {}, "An argument of the method; repeatable.", option=("--method-arg", "--flat-minima-arg")
    )
    # None, or the values of a `Perturbation`.
    adversarial: Mapping[str, float] | None = setting(
        None, "Train on perturbed features too (AMR): epsilon=0.1,weight=1.", kind=dict
    )
    feature_dtype: str = setting(
        "float32",
        "Type in which tables of features are held: float32, or bfloat16 for half of the memory.",
        choices=("float32", "bfloat16"),
    )
    # A CPU computes the same in all of them, see docs/gpu.md.
    matmul_precision: str = setting(
        "highest",
        "Of dense products on a GPU: highest (float32), high, or default (TF32 on recent cards).",
        choices=MATMUL_PRECISIONS,
    )
    deterministic: bool = setting(False, "On a GPU, the same numbers every time, for some of its speed.")
    # Name and arguments as in `mgrad_jax.optimizers.make_optimizer`.
    optimizer: str = setting(
        "adam",
        "adam, sgd, rmsprop or adagrad, with PyTorch's defaults; adamw, lion, muon ..., with Optax's.",
        axis=True,
    )
    learning_rate: float = setting(1e-3, "Step size.", above=0, traced=True)
    weight_decay: float = setting(0.0, "Coupled for adam, sgd, rmsprop and adagrad.", least=0, traced=True)
    optimizer_args: Mapping[str, Any] = setting(
        {}, "An argument of the optimizer; repeatable.", option=("--optimizer-arg",)
    )
    # Before a batch's last update.
    max_norm: float | None = setting(None, "Clip gradients by this global norm.", kind=float, above=0)


@dataclass(frozen=True)
class Settings(FitSettings, _Training):
    """What determines the numbers of a training, checked in itself; `RunConfig` also asks model, method and optimizer.

    Raises:
        UserError: a name that does not exist or a value out of range.
    """

    # By the names of the reference code; the rest keep their defaults.
    hyper_parameters: Mapping[str, Any] = setting({}, "A hyper-parameter of the model; repeatable.", option=("--set",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversarial is not None:
            check_names("adversarial training has no argument", self.adversarial, marked(Perturbation))
            for field in fields(Perturbation):
                if field.name not in self.adversarial:
                    raise UserError(f"adversarial training lacks its {field.name}; give epsilon and weight.")
            check_all(Perturbation(**self.adversarial))
        base, scale = self.learning_rate_decay
        exponent = (self.epochs - 1) / scale
        if math.log(self.learning_rate) + exponent * math.log(base) > math.log(LARGEST):
            raise UserError(
                f"learning_rate_decay {base:g} {scale:g} takes the learning rate above {LARGEST:.2g} by epoch "
                f"{self.epochs}; bring the first number closer to 1, raise the second, or ask for fewer epochs."
            )

    @property
    def _without_effect(self) -> tuple[str, ...]:
        return unused(self.training)

    @property
    def method(self) -> Method:
        """The entry of the training's method."""
        return METHODS[self.training]


@dataclass(frozen=True)
class RunSettings(Settings):
    """The settings of a single run: those of a training, and what only runs with a directory of their own have."""

    # See `mgrad_jax.training.start`.
    start_from: str | None = setting(
        None, "Begin with the best parameters of this run of the same model.", kind=object, metavar="RUN"
    )
    # See `mgrad_jax.training.kept`.
    keep_every: int | None = setting(
        None,
        "Keep the parameters of every N-th epoch, for `landscape`; none by default.",
        kind=int,
        least=1,
        limit=INT32,
        outside=True,
        free=True,
    )
    out: str | None = setting(
        None,
        "The run's directory; runs/<model>-<data>-<training>-s<seed> by default.",
        kind=object,
        outside=True,
        free=True,
    )

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(self.out or f"runs/{self.model}-{dataset_name(self.data)}-{self.training}-s{self.seed}")


def dataset_name(data: str) -> str:
    """What directories are called after: the last part of the data's path, or "demo"."""
    return data if data == "demo" else Path(data).resolve().name
