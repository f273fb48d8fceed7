"""The paper's values beside ours, from what the steps of a preset have left on disk."""

from __future__ import annotations

import csv
import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mgrad_jax.analysis import figures, figures_reproduce
from mgrad_jax.analysis.presets import ALPHAS, METRICS, OPTIMIZERS, Asked, Preset
from mgrad_jax.analysis.report import Column, Table
from mgrad_jax.analysis.statistics import Spread, spread
from mgrad_jax.files import write_whole

CANDIDATES = ("candidates_hr@5", "candidates_ndcg@5")


class Ours(NamedTuple):
    """One number of ours.

    Attributes:
        model, method, setting, metric: what it is of; these find the paper's number.
        paper: the setting that the paper's number has, where it calls it otherwise.
        value: mean and standard deviation over seeds, or a single number.
        plain, replay: relative to what plain training and replay have; None where that is not there.
        before: relative to the unchanged model, where there is a change at inference.
    """

    model: str
    method: str
    setting: str
    metric: str
    value: Spread | float | None
    plain: float | None = None
    replay: float | None = None
    before: float | None = None
    paper: str | None = None


@dataclass(frozen=True)
class Published:
    """The numbers in the paper's text, by table, dataset, model, method, setting and metric."""

    values: Mapping[tuple[str, ...], tuple[float, ...]]

    @classmethod
    def read(cls) -> Published:
        """From the file in the package."""
        text = importlib.resources.files("mgrad_jax.analysis").joinpath("published.csv").read_text(encoding="utf-8")
        values: dict[tuple[str, ...], tuple[float, ...]] = {}
        for row in csv.DictReader(text.splitlines()):
            # Seeds of one setting stand one below the other.
            setting = "" if row["setting"].startswith("seed ") else row["setting"]
            key = (row["name"], row["data"], row["model"], row["method"], setting, row["metric"])
            if row["value"]:
                values[key] = (*values.get(key, ()), float(row["value"]))
        return cls(values)

    def find(
        self, name: str, data: str, ours: Ours, *, method: str | None = None, setting: str | None = None
    ) -> Spread | float | None:
        """What the paper has for a number of ours; of another method or setting where one is named."""
        its_own = ours.setting if ours.paper is None else ours.paper
        key = (name, data, ours.model, method or ours.method, its_own if setting is None else setting, ours.metric)
        found = self.values.get(key, ())
        return spread(found) if len(found) > 1 else next(iter(found), None)


def beside(name: str, preset: Preset, found: Mapping[str, list[Ours]]) -> Table:
    """One row per number of ours, and the paper's where its text has one.

    Args:
        name, preset: which table.
        found: our numbers by the dataset's name.
    """
    published = Published.read()
    heads = [
        Column("data"),
        Column("model"),
        Column("method"),
        Column("setting"),
        Column("metric"),
        Column("paper data"),
    ]
    heads += [
        Column("paper", preset.form),
        Column("paper change", "+.1%"),
        Column("ours", preset.form),
        Column("ours change", "+.1%"),
    ]
    heads += [Column("ours against replay", "+.1%"), Column("seeds")]
    rows = []
    for data, numbers in found.items():
        paper_data = data.lower() if data.lower() in preset.data else preset.data[0]
        for ours in numbers:
            paper = published.find(name, paper_data, ours)
            is_change = ours.before is not None
            of_base = {"setting": ""} if is_change else {"method": "plain"}
            base = published.find(name, paper_data, ours, **of_base)
            change = None if ours.method == "plain" and not is_change else _relative(paper, base)
            mine = ours.before if is_change else ours.plain
            value, seeds = ours.value, ours.value.n if isinstance(ours.value, Spread) else None
            place = (data, ours.model, ours.method, ours.setting, ours.metric, paper_data if paper is not None else "")
            rows.append((*place, paper, change, value, mine, ours.replay, seeds))
    others = sorted(data for data in found if data.lower() not in preset.data)
    caption = (
        f"{name}: {preset.question} The paper's values beside ours. Change: relative to plain training, or to the "
        "unchanged model where something is changed at inference. Ours: mean ± standard deviation over seeds; tests "
        "stand in the directories of the studies. A dash: the paper's text has no such number."
    )
    if others:
        caption += f" The paper's are of other data than {', '.join(others)}: compare the changes, not the levels."
    return Table(" ".join([caption, preset.note]).strip(), tuple(heads), tuple(rows))


def _mean(value: Spread | float | None) -> float | None:
    return value.mean if isinstance(value, Spread) else value


def _relative(value: Spread | float | None, base: Spread | float | None) -> float | None:
    ours, other = _mean(value), _mean(base)
    return None if ours is None or not other else ours / other - 1


def collect(name: str, asked: Asked) -> list[Ours]:
    """Our numbers of a preset whose steps are done."""
    return list(_COLLECTORS.get(name, _of_main_study)(asked))


