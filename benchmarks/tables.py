"""Write the tables of the documentation from the files of results, or check that they are what these say.

    python benchmarks/tables.py --write
    python benchmarks/tables.py --check

A table stands between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from _gpu_summary import summary
from _tables import RESULTS, TABLES, Row, latest, markdown, number, pivot, results

DOCS = Path(__file__).resolve().parents[1] / "docs"
METRICS = ("recall@5", "recall@20", "ndcg@20")
SEEDS = (999, 42, 2024)
SHARED = ("dragon", "slmrec", "grcn", "mmgcn")  # trained beside other work: their seconds say nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check every table; 1 where one is not what the results say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table differs")
    choice.add_argument("--write", action="store_true", help="put the tables into the documents")
    options = parser.parse_args(arguments)
    stale = []
    for name, sections in SECTIONS.items():
        file = DOCS / name
        before = after = file.read_text(encoding="utf-8")
        for mark, make in sections.items():
            whole = between_marks(after, mark, make())
            stale += [f"docs/{name}, {mark}"] if whole != after else []
            after = whole
        if options.write and after != before:
            file.write_text(after, encoding="utf-8")
    if stale:
        done = (
            "written" if options.write else "not what benchmarks/results say; run `python benchmarks/tables.py --write`"
        )
        print(f"{'; '.join(stale)}: {done}.")
    return 1 if stale and options.check else 0


def between_marks(document: str, mark: str, text: str) -> str:
    """The document with another text between its marks."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise SystemExit(f"the document needs one '{begin.strip()}' and one '{end}'; put them where the table belongs.")
    before, _, rest = document.partition(begin)
    return f"{before}{begin}{text}{end}{rest.partition(end)[2]}"


def _price() -> str:
    """Time over the plain optimizer's, the forms side by side."""
    rows = [row for row in results("step_throughput") if row["form"] != "plain"]
    rows = [{**row, "data": row["size"], "bound": f"{1 + 1 / row['interval']:.3f}"} for row in rows]
    return markdown(*pivot(rows, ("data", "model", "interval", "bound"), "form", number("ratio_to_plain", 3)))


def _trainer() -> str:
    rows = latest(results("vs_pytorch"), "model", "training", "side", "data")
    return TABLES["vs_pytorch"].markdown(rows, list(TABLES["vs_pytorch"].columns)[1:10])


def _trainer_before() -> str:
    """What earlier code took."""
    rows = results("vs_pytorch")
    newest = latest(rows, "model", "training", "side", "data")
    return markdown(
        ["model", "training", "commit", "epoch, faster", "evaluation, faster"],
        [
            [row["model"], row["training"], row["commit"], f"{row['ratio']:.1f}", f"{row['ratio_evaluation']:.1f}"]
            for row in rows
            if row not in newest and row["side"] == "ours"
        ],
    )


def _whole(name: str, *headings: str) -> Callable[[], str]:
    """The table of all rows of a benchmark."""
    return lambda: TABLES[name].markdown(results(name), headings)


def _propagation() -> str:
    rows = [row for row in results("propagation") if row["what"] == "gradient"]
    return TABLES["propagation"].markdown(rows, ("graph", "case", "ms", "over propagate", "over the floor"))


def _runs(data: str) -> list[Row]:
    """Training runs on one dataset."""
    return [row for row in results("runs") if data == (row["data"]["name"] if "name" in row["data"] else row["data"])]


def _groups(rows: Iterable[Row], *fields: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in fields), []).append(row)
    return found


