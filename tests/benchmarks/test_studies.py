"""Tables of the documentation that are made of a study's files."""

from __future__ import annotations

from pathlib import Path

import pytest

TABLE = """model,method,recall@5,recall@5_sd,recall@20,recall@20_sd
popularity,no training,0.1,,0.2,
itemknn,no training,0.3,,0.1,
vbpr,plain,0.4,0.01,0.5,0.02
vbpr,mirror,0.44,0.03,0.5,0.04
"""
TESTS = """model,comparison,metric,relative,relative_low,relative_high,p_over_seeds,Holm_over_seeds
vbpr,mirror - plain,recall@20,0,0,0,1,1
vbpr,mirror - plain,recall@5,0.1,-0.05,0.25,0.04,0.6
vbpr,mirror - replay,recall@5,0.1,-0.05,0.25,0.4,1.0
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a study "s", which the tables are made of."""
    import _tables

    monkeypatch.setattr(_tables, "RESULTS", tmp_path)
    (tmp_path / "studies" / "s").mkdir(parents=True)
    return tmp_path / "studies" / "s"


def _cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_methods_stand_below_the_best_of_what_is_not_trained_with_what_holm_leaves_of_a_small_p(study: Path) -> None:
    import _studies

    (study / "table.csv").write_text(TABLE)
    (study / "tests.csv").write_text(TESTS)
    difference = "+10.0% [-5.0%, +25.0%]"
    assert _cells(_studies.compared("s")) == [
        ["itemknn", "no training", "0.3000", "0.1000", "", ""],
        ["vbpr", "plain", "0.4000 ± 0.0100", "0.5000 ± 0.0200", "", ""],
        ["vbpr", "mirror", "0.4400 ± 0.0300", "0.5000 ± 0.0400", f"{difference}, p = 0.04, Holm 0.6", difference],
    ]


def test_equal_updates_are_compared_by_the_last_epochs(study: Path) -> None:
    import _studies

    (study / "equal.csv").write_text(
        "model,method,epochs,recall@5_last,recall@5_last_sd\nvbpr,plain,9.0,0.2,0.01\nvbpr,mirror,6.0,0.1,0.02\nbm3,plain,1,1,1\n"
    )
    (study / "equal_tests.csv").write_text(
        "model,comparison,rule,metric,difference,p,Holm\n"
        "vbpr,mirror - plain,best,recall@5,9,0.5,1\nvbpr,mirror - plain,last,recall@5,-0.1,0.001,0.02\n"
    )
    assert _cells(_studies.equal("s", "vbpr")) == [
        ["plain", "9", "0.2000 ± 0.0100", "", ""],
        ["mirror", "6", "0.1000 ± 0.0200", "-0.1000, p = 0.001, Holm 0.02", ""],
    ]


def test_what_is_kept_under_a_change_is_told_for_every_model_and_comparison(study: Path) -> None:
    import _studies

    heading = 'model,change,comparison,metric,"area,_%_points","area,_%_points_low","area,_%_points_high",p,Holm'
    comparisons = {"mirror - plain": "1,0,2,0.01,0.5", "mirror - replay": "-1,-2,0,0.2,1", "replay - plain": "2,1,3,,"}
    rows = [f"vbpr,swap,{name},recall@5,{values}" for name, values in comparisons.items()]
    (study / "tests.csv").write_text("\n".join([heading, *rows]))
    expected = ["+1.0 [+0.0, +2.0], p = 0.01, Holm 0.5", "-1.0 [-2.0, +0.0]", "+2.0 [+1.0, +3.0]"]
    assert _cells(_studies.kept("s")) == [["vbpr, swap", *expected]]


def test_small_numbers_of_flatness_share_an_exponent_and_raw_ones_are_left_out(study: Path) -> None:
    import _studies

    (study / "table.csv").write_text(
        "at,number,scale,plain,plain_sd,mirror,mirror_sd\n"
        "best epoch,trace,scale-corrected,9,9,9,9\n"
        "equal loss,training loss,,0.25,0,0.25,0\n"
        "equal loss,trace,raw,5,5,5,5\n"
        "equal loss,trace,scale-corrected,0.00012,0.00001,0.00034,0.00002\n"
    )
    assert _cells(_studies.flatness("s", "equal loss", ["trace"])) == [
        ["training loss", "0.250 ± 0.000", "0.250 ± 0.000"],
        ["trace, 1e-4", "1.200 ± 0.100", "3.400 ± 0.200"],
    ]


def test_half_steps_are_those_under_way_and_of_the_ascending_ones_adams(study: Path) -> None:
    import _studies

    (study / "half-steps.csv").write_text(
        "model,optimizer,second_half-step,state,projection,cosine_with_-g,length\n"
        "vbpr,adam,own,zero,1,1,1\nvbpr,adam,own,running,0.5,0.25,1.5\n"
        "vbpr,adam,ascent,running,-0.2,-1,0.8\nvbpr,sgd,ascent,running,1,1,1\n"
    )
    assert _cells(_studies.half_steps("s")) == [
        ["vbpr, s", "adam", "+0.50", "+0.25", "1.50"],
        ["vbpr, s", "adam, mirror-ascent", "-0.20", "-1.00", "0.80"],
    ]
