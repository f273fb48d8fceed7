"""What the analyses are asked for, each setting declared once; commands take them as options of the same meaning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mgrad_jax.declaration import INT32, UINT32, check_all, setting
from mgrad_jax.errors import UserError

# Of each scale of the noise, and of each share of the items.
NOISE_DRAWS, ADJUSTMENT_DRAWS = 20, 10


@dataclass(frozen=True)
class LandscapeSettings:
    """What is measured of every run's loss (`mgrad_jax.analysis.landscape_run`).

    Raises:
        UserError: a value out of range; the message names its option.
    """

    directions: Literal["filter", "table", "raw"] = setting(
        "filter",
        "Of the surface: 'filter' (every row of a table and every output of a kernel in units of its norm), 'table' "
        "(of the whole table), or 'raw' (standard normal).",
        choices=("filter", "table", "raw"),
    )
    points: int = setting(21, "Points of the surface along each direction.", least=2, most=1000)
    reach: float = setting(1.0, "The surface goes from minus this to this.", above=0, option=("--range",))
    sample: int = setting(8192, "Training pairs the loss is taken over, in one batch.", least=1, most=INT32)
    scale_per: Literal["table", "row"] = setting(
        "table",
        "Unit of scale-corrected numbers: root mean square of the 'table', or of each 'row'.",
        choices=("table", "row"),
    )
    probes: int = setting(16, "Random directions of the smoothed rise and of the trace.", least=1, most=10_000)
    # Evenly spread over those that a run kept.
    kept_epochs: int = setting(
        12,
        "How many kept epochs of a run are measured at most (`train --keep-every`); 0: none.",
        least=0,
        most=INT32,
    )
    seed: int = setting(0, "Of pairs, negatives, dropout and directions.", least=0, most=UINT32)

    def __post_init__(self) -> None:
        check_all(self, as_options=True)


@dataclass(frozen=True)
class TheorySettings:
    """What is measured of the theorem and the lemma (`mgrad_jax.analysis.theory_run`).

    Raises:
        UserError: a value out of range; the message names its option.
    """

    epochs: int = setting(5, "Epochs of Mirror Gradient with --model.", least=0)
    alpha1: float = setting(1.0, "Factor of the first half-step.")
    alpha2: float = setting(0.2, "Factor of the second one, smaller than the first.")
    learning_rate: float | None = setting(
        None, "Of the half-steps and the penalty; the run's own, or 1e-3.", kind=float, above=0
    )
    optimizers: tuple[str, ...] = setting(
        ("sgd", "adam", "rmsprop", "adagrad"), "Whose half-steps are measured.", metavar="NAME,..."
    )
    batch_size: int | None = setting(None, "Of the measured batch; the run's own, or 2048.", kind=int, least=1)
    # Of Mirror Gradient, and of gradients that Adam's second moment is made of.
    warm_up: int = setting(30, "Batches before an optimizer's state counts as running.", least=1)
    pairs: int = setting(8192, "Training pairs of which --inputs takes the loss.", least=1, limit=INT32)
    examples: int = setting(64, "On how many single examples --inputs tests the lemma.", least=0)
    seed: int = setting(999, "Of batches, dropout and graphs; with --model of the training too.", least=0, most=UINT32)

    def __post_init__(self) -> None:
        check_all(self, as_options=True)
        if not 0 < self.alpha2 < self.alpha1:
            raise UserError(
                f"--alpha1 is {self.alpha1:g} and --alpha2 {self.alpha2:g}; the theorem wants 0 < alpha2 < alpha1."
            )


@dataclass(frozen=True)
class RobustnessSettings:
    """What is changed at inference and how (`mgrad_jax.analysis.robustness_run`).

    Raises:
        UserError: a value out of range, or what goes together with nothing; the message names its option.
    """

    noise: bool = setting(False, "Gaussian noise in the learned item tables; what is done by default.")
    kinds: tuple[str, ...] = setting(
        (),
        "Other features of some items: swap, mix, noise, mean.",
        kind=str,
        choices=("swap", "mix", "noise", "mean"),
        option=("--adjust",),
        metavar="KIND,...",
    )
    directory: Path | None = setting(
        None,
        "Your own other features: image_feat.npy or text_feat.npy of the same shape.",
        kind=Path,
        option=("--adjusted-features",),
        metavar="DIR",
    )
    scales: tuple[float, ...] = setting(
        (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0), "Scales of the noise.", least=0, metavar="S,..."
    )
    shares: tuple[float, ...] = setting(
        (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0),
        "Shares of the items that are changed.",
        least=0,
        most=1,
        metavar="Q,...",
    )
    draws: int | None = setting(None, "Draws of the noise, or of the items; 20 and 10 by default.", kind=int, least=1)
    per: str = setting(
        "table",
        "Unit of a scale: the root mean square of the 'table', of each 'row', or 'none'.",
        choices=("table", "row", "none"),
        option=("--scale-per",),
    )
    at: str = setting("table", "Noise in the 'table', or in the scored item 'vectors'.", choices=("table", "vectors"))
    tables: tuple[str, ...] = setting(
        (), "Which learned tables get noise, if not the model's own choice.", kind=str, metavar="PATH,..."
    )
    modality: str = setting("both", "Whose features change: image, text or both.", choices=("both", "image", "text"))
    mix: float = setting(0.5, "Share of the other item's features in --adjust mix.", least=0, most=1)
    feature_noise: float = setting(1.0, "Scale of --adjust noise, in root mean squares of a column.", above=0)
    rebuild: bool = setting(False, "Make item graphs anew from the changed features.", option=("--rebuild-graphs",))
    split: Literal["test", "valid"] = setting("test", "'test' or 'valid'.", choices=("test", "valid"))
    seed: int = setting(0, "Of the draws.", least=0, most=UINT32)

    def __post_init__(self) -> None:
        check_all(self, as_options=True)
        if len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"--adjust names {', '.join(self.kinds)}; name each once.")
        for option, numbers in (("--scales", self.scales), ("--shares", self.shares)):
            if not any(numbers):
                raise UserError(f"{option} changes nothing; give a number above 0.")
        if self.tables and self.at == "vectors":
            raise UserError("--tables names tables and --at vectors uses none; leave one of them out.")
        if self.rebuild and not self.kinds and self.directory is None:
            raise UserError("--rebuild-graphs is for changed features, and none are asked for; add --adjust swap.")

    @property
    def adds_noise(self) -> bool:
        """Whether there is noise in the tables: where it is asked for, or nothing else is."""
        return self.noise or (not self.kinds and self.directory is None)
