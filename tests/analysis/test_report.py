"""Tables in the three formats: all digits for programs, rounded for people, the same bytes every time."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from mgrad_jax.analysis.report import (
    Column,
    Interval,
    Table,
    csv_records,
    provenance,
    to_csv,
    to_latex,
    to_markdown,
)
from mgrad_jax.analysis.statistics import Spread

TABLE = Table(
    "What & why, 95% band.",
    (Column("model_name"), Column("recall@5"), Column("rise", "+.1%"), Column("p over seeds", ".2g"), Column("note")),
    (
        ("a|b", Spread(1 / 3, 0.0123456, 5), Interval(0.1, -0.05, 0.25), 0.04321, ""),
        ('with, "quotes"', Spread(0.5, None, 1), None, None, "not tested: 1 seed"),
        ("popularity", 0.25, None, float("nan"), "5% & more_"),
    ),
)


def test_markdown_rounds_and_says_where_there_is_nothing() -> None:
    lines = to_markdown(TABLE).splitlines()
    assert lines[0] == TABLE.caption
    assert lines[2] == "| model_name | recall@5 | rise | p over seeds | note |"
    assert lines[4] == r"| a\|b | 0.3333 ± 0.0123 | +10.0% [-5.0%, +25.0%] | 0.043 |  |"
    assert lines[5].endswith("| 0.5000 | - | - | not tested: 1 seed |")


def test_csv_has_all_digits_and_a_column_a_number() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    assert list(rows[0]) == [
        "model_name", "recall@5", "recall@5_sd", "rise", "rise_low", "rise_high", "p_over_seeds", "note",
    ]  # fmt: skip
    assert float(rows[0]["recall@5"]) == 1 / 3
    assert (rows[0]["rise_low"], rows[0]["rise_high"]) == ("-0.05", "0.25")
    assert rows[1]["model_name"] == 'with, "quotes"'
    assert (rows[1]["recall@5_sd"], rows[1]["rise"], rows[2]["p_over_seeds"]) == ("", "", "")
    records = csv_records(TABLE)
    assert [list(record) for record in records] == [list(row) for row in rows]
    assert records[0]["recall@5"] == 1 / 3


def test_latex_has_as_many_cells_in_every_line_as_columns_and_nothing_unescaped() -> None:
    text = to_latex(TABLE)
    layout = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + len(TABLE.rows)
    for line in lines:
        assert len(re.findall(r"(?<!\\)&", line)) == len(layout) - 1 == len(TABLE.columns) - 1
        assert not re.search(r"(?<!\\)[%#_]", line)
        assert line.count("$") % 2 == 0
    assert text.count("{") == text.count("}")
    assert text.count(r"\begin") == text.count(r"\end") == 2
    assert r"What \& why, 95\% band." in text


def test_the_same_table_gives_the_same_bytes() -> None:
    for write in (to_markdown, to_csv, to_latex):
        assert write(TABLE) == write(Table(TABLE.caption, TABLE.columns, TABLE.rows))


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells and the table 2 columns"):
        Table("", (Column("a"), Column("b")), ((1,),))


def test_result_says_what_it_was_made_with_and_null_for_what_is_no_number() -> None:
    content = json.loads(provenance(numbers=[1.5, float("nan")], nested={"a": (1, None)}))
    assert content["numbers"] == [1.5, None]
    assert content["nested"] == {"a": [1, None]}
    assert {"jax", "numpy", "scipy", "mgrad-jax", "python"} <= content["versions"].keys()
    assert content["device"].startswith("cpu")
