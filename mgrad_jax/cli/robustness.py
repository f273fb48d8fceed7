"""`mgrad-jax robustness`: what is left of a trained model when its item tables or its features change at inference."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mgrad_jax.cli import stopping
from mgrad_jax.cli.cache import use_compilation_cache
from mgrad_jax.cli.common import FinishedRuns, MovedData, NewDirectory
from mgrad_jax.cli.compare import names, print_tables
from mgrad_jax.cli.console import run_progress
from mgrad_jax.errors import UserError

if TYPE_CHECKING:
    from mgrad_jax.analysis.robustness_run import Change
    from mgrad_jax.data import Interactions

NOISE_DRAWS, ADJUSTMENT_DRAWS = 20, 10
_KINDS = ("swap", "mix", "noise", "mean")


def robustness(
    runs: FinishedRuns,
    out: NewDirectory,
    data: MovedData = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Gaussian noise in the learned item tables; what is done by default.")
    ] = False,
    adjust: Annotated[
        str | None,
        typer.Option(metavar="KIND,...", help="Other features of some items: swap, mix, noise, mean."),
    ] = None,
    adjusted_features: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Your own other features: image_feat.npy or text_feat.npy of the same shape."),
    ] = None,
    scales: Annotated[str, typer.Option(metavar="S,...", help="Scales of the noise.")] = "0,0.25,0.5,1,2,3,5,10",
    shares: Annotated[
        str, typer.Option(metavar="Q,...", help="Shares of the items that are changed.")
    ] = "0,0.01,0.05,0.1,0.25,0.5,1",
    draws: Annotated[
        int | None, typer.Option(help="Draws of the noise, or of the items; 20 and 10 by default.")
    ] = None,
    scale_per: Annotated[
        str, typer.Option(help="Unit of a scale: the root mean square of the 'table', of each 'row', or 'none'.")
    ] = "table",
    at: Annotated[str, typer.Option(help="Noise in the 'table', or in the scored item 'vectors'.")] = "table",
    tables: Annotated[
        str | None,
        typer.Option(metavar="PATH,...", help="Which learned tables get noise, if not the model's own choice."),
    ] = None,
    modality: Annotated[str, typer.Option(help="Whose features change: image, text or both.")] = "both",
    mix: Annotated[float, typer.Option(help="Share of the other item's features in --adjust mix.")] = 0.5,
    feature_noise: Annotated[
        float, typer.Option(help="Scale of --adjust noise, in root mean squares of a column.")
    ] = 1.0,
    rebuild_graphs: Annotated[
        bool, typer.Option("--rebuild-graphs", help="Make item graphs anew from the changed features.")
    ] = False,
    metrics: Annotated[str, typer.Option(metavar="NAME,...", help="What is measured.")] = "recall@5,recall@20,ndcg@20",
    split: Annotated[str, typer.Option(help="'test' or 'valid'.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Change trained models at inference and tell what is lost, with bands over users, draws and seeds."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    options = _Options(
        noise=noise or (adjust is None and adjusted_features is None),
        kinds=() if adjust is None else names("--adjust", adjust),
        directory=adjusted_features,
        scales=_numbers("--scales", scales, math.inf),
        shares=_numbers("--shares", shares, 1.0),
        draws=draws,
        per=scale_per,
        at=at,
        tables=() if tables is None else names("--tables", tables),
        modality=modality,
        mix=mix,
        feature_noise=feature_noise,
        rebuild=rebuild_graphs,
        split=split,  # type: ignore[arg-type]  # checked by the options themselves
        seed=seed,
    )
    asked = names("--metrics", metrics)
    use_compilation_cache()
    from mgrad_jax.analysis.robustness_report import write_robustness
    from mgrad_jax.analysis.robustness_run import check_metric_names, measure_runs
    from mgrad_jax.analysis.runs import group_runs

    check_metric_names(asked)
    groups = group_runs(runs)
    interactions = _data_of(groups, data)
    changes = options.changes(interactions)
    with run_progress("robustness", groups) as show:
        experiments = measure_runs(groups, changes, asked, options.split, seed=seed, data=data, progress=show)
    settings = {"settings": {**asdict(options), "metrics": asked}, "runs": groups}
    stopping.complete_what_is_begun()
    report = write_robustness(out, experiments, asked, options.split, interactions, settings)
    print_tables(report.summary, *([report.differences] if report.differences.rows else []))
    print(f"Tables, draws and pictures: {out}")


@dataclass(frozen=True)
class _Options:
    """What is changed and how, checked before anything is loaded."""

    noise: bool
    kinds: tuple[str, ...]
    directory: Path | None
    scales: tuple[float, ...]
    shares: tuple[float, ...]
    draws: int | None
    per: str
    at: str
    tables: tuple[str, ...]
    modality: str
    mix: float
    feature_noise: float
    rebuild: bool
    split: Literal["test", "valid"]
    seed: int

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in _KINDS:
                raise UserError(f"--adjust has no kind '{kind}'; choose among {', '.join(_KINDS)}.")
            if self.kinds.count(kind) > 1:
                raise UserError(f"--adjust names {kind} twice; name each once.")
        for option, value, known in (
            ("--scale-per", self.per, ("table", "row", "none")),
            ("--at", self.at, ("table", "vectors")),
            ("--modality", self.modality, ("both", "image", "text")),
            ("--split", self.split, ("test", "valid")),
        ):
            if value not in known:
                raise UserError(f"{option} is '{value}'; choose one of {', '.join(known)}.")
        if self.tables and self.at == "vectors":
            raise UserError("--tables names tables and --at vectors uses none; leave one of them out.")
        if not 0 <= self.mix <= 1:
            raise UserError(f"--mix is {self.mix}; it must be between 0 and 1.")
        if not 0 < self.feature_noise < math.inf:
            raise UserError(f"--feature-noise is {self.feature_noise}; it must be a positive number.")
        if self.draws is not None and self.draws < 1:
            raise UserError(f"--draws is {self.draws}; it must be at least 1.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; it must be at least 0 and below 2**32.")
        if self.rebuild and not self.kinds and self.directory is None:
            raise UserError("--rebuild-graphs is for changed features, and none are asked for; add --adjust swap.")

    def changes(self, data: Interactions) -> list[Change]:
        """The changes asked for; the user's own features are read here."""
        from mgrad_jax.analysis import robustness_run as run
        from mgrad_jax.analysis.perturb import FeatureChange

        found = []
        if self.noise:
            draws = self.draws or NOISE_DRAWS
            found.append(run.noise_change(self.scales, draws, per=self.per, at=self.at, tables=self.tables))
        modalities, draws = run.modalities_of(self.modality), self.draws or ADJUSTMENT_DRAWS
        for kind in self.kinds:
            change = FeatureChange(kind, modalities, self.mix, self.feature_noise)
            found.append(run.feature_change(change, self.shares, draws, rebuild=self.rebuild))
        if self.directory is not None:
            other = run.other_features(self.directory, data, modalities)
            change = FeatureChange("given", tuple(other))
            found.append(run.feature_change(change, self.shares, draws, other=other, rebuild=self.rebuild))
        return found


def _numbers(option: str, text: str, most: float) -> tuple[float, ...]:
    """The numbers in a list with commas, from 0 to `most`; one beside 0 at least."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text} is no list of numbers; write for example {option} 0,0.5,1.") from None
    for number in found:
        if not (math.isfinite(number) and 0 <= number <= most):
            bound = "be finite and not negative" if most == math.inf else f"lie between 0 and {most:g}"
            raise UserError(f"{option} holds {number:g}; every number must {bound}.")
    if not any(found):
        raise UserError(f"{option} {text} changes nothing; give a number above 0.")
    return found


def _data_of(groups: dict[str, dict[str, dict[int, Path]]], data: str | None) -> Interactions:
    """The dataset of the runs, which is one."""
    from mgrad_jax.training.run import load_run

    trainings = next(iter(groups.values()))
    return load_run(next(iter(next(iter(trainings.values())).values())), data).data
