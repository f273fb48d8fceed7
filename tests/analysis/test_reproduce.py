"""`mgrad-jax reproduce`: the paper's values, the steps of every preset, both side by side, stopping and resuming."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from mgrad_jax.analysis.figures import png
from mgrad_jax.analysis.figures_reproduce import alpha_maps
from mgrad_jax.analysis.presets import ALPHAS, OPTIMIZERS, PRESETS, Asked, Call, Training, find_preset
from mgrad_jax.analysis.reproduce import Ours, Published, alpha_grid, beside, collect
from mgrad_jax.analysis.statistics import Spread
from mgrad_jax.cli import main
from mgrad_jax.cli import reproduce as command
from mgrad_jax.errors import UserError

SMALL = ["--data", "demo", "--models", "vbpr", "--seeds", "2", "--epochs", "2", "--set", "embedding_dim=8"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def asked(out: Path, models: tuple[str, ...] = ("vbpr",), **changes: Any) -> Asked:
    return Asked("demo", out, models, (999,), {"epochs": 2}, {"embedding_dim": 8}, **changes)


# --- the paper's values -----------------------------------------------------------------------------------------------


def improvement(name: str, data: str, model: str, metric: str, setting: str = "", method: str = "mirror") -> float:
    published = Published.read()
    value, plain = (published.values[name, data, model, m, setting, metric] for m in (method, "plain"))
    return round(100 * (value[0] / plain[0] - 1), 2)


def test_the_papers_values_give_the_improvements_that_it_prints() -> None:
    assert improvement("table2", "electronics", "vbpr", "recall@5") == 11.54
    assert improvement("table2", "electronics", "freedom", "ndcg@5") == 2.92
    assert improvement("table3", "baby", "mmgcn", "precision@5") == 13.21
    assert improvement("table3", "sports", "slmrec", "map@5") == 3.86
    assert improvement("table3", "clothing", "vbpr", "map@5") == 25.24
    assert improvement("table3", "clothing", "dragon", "ndcg@5") == 7.41
    assert improvement("table6", "baby", "grcn", "map@5", "sgd") == 20.0
    assert improvement("table6", "baby", "dragon", "ndcg@5", "adagrad") == 1.89
    values = Published.read().values
    assert values["table4", "baby", "bm3", "mirror", "noise", "recall@5"] == (0.0314,)
    assert values["table5", "baby", "grcn", "plain", "adjustment", "recall@5"] == (0.0321,)
    assert values["table7", "baby", "dragon", "ssam-f", "", "ndcg@5"] == (0.0267,)
    assert values["table8", "pinterest", "vbpr", "mirror", "AMR", "candidates_hr@5"] == (0.1457,)
    assert values["table9", "clothing", "selfcf", "mirror", "", "recall@5"] == (0.0284,)
    assert values["table10", "baby", "dragon", "mirror", "every 7", "ndcg@5"] == (0.0274,)
    assert values["lemma", "baby", "bm3", "plain", "", "constant"] == (96.16,)


def test_seeds_of_one_setting_are_one_value_with_a_spread() -> None:
    published = Published.read()
    found = published.find("table11", "baby", Ours("bm3", "plain", "", "recall@5", None))
    assert isinstance(found, Spread)
    assert found.n == 10
    assert found.mean == pytest.approx(np.mean([327, 329, 329, 329, 323, 323, 322, 322, 321, 321]) / 1e4)
    assert published.find("table12", "baby", Ours("freedom", "mirror", "", "recall@5", None)) == 0.0397


def test_every_published_value_belongs_to_a_preset() -> None:
    for name, data, model, _, setting, metric in Published.read().values:
        preset = PRESETS[name]
        assert data in preset.data
        assert model in preset.models
        assert not setting.startswith("seed")
        assert metric.partition("@")[2] == "5" or metric == "constant"


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(name: str, one: Asked) -> list[Training | Call]:
    return list(PRESETS[name].steps(one))


def trained(step: Training | Call) -> tuple[Any, ...]:
    assert isinstance(step, Training)
    study = step.study
    return study.methods, study.optimizers, study.intervals, dict(study.tune)


THREE = ("plain", "replay", "mirror")


def test_presets_train_what_the_paper_compares(tmp_path: Path) -> None:
    one = asked(tmp_path)
    untuned, tuned = steps("table3", one)
    assert trained(untuned) == (THREE, ("adam",), (3,), {})
    assert trained(tuned) == (THREE, ("adam",), (3,), {"alpha2": (0.1, 0.2, 0.3)})
    assert untuned.study.directory == tuned.study.directory  # type: ignore[union-attr]
    assert trained(steps("table7", one)[0])[0] == (*THREE, "sam", "ssam-f", "ssam-d")
    assert trained(steps("table7", one)[0])[2] == (3, 1)
    assert trained(steps("table10", one)[0])[2] == (1, 3, 5, 7)
    assert [len(PRESETS[name].seeds) for name in ("table3", "table11", "table12", "fig5")] == [5, 10, 10, 1]
    for name in ("table9", "table11", "table12", "fig4"):
        assert trained(steps(name, one)[0]) == (THREE, ("adam",), (3,), {})


def test_analyses_read_the_runs_of_the_study_before_them(tmp_path: Path) -> None:
    one = asked(tmp_path)
    for name, words in (
        ("table4", ("robustness", "--noise")),
        ("table5", ("robustness", "--adjust")),
        ("fig3", ("landscape", "--points")),
        ("lemma", ("theory", "--inputs")),
    ):
        study, call = steps(name, one)
        assert isinstance(study, Training)
        assert isinstance(call, Call)
        assert call.words[0] == words[0]
        assert words[1] in call.words
        assert call.words[1] == str(study.study.directory)
    fig3, _ = steps("fig3", one)
    assert fig3.study.settings["keep_every"] == 5  # type: ignore[union-attr]
    (theorem,) = steps("theorem", one)
    assert theorem.words[:5] == ("theory", "--model", "vbpr", "--data", "demo")  # type: ignore[union-attr]


def test_figure_5_is_a_sweep_of_36_cells_at_two_intervals_and_one_of_replay(tmp_path: Path) -> None:
    mirror, replay = steps("fig5", asked(tmp_path))
    assert isinstance(mirror, Call)
    assert isinstance(replay, Call)
    assert (mirror.sweeps, replay.sweeps) == (("vbpr", 72), ("vbpr", 2))
    assert "alpha1=0.1,0.3,0.5,0.7,0.9,1.1" in mirror.words
    assert "alpha2=0.1,0.3,0.5,0.7,0.9,1.1" in mirror.words
    assert "interval=3,1" in mirror.words
    assert list(mirror.words[-2:]) == ["--set", "embedding_dim=8"]


def test_table_6_repeats_at_the_rate_that_is_best_on_validation_for_plain_training(tmp_path: Path) -> None:
    one = asked(tmp_path)
    sweep = tmp_path / "rates-vbpr"
    sweep.mkdir()
    rates = {"adam": 0.001, "sgd": 0.1, "rmsprop": 0.0001, "adagrad": 0.01}
    best = [{"optimizer": o, "learning_rate": r} for o, r in rates.items()]
    pd.DataFrame([*best, *({**row, "learning_rate": 1.0} for row in best)]).to_csv(sweep / "summary.csv")
    (sweep / "best.json").write_text("{}")
    published, call, *chosen = steps("table6", one)
    assert trained(published)[1] == OPTIMIZERS
    assert isinstance(call, Call)
    assert call.sweeps == ("vbpr", 16)
    found = {step.study.optimizers: step.study.settings["learning_rate"] for step in chosen}  # type: ignore[union-attr]
    assert found == {("sgd",): 0.1, ("rmsprop",): 0.0001, ("adagrad",): 0.01}  # adam's 1e-3 is there already


def test_table_8_starts_amr_from_vbpr_and_needs_candidates(tmp_path: Path) -> None:
    one = Asked(str(tmp_path), tmp_path / "out", ("vbpr",), (999,))
    with pytest.raises(UserError, match=r"candidates.npy does not exist, and Table 8 ranks among candidates; .* --amr"):
        steps("table8", one)
    np.save(tmp_path / "candidates.npy", np.zeros((1, 2)))
    vbpr, amr = (step.study for step in steps("table8", one))  # type: ignore[union-attr]
    assert (vbpr.start_from, amr.start_from) == (None, str(vbpr.directory))
    assert amr.settings["adversarial"] == {"epsilon": 0.1, "weight": 1.0}
    assert vbpr.candidates == amr.candidates == str(tmp_path / "candidates.npy")
    starts = {c.training: c.start_from for c in amr.configs().values()}
    assert set(starts.values()) == {str(vbpr.directory / "runs" / "vbpr-plain-adagrad-s999")}


# --- side by side -----------------------------------------------------------------------------------------------------


def test_the_papers_values_stand_beside_ours_where_there_are_any() -> None:
    numbers = [
        Ours("vbpr", "plain", "", "recall@5", Spread(0.02, 0.001, 5)),
        Ours("vbpr", "replay", "", "recall@5", Spread(0.021, 0.001, 5), plain=0.05),
        Ours("vbpr", "mirror", "", "recall@5", Spread(0.022, 0.001, 5), plain=0.1, replay=0.0476),
        Ours("vbpr", "mirror", "untuned", "recall@5", Spread(0.02, None, 1), plain=0.0),
    ]
    table = beside("table3", PRESETS["table3"], {"Sports": numbers})
    rows = [row[5:11] for row in table.rows]
    assert rows[0] == ("sports", 0.0353, None, numbers[0].value, None, None)
    assert rows[1] == ("", None, None, numbers[1].value, 0.05, None)
    assert rows[2] == ("sports", 0.0375, pytest.approx(0.0375 / 0.0353 - 1), numbers[2].value, 0.1, 0.0476)
    assert rows[3][:3] == ("", None, None)
    assert "compare the changes" not in table.caption
    other = beside("table3", PRESETS["table3"], {"demo": numbers})
    assert other.rows[0][5:7] == ("baby", 0.0265)
    assert "other data than demo: compare the changes, not the levels" in other.caption


def test_changes_at_inference_are_told_relative_to_the_unchanged_model() -> None:
    ours = Ours("bm3", "plain", "noise, 3", "recall@5", 0.02, before=-0.2, paper="noise")
    (row,) = beside("table4", PRESETS["table4"], {"baby": [ours]}).rows
    assert row[6:10] == (0.0272, pytest.approx(0.0272 / 0.0327 - 1), 0.02, -0.2)  # -16.8%; the paper prints 16.92%


def sweep_results(one: Asked) -> None:
    """Sweeps made up: recall alpha1 - alpha2 above replay's 0.5, the first cell diverged."""
    cells = [(a, b, i) for a in ALPHAS for b in ALPHAS for i in (3, 1)]
    frame = pd.DataFrame(cells, columns=["alpha1", "alpha2", "interval"])
    frame["seeds"], frame["diverged"] = 1, [1, *[0] * (len(cells) - 1)]
    frame["test_recall@5_mean"] = 0.5 + frame["alpha1"] - frame["alpha2"]
    frame["valid_recall@5_mean"], frame["test_recall@5_std"] = 0.5, np.nan
    for name, content in (("mirror", frame), ("replay", pd.DataFrame({"interval": [3, 1], "test_recall@5_mean": 0.5}))):
        place = one.out / f"{name}-vbpr"
        place.mkdir()
        content.sample(frac=1, random_state=0).to_csv(place / "summary.csv", index=False)