def _read(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def _spread_of(record: Mapping[str, Any], metric: str) -> Spread | float | None:
    if record.get(metric) is None:
        return None
    return Spread(record[metric], record.get(f"{metric}_sd"), record["seeds"])


def of_study(
    result: Path, metrics: tuple[str, ...] = METRICS, setting: Callable[[Mapping[str, Any]], str] = lambda _: ""
) -> Iterator[Ours]:
    """The means of a study.

    Args:
        result: its `result.json`.
        metrics: which of them.
        setting: what distinguishes rows of the same model and method.
    """
    records = [row for row in _read(result)["means"] if row["seeds"] is not None]

    def reference(row: Mapping[str, Any], method: str) -> Mapping[str, Any] | None:
        same = [
            r for r in records if (r["model"], r["optimizer"], r["method"]) == (row["model"], row["optimizer"], method)
        ]
        near = [r for r in same if r["interval"] in (None, row["interval"])]
        return next(iter(near), None)

    for row in records:
        for metric in metrics:
            value = _spread_of(row, metric)
            changes = {}
            for method in ("plain", "replay"):
                other = reference(row, method) if row["method"] not in ("plain", method) else None
                changes[method] = None if other is None else _relative(value, _spread_of(other, metric))
            yield Ours(row["model"], row["method"], setting(row), metric, value, changes["plain"], changes["replay"])


def _of_main_study(asked: Asked) -> Iterator[Ours]:
    return of_study(asked.out / "study" / "result.json")


def _of_tuned(asked: Asked) -> Iterator[Ours]:
    yield from of_study(asked.out / "study" / "result.json")
    untuned = of_study(asked.out / "untuned" / "result.json", setting=lambda _: "untuned")
    yield from (ours for ours in untuned if ours.method != "plain")  # the same runs


def _of_intervals(asked: Asked) -> Iterator[Ours]:
    def setting(row: Mapping[str, Any]) -> str:
        return "" if row["interval"] is None else f"every {row['interval']}"

    return of_study(asked.out / "study" / "result.json", setting=setting)


def _of_flat_minima(asked: Asked) -> Iterator[Ours]:
    for ours in _of_intervals(asked):
        yield ours._replace(paper="") if ours.setting == "every 3" else ours


def _of_optimizers(asked: Asked) -> Iterator[Ours]:
    yield from of_study(asked.out / "study" / "result.json", setting=lambda row: row["optimizer"])
    for model in asked.models:
        for optimizer in OPTIMIZERS:
            result = asked.out / f"chosen-{model}-{optimizer}" / "result.json"
            if result.exists():
                rate = _read(result)["settings"]["settings"]["learning_rate"]
                yield from of_study(result, setting=partial(_at_rate, rate))


def _at_rate(rate: float, row: Mapping[str, Any]) -> str:
    return f"{row['optimizer']}, chosen rate {rate:g}"


def _of_adversarial(asked: Asked) -> Iterator[Ours]:
    yield from of_study(asked.out / "vbpr" / "result.json", CANDIDATES)
    yield from of_study(asked.out / "amr" / "result.json", CANDIDATES, lambda _: "AMR")


def _of_convergence(asked: Asked) -> Iterator[Ours]:
    wanted = ("evaluations_to_goal", "evaluations_to_common_loss", "evaluations_at_the_stop", "last_loss")
    records = _read(asked.out / "study" / "result.json")["convergence"]
    by_place = {(row["model"], row["method"]): row for row in records}
    for (model, method), row in by_place.items():
        for metric in wanted:
            value = _spread_of(row, metric)
            plain, replay = (
                _relative(value, _spread_of(by_place[model, other], metric))
                if method not in ("plain", other) and (model, other) in by_place
                else None
                for other in ("plain", "replay")
            )
            yield Ours(model, method, "", metric.replace("_", " "), value, plain, replay)


def _of_change(asked: Asked, directory: str, what: str, places: Mapping[str, list[float]]) -> Iterator[Ours]:
    """recall@5 before a change at inference, and what is left of it at some places, which are given by model."""
    yield from of_study(asked.out / "study" / "result.json", ("recall@5",))
    for row in _rows(asked.out / directory / "curves.csv"):
        place = float(row["place"])
        if row["metric"] == "recall@5" and place in places[row["model"]]:
            value, lost = float(row["value"]), float(row["lost"])
            setting = f"{what}, {place:g}"
            yield Ours(row["model"], row["method"], setting, "recall@5", value, before=-lost, paper=what)


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _of_noise(asked: Asked) -> Iterator[Ours]:
    places = {
        row["model"]: [float(row[f"{share}_lost_at"]) for share in ("5%", "20%") if row[f"{share}_lost_at"]]
        for row in _rows(asked.out / "noise" / "table.csv")
        if (row["method"], row["metric"]) == ("plain", "recall@5")
    }
    return _of_change(asked, "noise", "noise", places)


def _of_adjustment(asked: Asked) -> Iterator[Ours]:
    return _of_change(asked, "adjustment", "adjustment", {model: [0.01, 0.1] for model in asked.models})


def alpha_grid(asked: Asked, model: str) -> pd.DataFrame:
    """Every cell of Figure 5: test and validation recall@5, and the difference of the former to replay.

    Returns:
        One row per cell: alpha1, alpha2, interval, seeds, diverged, valid, test, test_sd, replay, difference. A cell
        counts as diverged where a seed of it did, and has no numbers then.
    """
    mirror, replay = (pd.read_csv(asked.out / f"{name}-{model}" / "summary.csv") for name in ("mirror", "replay"))
    control = replay.set_index("interval")["test_recall@5_mean"]
    table = mirror[["alpha1", "alpha2", "interval", "seeds", "diverged"]].copy()
    for column, source in (
        ("valid", "valid_recall@5_mean"),
        ("test", "test_recall@5_mean"),
        ("test_sd", "test_recall@5_std"),
    ):
        table[column] = mirror[source].where(mirror["diverged"] == 0)
    table["replay"] = table["interval"].map(control)
    table["difference"] = table["test"] - table["replay"]
    return table.sort_values(["interval", "alpha1", "alpha2"], kind="stable").reset_index(drop=True)


def _of_alphas(asked: Asked) -> Iterator[Ours]:
    for model in asked.models:
        table = alpha_grid(asked, model)
        for row in table.to_dict("records"):
            setting = f"every {row['interval']}, alpha1 {row['alpha1']:g}, alpha2 {row['alpha2']:g}"
            if row["diverged"]:
                yield Ours(model, "mirror", f"{setting}, diverged", "recall@5", None)
                continue
            sd = row["test_sd"] if row["test_sd"] == row["test_sd"] else None
            value = Spread(row["test"], sd, row["seeds"])
            yield Ours(model, "mirror", setting, "recall@5", value, replay=_relative(row["test"], row["replay"]))


def _of_landscape(asked: Asked) -> Iterator[Ours]:
    """Flatness in numbers; no relative changes, for a number may be near 0 or negative."""
    for row in _read(asked.out / "landscape" / "result.json")["summary"]:
        metric = row["number"] + (f", {row['scale']}" if row["scale"] else "")
        for method in (key for key in row if f"{key}_sd" in row and row[key] is not None):
            value = Spread(row[method], row[f"{method}_sd"], len(asked.seeds))
            yield Ours(row["model"], method, row["at"], metric, value)


def _of_theorem(asked: Asked) -> Iterator[Ours]:
    for model in asked.models:
        slope = _read(asked.out / f"theory-{model}" / "result.json")["residual"]["slope"][model]
        yield Ours(model, "mirror", "", "slope of the residual", slope)


def _of_lemma(asked: Asked) -> Iterator[Ours]:
    """Means over seeds of what `theory --inputs` found at the best epochs, and at equal loss where it could."""
    found = _read(asked.out / "inputs" / "result.json")
    yield from _inputs(found["inputs"], {"constant": "constant"}, "")
    at_equal_loss = found["equal_loss"]
    numbers = {"input_gradient": "|dL/dX|", "sensitivity": "sensitivity"}
    yield from _inputs(at_equal_loss or found["inputs"], numbers, "equal loss" if at_equal_loss else "best epoch")


def _inputs(records: list[dict[str, Any]], metrics: Mapping[str, str], place: str) -> Iterator[Ours]:
    for metric, name in metrics.items():
        values: dict[tuple[str, str, str], list[float]] = {}
        for row in records:
            if row[metric] is not None:
                values.setdefault((row["model"], row["method"], row["inputs"]), []).append(row[metric])
        means = {key: spread(numbers) for key, numbers in values.items()}
        for (model, method, table), mean in means.items():
            plain, replay = (
                _relative(mean, means.get((model, other, table))) if method not in ("plain", other) else None
                for other in ("plain", "replay")
            )
            setting = ", ".join(filter(None, (table, place)))
            yield Ours(model, method, setting, name, mean, plain, replay, paper="")


_COLLECTORS: Mapping[str, Callable[[Asked], Iterator[Ours]]] = {
    "table2": _of_tuned,
    "table3": _of_tuned,
    "table4": _of_noise,
    "table5": _of_adjustment,
    "table6": _of_optimizers,
    "table7": _of_flat_minima,
    "table8": _of_adversarial,
    "table10": _of_intervals,
    "fig3": _of_landscape,
    "fig4": _of_convergence,
    "fig5": _of_alphas,
    "theorem": _of_theorem,
    "lemma": _of_lemma,
}


def draw(name: str, asked: Asked) -> list[Path]:
    """Draw what no other command draws: the grid of Figure 5. Returns the files."""
    if name != "fig5":
        return []
    files = []
    for model in asked.models:
        table = alpha_grid(asked, model)
        files.append(asked.out / f"alphas-{model}.png")
        figure = figures_reproduce.alpha_maps(table, f"{model} on {Path(asked.data).name}", ALPHAS)
        write_whole(files[-1], figures.png(figure))
        write_whole(asked.out / f"alphas-{model}.csv", table.to_csv(index=False))
    return files
