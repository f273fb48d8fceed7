"""Tables of the studies in `results/studies/`, as the documentation shows them; the studies' own tables hold more.

Needs nothing but Python, as `_tables.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from _tables import markdown, read_csv

METRIC = "recall@5"
COMPARISONS = ("mirror - plain", "mirror - replay", "replay - plain")
_Line = dict[str, str]


def read(study: str, file: str) -> list[_Line]:
    """The rows of a study's CSV file."""
    return read_csv(f"studies/{study}/{file}")


def compared(*studies: str) -> str:
    """Metrics of every model and method, and relative differences at `METRIC` over seeds; first the best untrained."""
    rows = [row for study in studies for row in read(study, "table.csv")]
    tests = _tests(row for study in studies for row in read(study, "tests.csv"))
    untrained = max((row for row in rows if row["method"] == "no training"), key=lambda row: float(row[METRIC]))
    lines = []
    for row in [untrained, *(row for row in rows if row["method"] != "no training")]:
        means = [_mean(row, metric) for metric in (METRIC, "recall@20")]
        lines.append([row["model"], row["method"], *means, *_against(tests, row, _relative)])
    return markdown(["model", "method", METRIC, "recall@20", f"{METRIC} against plain", "against replay"], lines)


def equal(study: str, model: str) -> str:
    """One model at equally many gradient evaluations: means of the last epochs, and their differences."""
    rows = [row for row in read(study, "equal.csv") if row["model"] == model]
    tests = _tests(row for row in read(study, "equal_tests.csv") if row["rule"] == "last")
    metric = f"{METRIC}_last"
    lines = [
        [row["method"], f"{float(row['epochs']):.0f}", _mean(row, metric), *_against(tests, row, _difference)]
        for row in rows
    ]
    return markdown(["method", "epochs", METRIC, "against plain", "against replay"], lines)


def kept(*studies: str) -> str:
    """What is kept of `METRIC` under changes: differences of the areas under the curves, in percentage points."""
    lines = []
    for study in studies:
        rows = read(study, "tests.csv")
        tests = _tests(rows)
        for model, change in dict.fromkeys((row["model"], row["change"]) for row in rows):
            cells = [_points(tests[model, comparison]) for comparison in COMPARISONS]
            lines.append([f"{model}, {change}", *cells])
    return markdown(["model, change", *COMPARISONS], lines)


def flatness(study: str, at: str, numbers: Sequence[str]) -> str:
    """Scale-corrected numbers of flatness by method, with the training loss at which they were measured."""
    rows = [row for row in read(study, "table.csv") if row["at"] == at]
    methods = [name for name in ("plain", "replay", "mirror", "mirror-ascent") if name in rows[0]]
    lines = []
    for number in ("training loss", *numbers):
        (row,) = (r for r in rows if r["number"] == number and r["scale"] != "raw")
        exponent = math.floor(math.log10(max(abs(float(row[method])) for method in methods)))
        exponent = exponent if exponent < -1 else 0
        unit = f", 1e{exponent}" if exponent else ""
        lines.append([number + unit, *(_mean(row, method, 3, exponent) for method in methods)])
    return markdown([f"at {at}", *methods], lines)


def half_steps(*studies: str) -> str:
    """The second half-step beside the first and the gradient, after some batches; of Adam also the ascending one."""
    rows = [(study.partition("-")[0], row) for study in studies for row in read(study, "half-steps.csv")]
    lines = []
    for data, row in rows:
        ascends = row["second_half-step"] == "ascent"
        if row["state"] == "running" and (row["optimizer"] == "adam" or not ascends):
            projection, cosine, length = (float(row[name]) for name in ("projection", "cosine_with_-g", "length"))
            optimizer = row["optimizer"] + (", mirror-ascent" if ascends else "")
            numbers = [f"{projection:+.2f}", f"{cosine:+.2f}", f"{length:.2f}"]
            lines.append([f"{row['model']}, {data}", optimizer, *numbers])
    columns = ["projection of d2 on d1", "cosine of d2 with -g", "length beside a plain step"]
    return markdown(["model, data", "optimizer", *columns], lines)


def _tests(rows: Iterable[_Line]) -> dict[tuple[str, str], _Line]:
    """The tests at `METRIC`, by model and comparison."""
    return {(row["model"], row["comparison"]): row for row in rows if row["metric"] == METRIC}


def _against(tests: dict[tuple[str, str], _Line], row: _Line, cell: Callable[[_Line], str]) -> list[str]:
    """A row's differences from plain training and from the control, where there are any."""
    found = (tests.get((row["model"], f"{row['method']} - {other}")) for other in ("plain", "replay"))
    return [cell(test) if test else "" for test in found]


def _mean(row: _Line, name: str, digits: int = 4, exponent: int = 0) -> str:
    factor = 10.0**-exponent
    mean, deviation = float(row[name]) * factor, row.get(f"{name}_sd")
    return f"{mean:.{digits}f}" + (f" ± {float(deviation) * factor:.{digits}f}" if deviation else "")


def _relative(test: _Line) -> str:
    value, low, high = (100 * float(test[f"relative{end}"]) for end in ("", "_low", "_high"))
    return f"{value:+.1f}% [{low:+.1f}%, {high:+.1f}%]{_noted(test['p_over_seeds'], test['Holm_over_seeds'])}"


def _points(test: _Line) -> str:
    value, low, high = (float(test[f"area,_%_points{end}"]) for end in ("", "_low", "_high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]{_noted(test['p'], test['Holm'])}"


def _difference(test: _Line) -> str:
    return f"{float(test['difference']):+.4f}{_noted(test['p'], test['Holm'])}"


def _noted(p: str, holm: str) -> str:
    """A p below 0.05, with what is left of it after Holm."""
    return f", p = {float(p):.2g}, Holm {float(holm):.2g}" if p and float(p) < 0.05 else ""