def test_figure_5_holds_every_cell_against_replay_and_knows_the_diverged_ones(tmp_path: Path) -> None:
    one = asked(tmp_path)
    sweep_results(one)
    table = alpha_grid(one, "vbpr")
    assert len(table) == 72
    kept = table[table["diverged"] == 0]
    np.testing.assert_allclose(kept["difference"], kept["alpha1"] - kept["alpha2"], atol=1e-12)
    assert table[["test", "valid", "difference"]].isna().all(axis=1).sum() == 1
    ours = collect("fig5", one)
    assert [number.value for number in ours if "diverged" in number.setting] == [None]
    figure = alpha_maps(table, "vbpr on demo", ALPHAS)
    maps = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title()[:7] for axes in maps] == ["every 3", "every 3", "every 1", "every 1"]
    hatched = [sum(patch.get_hatch() is not None for patch in axes.patches) for axes in maps]
    assert hatched == [1, 1, 0, 0]
    assert all(any(line.get_linestyle() == "--" for line in axes.lines) for axes in maps)
    assert png(figure).startswith(b"\x89PNG")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_preset_is_trained_once_and_gone_on_with(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table9"
    shutil.copytree(study / "runs", out / "demo" / "study" / "runs")  # so that nothing has to be trained
    shutil.copy(study / "study.yaml", out / "demo" / "study")
    options = [*SMALL, "--out", str(out)]
    monkeypatch.setattr(Asked, "study", with_batches(Asked.study))
    assert main(["reproduce", "table9", *options]) == 0
    printed = capfd.readouterr().out
    assert "epoch" not in printed.partition("table9:")[0].partition("Tables")[0]  # no run was trained
    rows = read(out / "table.csv")
    assert {row["method"] for row in rows} == {"plain", "replay", "mirror"}
    assert [row["metric"] for row in rows[:4]] == ["recall@5", "precision@5", "map@5", "ndcg@5"]
    means = {row["method"]: float(row["recall@5"]) for row in read(out / "demo" / "study" / "table.csv")[3:]}
    for row in rows[::4]:
        assert float(row["ours"]) == means[row["method"]]
        if row["method"] == "mirror":
            assert float(row["ours_change"]) == pytest.approx(means["mirror"] / means["plain"] - 1)
            assert float(row["ours_against_replay"]) == pytest.approx(means["mirror"] / means["replay"] - 1)
    content = json.loads((out / "result.json").read_text())
    assert len(content["table"]) == len(rows)
    assert (content["name"], content["settings"]["demo"]["seeds"]) == ("table9", [999, 1000])
    assert yaml.safe_load((out / "reproduce.yaml").read_text())["models"] == ["vbpr"]
    before = (out / "table.csv").read_bytes()
    assert main(["reproduce", "table9", *options]) == 2
    assert "already holds results; add --resume" in capfd.readouterr().err
    assert main(["reproduce", "table9", *options, "--resume"]) == 0
    assert (out / "table.csv").read_bytes() == before
    assert main(["reproduce", "table11", *options, "--resume"]) == 2
    assert "holds table9, not table11" in capfd.readouterr().err


def with_batches(original: Any) -> Any:
    """Studies with the batch size of the shared study."""

    def study(self: Asked, name: str = "study", settings: Any = None, **changes: Any) -> Any:
        return original(self, name, {**(settings or {}), "batch_size": 7200}, **changes)

    return study


def test_an_analysis_is_done_anew_only_where_runs_or_options_changed(tmp_path: Path) -> None:
    one = asked(tmp_path)
    study = one.study()
    result = next(iter(study.configs().values())).directory / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("1")
    done: list[list[str]] = []

    def run(words: Sequence[str]) -> None:
        done.append(list(words))
        out = Path(words[words.index("--out") + 1])
        assert not out.exists()
        out.mkdir()
        (out / "result.json").write_text("{}")

    call = Call(("robustness", "x"), tmp_path / "noise", study)
    command._call(call, one, run)
    command._call(call, one, run)
    assert len(done) == 1
    result.write_text("2")
    command._call(call, one, run)
    command._call(Call(("robustness", "y"), tmp_path / "noise", study), one, run)
    assert len(done) == 3
    (tmp_path / "noise" / "result.json").unlink()  # stopped half way
    command._call(Call(("robustness", "y"), tmp_path / "noise", study), one, run)
    assert len(done) == 4


@pytest.mark.slow
def test_a_dry_run_lists_steps_runs_and_times_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "table3", *SMALL, "--out", str(out), "--dry-run"]) == 0
    printed = capfd.readouterr().out
    assert not out.exists()
    runs = [line for line in printed.splitlines() if line.startswith(str(out))]
    assert len(runs) == len(set(runs)) == 6 + 8  # those of the untuned study are not counted again
    assert "at least" in printed
    assert "train and compare" in printed


