"""The paper's tables and figures as presets: which runs each needs, and which analyses of them.

A preset gives steps, one after the other: studies that are trained (`mgrad_jax.analysis.study`), and calls of other
commands. Some steps follow from what earlier ones found on disk, so they come from a generator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mgrad_jax.analysis.settings import NOISE_DRAWS, RobustnessSettings
from mgrad_jax.analysis.study_plan import Study, hyper_parameter_names
from mgrad_jax.declaration import check_choice
from mgrad_jax.errors import UserError

METRICS = ("recall@5", "precision@5", "map@5", "ndcg@5")
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
OPTIMIZERS = ("adam", "sgd", "rmsprop", "adagrad")
NOISE_SCALES = RobustnessSettings.scales
SHARES, SHARE_DRAWS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1), 10
_FIVE = tuple(range(999, 1004))
_TEN = tuple(range(999, 1009))


@dataclass(frozen=True)
class Training:
    """A study to be trained and reported; `copy` is where its tables are also kept, before a later step extends it."""

    study: Study
    metrics: tuple[str, ...] = METRICS
    copy: Path | None = None


@dataclass(frozen=True)
class Call:
    """Another command.

    Attributes:
        words: of the command line, `--out` left out.
        out: its directory.
        reads: the study whose runs it reads; None where it reads data.
        sweeps: how many members it trains, of which model; a sweep goes on with what is there.
        measures: how many evaluations of a run, or losses of one, it makes; for the estimate of the time.
    """

    words: tuple[str, ...]
    out: Path
    reads: Study | None = None
    sweeps: tuple[str, int] | None = None
    measures: int = 0


Step = Training | Call


@dataclass(frozen=True)
class Asked:
    """What of a preset is wanted.

    Attributes:
        data: a dataset.
        out: the directory of its results.
        models, seeds: of the runs.
        settings, hyper_parameters: as of a `Study`, the same in all runs.
        dry: nothing is trained, so that what would be chosen is not known.
    """

    data: str
    out: Path
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    dry: bool = False

    def study(self, name: str = "study", settings: Mapping[str, Any] | None = None, **changes: Any) -> Study:
        """A study of these models, plain, replay and mirror unless said otherwise."""
        values: dict[str, Any] = {
            "data": self.data,
            "models": self.models,
            "out": str(self.out / name),
            "seeds": self.seeds,
            "hyper_parameters": dict(self.hyper_parameters),
        }
        return Study(**{**values, "settings": {**(settings or {}), **self.settings}, **changes})

    def sweep(self, name: str, model: str, method: str, grid: Mapping[str, Sequence[Any]]) -> Call:
        """A sweep of one model."""
        axes = {**grid, "seed": self.seeds}
        words = ["sweep", "--model", model, "--data", self.data, "--method", method]
        for axis, values in axes.items():
            words += ["--grid", f"{axis}={','.join(map(str, values))}"]
        for setting, value in self.settings.items():
            words += [f"--{setting.replace('_', '-')}", str(value)]
        members = math.prod(len(values) for values in axes.values())
        return Call((*words, *self.hyper_words(model)), self.out / name, sweeps=(model, members))

    def hyper_words(self, model: str) -> list[str]:
        """The hyper-parameters of one model on a command line."""
        words = []
        for key, value in self.hyper_parameters.items():
            owner, _, hyper = key.rpartition(".")
            if owner == model or (not owner and hyper in hyper_parameter_names(model)):
                words += ["--set", f"{hyper}={value}"]
        return words


@dataclass(frozen=True)
class Preset:
    """A table, figure or statement of the paper.

    Attributes:
        question: what it is about.
        data: the paper's datasets, in small letters; the first is what other data are held against.
        models, seeds: what is trained unless said otherwise.
        steps: makes the steps.
        note: what to know about the result.
        form: of the numbers.
    """

    question: str
    data: tuple[str, ...]
    models: tuple[str, ...]
    steps: Callable[[Asked], Iterator[Step]]
    seeds: tuple[int, ...] = _FIVE
    note: str = ""
    form: str = ".4f"


def _tuned(asked: Asked) -> Iterator[Step]:
    yield Training(asked.study(), copy=asked.out / "untuned")
    yield Training(asked.study(tune={"alpha2": (0.1, 0.2, 0.3)}))


def _plain_study(asked: Asked) -> Iterator[Step]:
    yield Training(asked.study())


def _noise(asked: Asked) -> Iterator[Step]:
    study = asked.study()
    yield Training(study)
    scales, draws = ",".join(f"{s:g}" for s in NOISE_SCALES), str(NOISE_DRAWS)
    words = ("robustness", str(study.directory), "--noise", "--scales", scales, "--draws", draws)
    yield Call(words, asked.out / "noise", study, measures=len(NOISE_SCALES) * NOISE_DRAWS)


def _adjustment(asked: Asked) -> Iterator[Step]:
    study = asked.study()
    yield Training(study)
    shares, draws = ",".join(f"{s:g}" for s in SHARES), str(SHARE_DRAWS)
    words = ("robustness", str(study.directory), "--adjust", "swap", "--shares", shares, "--draws", draws)
    yield Call(words, asked.out / "adjustment", study, measures=len(SHARES) * SHARE_DRAWS)


def _optimizers(asked: Asked) -> Iterator[Step]:
    yield Training(asked.study(optimizers=OPTIMIZERS))
    for model in asked.models:
        rates = asked.sweep(f"rates-{model}", model, "plain", {"optimizer": OPTIMIZERS, "learning_rate": RATES})
        yield rates
        for optimizer in OPTIMIZERS:
            rate = chosen_rate(rates.out, optimizer)
            if rate is not None and rate == asked.settings.get("learning_rate", 1e-3):
                continue  # these runs are there already
            # In a dry run it is not known yet; the time is the same.
            settings = {**asked.settings, "learning_rate": rate or 1e-3}
            chosen = dataclasses.replace(asked, models=(model,), settings=settings)
            yield Training(chosen.study(f"chosen-{model}-{optimizer}", optimizers=(optimizer,)))


def chosen_rate(sweep: Path, optimizer: str) -> float | None:
    """The learning rate that is best on validation for plain training; None where the sweep is not finished."""
    if not (sweep / "best.json").exists():
        return None
    summary = pd.read_csv(sweep / "summary.csv")  # the best first
    rates = summary.loc[summary["optimizer"] == optimizer, "learning_rate"]
    return float(rates.iloc[0])


def _flat_minima(asked: Asked) -> Iterator[Step]:
    methods = ("plain", "replay", "mirror", "sam", "ssam-f", "ssam-d")
    yield Training(asked.study(methods=methods, intervals=(3, 1)))


def _adversarial(asked: Asked) -> Iterator[Step]:
    candidates = Path(asked.data) / "candidates.npy"
    if not candidates.exists():
        raise UserError(
            f"{candidates} does not exist, and Table 8 ranks among candidates; write the dataset with "
            "`mgrad-jax prepare SOURCE DESTINATION --amr`."
        )
    published = {"optimizers": ("adagrad",), "candidates": str(candidates)}
    settings = {"learning_rate": 0.01, "batch_size": 512}
    trained = asked.study("vbpr", settings, **published)
    yield Training(trained)
    amr = {**settings, "adversarial": {"epsilon": 0.1, "weight": 1.0}}
    yield Training(asked.study("amr", amr, start_from=str(trained.directory), **published))


def _intervals(asked: Asked) -> Iterator[Step]:
    yield Training(asked.study(intervals=(1, 3, 5, 7)))


def _landscape(asked: Asked) -> Iterator[Step]:
    study = asked.study(settings={"keep_every": 5})
    yield Training(study)
    words = ("landscape", str(study.directory), "--points", "20", "--directions", "raw")
    yield Call(words, asked.out / "landscape", study, measures=400)


def _alphas(asked: Asked) -> Iterator[Step]:
    for model in asked.models:
        grid = {"alpha1": ALPHAS, "alpha2": ALPHAS, "interval": (3, 1)}
        yield asked.sweep(f"mirror-{model}", model, "mirror", grid)
        yield asked.sweep(f"replay-{model}", model, "replay", {"interval": (3, 1)})


def _theorem(asked: Asked) -> Iterator[Step]:
    for model in asked.models:
        words = ["theory", "--model", model, "--data", asked.data, "--seed", str(asked.seeds[0])]
        words += ["--epochs", str(asked.settings["epochs"])] if "epochs" in asked.settings else []
        yield Call((*words, *asked.hyper_words(model)), asked.out / f"theory-{model}", measures=100)


def _lemma(asked: Asked) -> Iterator[Step]:
    study = asked.study(settings={"keep_every": 5})
    yield Training(study)
    yield Call(("theory", str(study.directory), "--inputs"), asked.out / "inputs", study, measures=10)


_AMAZON = ("baby", "sports", "clothing")
_ALL = ("vbpr", "mmgcn", "grcn", "dualgnn", "slmrec", "bm3", "freedom", "dragon")
_UNTUNED = "Without a setting: alpha2 chosen on validation among 0.1, 0.2 and 0.3; untuned: alpha2 0.2."
_ONE_RUN = "The paper's plain runs have ten seeds in the order of their recall, its run of MG one seed."

PRESETS: Mapping[str, Preset] = {
    "table2": Preset(
        "Does MG help on a large dataset?",
        ("electronics",),
        ("vbpr", "mmgcn", "grcn", "dualgnn", "bm3", "freedom"),
        _tuned,
        note=_UNTUNED,
    ),
    "table3": Preset("Does MG help eight models on three datasets?", _AMAZON, _ALL, _tuned, note=_UNTUNED),
    "table4": Preset(
        "Is a model more robust to noise in its item embeddings?",
        ("baby",),
        ("bm3", "freedom"),
        _noise,
        note="The paper does not tell the size of its noise. Ours: the smallest scale measured at which plain training "
        "has lost 5%, and 20%.",
    ),
    "table5": Preset(
        "Is a model more robust to adjusted features?",
        ("baby",),
        ("mmgcn", "grcn", "vbpr"),
        _adjustment,
        note="The paper put captions into the text with a chance of one percent; the captions were not published. "
        "Ours: features swapped between one percent, and ten percent, of the items.",
    ),
    "table6": Preset(
        "Does MG help under other optimizers?",
        ("baby",),
        ("grcn", "dragon"),
        _optimizers,
        note="The published rate is 1e-3 for all optimizers; chosen rate: the best of 1e-4, 1e-3, 1e-2 and 0.1 on "
        "validation for plain training, used for all methods.",
    ),
    "table7": Preset(
        "Is MG better than methods for flat minima?",
        ("baby",),
        ("dragon",),
        _flat_minima,
        note="replay every 3 batches costs what MG costs, every batch what the SAM family costs.",
    ),
    "table8": Preset(
        "Does MG help adversarial training?",
        ("pinterest",),
        ("vbpr",),
        _adversarial,
        note="The paper tells no cut-off; 5 is assumed. AMR starts from the plain run of the same seed. Metrics on "
        "sampled candidates are no full-ranking metrics.",
    ),
    "table9": Preset(
        "Does MG help models without features?", ("baby", "clothing"), ("layergcn", "selfcf"), _plain_study
    ),
    "table10": Preset("Does the interval matter?", ("baby",), ("dualgnn", "bm3", "dragon"), _intervals),
    "table11": Preset(
        "Is the gain more than the spread over seeds?", ("baby",), ("bm3",), _plain_study, _TEN, _ONE_RUN
    ),
    "table12": Preset(
        "Is the gain more than the spread over seeds?", ("baby",), ("freedom",), _plain_study, _TEN, _ONE_RUN
    ),
    "fig3": Preset(
        "Are minima flatter after MG?",
        ("baby",),
        ("bm3", "freedom"),
        _landscape,
        note="The paper shows a picture and prints no numbers; differences with bands and tests stand in "
        "landscape/table.md.",
        form=".4g",
    ),
    "fig4": Preset(
        "Does MG converge faster?",
        ("baby",),
        ("vbpr", "grcn", "bm3", "freedom"),
        _plain_study,
        note="The paper's text names neither the models nor numbers.",
        form=".4g",
    ),
    "fig5": Preset(
        "Which alpha1 and alpha2 are good?",
        ("baby",),
        ("bm3",),
        _alphas,
        (999,),
        note="The paper prints no numbers. Differences are to replay of the same interval and seeds.",
    ),
    "theorem": Preset(
        "Is a mirror batch a penalty on the gradient (Theorem 3.2)?",
        ("baby",),
        ("vbpr", "bm3", "freedom"),
        _theorem,
    ),
    "lemma": Preset(
        "Are inputs felt less after MG (Lemma 3.1, Eq. 8)?",
        ("baby",),
        ("vbpr", "bm3", "freedom"),
        _lemma,
        note="The paper's constant is of BM3, whose inputs are trained tables, as FREEDOM's are.",
        form=".4g",
    ),
}


def find_preset(name: str) -> Preset:
    """A preset by name; an unknown one is a `UserError` that lists the known."""
    check_choice("there is no preset", name, PRESETS)
    return PRESETS[name]