def _read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _mean(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def _agree(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two means differ by at most 5%, or by at most two standard errors of their difference."""
    difference = abs(statistics.fmean(ours) - statistics.fmean(theirs))
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (ours, theirs)))
    return difference <= max(0.05 * statistics.fmean(theirs), 2 * error)


def _means_tiktok() -> str:
    """Test metrics of every model and training, beside the reference code's."""
    theirs = _groups(_read("published_tiktok.csv"), "model", "training")
    lines = []
    runs = [row for row in _runs("tiktok") if row["feature_dtype"] == "float32"]
    for (model, training), group in _groups(runs, "model", "training").items():
        others = theirs.get((model, training), [])
        seeds = f"{len(group)} / {len(others)}" if others else f"{len(group)}"
        cells = []
        for metric in METRICS:
            values, other = [row["test"][metric] for row in group], [float(row[f"test_{metric}"]) for row in others]
            cells += [_mean(values), f"{_mean(other)}{' =' if _agree(values, other) else ''}" if other else ""]
        seconds = "" if model in SHARED else f"{statistics.median(sum(r['seconds'].values()) for r in group):.0f}"
        lines.append([model, training, seeds, *cells, ", ".join(str(row["epochs_run"]) for row in group), seconds])
    metrics = [heading for metric in METRICS for heading in (metric, "reference")]
    return markdown(["model", "training", "seeds", *metrics, "epochs run", "seconds per run"], lines)


def _means_baby() -> str:
    """Test metrics of the models without features, beside the paper's."""
    paper = {(row["model"], row["training"]): row for row in _read("paper_table9_baby.csv")}
    lines = []
    for key, group in _groups(_runs("baby"), "model", "training").items():
        cells = []
        for metric in ("recall@5", "map@5", "ndcg@5"):
            cells += [_mean([row["test"][metric] for row in group]), paper.get(key, {}).get(metric, "")]
        cells.append(_mean([row["test"]["recall@20"] for row in group]))
        lines.append([*key, str(len(group)), *cells, ", ".join(str(row["epochs_run"]) for row in group)])
    metrics = [heading for metric in ("recall@5", "map@5", "ndcg@5") for heading in (metric, "paper")]
    return markdown(["model", "training", "seeds", *metrics, "recall@20", "epochs run"], lines)


def _bfloat16() -> str:
    """Feature tables in either type, over the seeds that both have."""
    groups = _groups(_runs("tiktok"), "model", "feature_dtype", "training")
    return markdown(
        ["model", "features", *METRICS],
        [
            [
                model,
                kind,
                *(_mean([r["test"][m] for r in groups[model, kind, "plain"] if r["seed"] in SEEDS]) for m in METRICS),
            ]
            for model in ("vbpr", "freedom")
            for kind in ("float32", "bfloat16")
        ],
    )


def _paired(data: str) -> Callable[[], str]:
    """Differences per user and their p."""

    def make() -> str:
        lines = [
            [row["model"], row["difference"], row["seeds"]]
            + [f"{row[metric]} (p = {row[f'p, {metric}']})" for metric in ("recall@5", "recall@20")]
            for row in _read("paired_tests.csv")
            if row["data"] == data
        ]
        return markdown(["model", "difference", "seeds", "recall@5", "recall@20"], lines)

    return make


def _curves() -> str:
    """VBPR, epoch by epoch: mean test recall@5 of the mirrored seeds still training, range of the plain seeds' loss."""
    rows = _read("tiktok_vbpr_curves.csv")
    lines = []
    for epoch in (1, 5, 12, 20, 25, 40, 60):
        line = [str(epoch)]
        for side in ("ours", "published"):
            mine = [row for row in rows if row["epoch"] == str(epoch) and row["side"] == side]
            recall = [float(row["test_recall@5"]) for row in mine if row["training"] == "mirror"]
            loss = [float(row["loss"]) for row in mine if row["training"] == "plain" and row["loss"]]
            line.append(f"{statistics.fmean(recall):.4f} ({len(recall)})" if recall else "")
            line.append(f"{min(loss):.2f} to {max(loss):.2f}" if loss else "")
        lines.append(line)
    return markdown(
        ["epoch", "recall@5, ours (seeds)", "loss, ours", "recall@5, reference (seeds)", "loss, reference"], lines
    )


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "performance.md": {
        "gpu": lambda: summary(RESULTS / "gpu"),
        "vs_pytorch": _trainer,
        "vs_pytorch, earlier": _trainer_before,
        "step_throughput": _price,
        "compile_time": _whole("compile_time"),
        "propagation": _propagation,
        "sweep_throughput": _whole("sweep_throughput"),
        "scaling": _whole("scaling"),
        "floors": _whole("floors", *list(TABLES["floors"].columns)[1:]),
        "bfloat16": _bfloat16,
    },
    "results.md": {
        "tiktok, means": _means_tiktok,
        "tiktok, epochs": _curves,
        "tiktok, paired": _paired("tiktok"),
        "baby, means": _means_baby,
        "baby, paired": _paired("baby"),
    },
}


if __name__ == "__main__":
    sys.exit(main())