def test_without_a_name_the_presets_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    printed = capfd.readouterr().out
    assert all(name in printed for name in PRESETS)
    assert list(PRESETS) == [*(f"table{n}" for n in range(2, 13)), "fig3", "fig4", "fig5", "theorem", "lemma"]
    with pytest.raises(UserError, match=r"there is no preset 'tabel3'; choose one of table2, .*did you mean table3"):
        find_preset("tabel3")


BAD: dict[str, tuple[list[str], str]] = {
    "unknown name": (["table1", "--data", "demo"], "there is no preset 'table1'; choose one of table2, table3"),
    "no data": (["table9"], "--data is missing; the paper's table9 is of baby and clothing"),
    "one name twice": (["table9", "--data", "demo", "--data", "x/demo"], "--data names two datasets called demo"),
    "unknown model": (["table9", "--data", "demo", "--models", "vpbr"], "unknown model 'vpbr'"),
    "nothing to resume": (["table9", "--data", "demo", "--resume"], "holds nothing to resume"),
    "no candidates": (["table8", "--data", "demo"], "demo/candidates.npy does not exist, and Table 8 ranks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_option(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, part = BAD[case]
    assert main(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert part in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["name: [", "- a list\n", ""])
def test_what_was_asked_is_damaged(content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "reproduce.yaml").write_text(content)
    assert main(["reproduce", "table9", "--data", "demo", "--resume", "--out", str(out)]) == 2
    error = capfd.readouterr().err
    assert f"{out / 'reproduce.yaml'} is damaged" in error
    assert error.count("\n") == 1
    assert [file.name for file in out.iterdir()] == ["reproduce.yaml"]
