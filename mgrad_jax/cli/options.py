"""The options of training, defined once for the commands that train; `key=value` arguments."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mgrad_jax.errors import UserError, did_you_mean, shown
from mgrad_jax.training.methods import METHODS

if TYPE_CHECKING:
    from mgrad_jax.training.config import RunConfig

# What `--flat-minima` takes, from before there was `--method`.
_FLAT_MINIMA = ("mirror", *(name for name, method in METHODS.items() if method.record == "flat_minima"))


@dataclass(frozen=True)
class TrainingOptions:
    """What `train` takes and `sweep` takes for all its members; a field is an option."""

    model: Annotated[str, typer.Option(help="A model's name; `mgrad-jax models` lists them.")]
    data: Annotated[str, typer.Option(help="Directory in MMRec format, or 'demo'.")]
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"How to train: {'; '.join(f'{m.name}, {m.help}' for m in METHODS.values())}."
        ),
    ] = None
    method_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--method-arg", "--flat-minima-arg", metavar="KEY=VALUE", help="An argument of the method; repeatable."
        ),
    ] = None
    mirror: Annotated[bool | None, typer.Option("--mirror/--no-mirror", help="--method mirror, or plain.")] = None
    replay: Annotated[bool, typer.Option("--replay", help="--method replay.")] = False
    flat_minima: Annotated[
        str | None, typer.Option(hidden=True, help=f"--method with one of {', '.join(_FLAT_MINIMA)}.")
    ] = None
    adversarial: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE,...", help="Train on perturbed features too (AMR): epsilon=0.1,weight=1."),
    ] = None
    feature_dtype: Annotated[
        str,
        typer.Option(help="Type in which tables of features are held: float32, or bfloat16 for half of the memory."),
    ] = "float32"
    matmul_precision: Annotated[
        str,
        typer.Option(help="Of dense products on a GPU: highest (float32), high, or default (TF32 on recent cards)."),
    ] = "highest"
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="On a GPU, the same numbers every time, for some of its speed.")
    ] = False
    alpha1: Annotated[float, typer.Option(help="Factor of the first pass over a mirror batch.")] = 1.0
    alpha2: Annotated[float, typer.Option(help="Factor of the second pass, taken with the minus sign.")] = 0.2
    interval: Annotated[int, typer.Option(help="One batch in how many is a mirror batch (beta).")] = 3
    optimizer: Annotated[
        str,
        typer.Option(
            help="adam, sgd, rmsprop or adagrad, with PyTorch's defaults; adamw, lion, muon ..., with Optax's."
        ),
    ] = "adam"
    learning_rate: Annotated[float, typer.Option(help="Step size.")] = 1e-3
    weight_decay: Annotated[float, typer.Option(help="Coupled for adam, sgd, rmsprop and adagrad.")] = 0.0
    optimizer_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the optimizer; repeatable.")
    ] = None
    learning_rate_decay: Annotated[
        tuple[float, float], typer.Option(metavar="G S", help="Epoch e trains at learning rate * G ** (e / S).")
    ] = (1.0, 50.0)
    max_norm: Annotated[float | None, typer.Option(help="Clip gradients by this global norm.")] = None
    seed: Annotated[int, typer.Option(help="Of parameters, order, negatives and dropout.")] = 999
    epochs: Annotated[int, typer.Option(help="The most epochs to train.")] = 1000
    patience: Annotated[int, typer.Option(help="Epochs without improvement that are tolerated.")] = 20
    batch_size: Annotated[int, typer.Option(help="Interactions a batch.")] = 2048
    metric: Annotated[str, typer.Option(help="What selects the best epoch, on validation.")] = "recall@5"
    evaluate: Annotated[
        str, typer.Option(help="'fresh' parameters, or 'stale' ones from before an epoch's last update.")
    ] = "fresh"
    hyper: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter of the model; repeatable."),
    ] = None

    def config(self, out: str | None, **of_run: Any) -> RunConfig:
        """The configuration of a run with these options, checked; `out` is its directory, the rest what sweeps lack."""
        from mgrad_jax.training.config import RunConfig
        from mgrad_jax.training.numerics import make_deterministic

        if self.deterministic:
            make_deterministic()
        values = asdict(self)
        for name in ("method", "mirror", "replay", "flat_minima"):
            del values[name]
        perturbed = values.pop("adversarial")
        return RunConfig(
            training=self._method(),
            flat_minima_args=pairs("--method-arg", values.pop("method_arg") or ()),
            adversarial=None if perturbed is None else pairs("--adversarial", perturbed.split(",")),
            optimizer_args=pairs("--optimizer-arg", values.pop("optimizer_arg") or ()),
            hyper_parameters=pairs("--set", values.pop("hyper") or ()),
            out=out,
            **values,
            **of_run,
        )

    def _method(self) -> str:
        """The name of the method; what excludes each other is an error."""
        for what, name, choices in (("", self.method, METHODS), ("flat-minima ", self.flat_minima, _FLAT_MINIMA)):
            if name not in (None, *choices):
                raise UserError(
                    f"unknown {what}method {shown(name)}; choose one of "
                    f"{', '.join(choices)}{did_you_mean(name, choices)}."
                )
        said = {
            f"--method {self.method}": self.method,
            "--mirror": "mirror" if self.mirror else None,
            "--no-mirror": "plain" if self.mirror is False else None,
            "--replay": "replay" if self.replay else None,
            f"--flat-minima {self.flat_minima}": self.flat_minima,
        }
        options = [option for option, method in said.items() if method is not None]
        methods = {method for method in said.values() if method is not None}
        if len(methods) > 1:
            raise UserError(f"{' and '.join(options)} exclude each other; leave one of them out.")
        return methods.pop() if methods else "mirror"


def takes_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command whose first parameter is a `TrainingOptions` take each of its fields as an option of its own."""
    own = inspect.signature(command, eval_str=True).parameters
    hints = get_type_hints(TrainingOptions, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = []
    for field in fields(TrainingOptions):
        parameter = inspect.Parameter(field.name, keyword, annotation=hints[field.name])
        required = field.default is MISSING
        shared.append(parameter if required else parameter.replace(default=field.default))
    shared += [parameter.replace(kind=keyword) for parameter in list(own.values())[1:]]

    def spread(**values: Any) -> None:
        options = TrainingOptions(**{f.name: values.pop(f.name) for f in fields(TrainingOptions)})
        command(options, **values)

    # Not by `functools.wraps`, which would show the one parameter of the command.
    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    spread.__signature__ = inspect.Signature(shared)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in shared}
    return spread


def pairs(option: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a dictionary, the values read as numbers, booleans or text."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = (part.strip() for part in argument.partition("="))
        if not separator or not key or not text:
            raise UserError(
                f"{option} {argument} is not of the form key=value; write for example {option} dropout=0.8."
            )
        if key in values:
            raise UserError(f"{option} {key} is given twice; leave one of them out.")
        values[key] = scalar(text)
    return values


# As YAML 1.1 has them.
_TRUTH_VALUES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def scalar(text: str) -> Any:
    """A number in plain digits, a truth value, or text, with or without quotes."""
    if "_" not in text and text.isascii():
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    if text in (text.lower(), text.capitalize(), text.upper()) and text.lower() in _TRUTH_VALUES:
        return _TRUTH_VALUES[text.lower()]
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text
