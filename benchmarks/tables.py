"""Write the tables of the documentation from the files of results, or check that they are what these say.

    python benchmarks/tables.py --write
    python benchmarks/tables.py --check

A table stands between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from _gpu_summary import summary
from _studies import compared, equal, flatness, half_steps, kept
from _tables import RESULTS, TABLES, Row, latest, markdown, number, pivot, read_csv, results

DOCS = Path(__file__).resolve().parents[1] / "docs"
METRICS = ("recall@5", "recall@20", "ndcg@20")
SEEDS = (999, 42, 2024)


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
        done = "written" if options.write else "not what benchmarks/results say; run tables.py with --write"
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


def _trainer(newest: bool) -> str:
    """Both sides, as the newest code ran, or as earlier code did."""
    rows = results("vs_pytorch")
    last = latest(rows, "model", "training", "side", "data")
    headings = [*list(TABLES["vs_pytorch"].columns)[1:10], *([] if newest else ["commit"])]
    return TABLES["vs_pytorch"].markdown(last if newest else [row for row in rows if row not in last], headings)


def _whole(name: str, *headings: str) -> str:
    """The table of all rows of a benchmark."""
    return TABLES[name].markdown(results(name), headings)


def _same_run() -> str:
    headings = [heading for heading in TABLES["same_run"].columns if heading not in ("data", "epochs")]
    return _whole("same_run", *headings)


def _nearest_items() -> str:
    """The numbers of devices side by side."""
    return markdown(
        *pivot(
            results("nearest_items"),
            ("data", "features", "items", "columns", "precision"),
            "devices",
            number("differ", 0),
        )
    )


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


def _mean(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def _agree(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two means differ by at most 5%, or by at most two standard errors of their difference."""
    difference = abs(statistics.fmean(ours) - statistics.fmean(theirs))
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (ours, theirs)))
    return difference <= max(0.05 * statistics.fmean(theirs), 2 * error)


def _means(data: str, metrics: Sequence[str], others: str) -> str:
    """Test metrics of every model and training, each beside that of another file's rows."""
    rows = [row for row in _runs(data) if row["feature_dtype"] == "float32"]
    theirs, lines = _groups(read_csv(others), "model", "training"), []
    for key, group in _groups(rows, "model", "training").items():
        other = theirs.get(key, [])
        line = [*key, f"{len(group)} / {len(other)}" if len(other) > 1 else f"{len(group)}"]
        for metric in metrics:
            values = [float(row[metric]) for row in other if metric in row]
            line += [_mean(ours := [row["test"][metric] for row in group]), _beside(ours, values)]
        lines.append([*line, ", ".join(str(row["epochs_run"]) for row in group)])
    headings = [heading for metric in metrics for heading in (metric, others.partition("_")[0])]
    return markdown(["model", "training", "seeds", *headings, "epochs run"], lines)


def _beside(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """What is known of the same elsewhere: a mean and whether ours agrees with it, or a single number, or nothing."""
    if len(theirs) < 2:
        return "".join(f"{value:.4f}" for value in theirs)
    return f"{_mean(theirs)}{' =' if _agree(ours, theirs) else ''}"


def _bfloat16() -> str:
    """Feature tables in either type, over the seeds that both have."""
    lines = []
    for (model, kind, training), group in _groups(_runs("tiktok"), "model", "feature_dtype", "training").items():
        if model in ("vbpr", "freedom") and training == "plain":
            tests = [row["test"] for row in group if row["seed"] in SEEDS]
            lines.append([model, kind, *(_mean([test[metric] for test in tests]) for metric in METRICS)])
    return markdown(["model", "features", *METRICS], sorted(lines, reverse=True))


def _paired(data: str) -> str:
    """Differences per user and their p."""
    rows = [row for row in read_csv("paired_tests.csv") if row["data"] == data]
    for row in rows:
        row |= {metric: f"{row[metric]} (p = {row[f'p, {metric}']})" for metric in ("recall@5", "recall@20")}
    headings = ("model", "difference", "seeds", "recall@5", "recall@20")
    return markdown(headings, [[row[heading] for heading in headings] for row in rows])


def _curves() -> str:
    """VBPR, epoch by epoch: mean test recall@5 of the mirrored seeds still training, range of the plain seeds' loss."""
    rows = read_csv("tiktok_vbpr_curves.csv")
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
    sides = [heading for side in ("ours", "reference") for heading in (f"recall@5, {side} (seeds)", f"loss, {side}")]
    return markdown(["epoch", *sides], lines)


def _cost(data: str) -> str:
    """What each model takes of each of eight devices, beside one."""
    rows = {(row["model"], row["devices"]): row for row in _programs() if row["size"] == data}
    lines = []
    for model in sorted({model for model, _ in rows}):
        if (model, 8) not in rows:
            continue
        one, eight = rows[model, 1], rows[model, 8]
        sent = [_megabytes(eight[f"sent_{what}"]) for what in ("per_pass", "per_epoch", "per_evaluation")]
        ratio = f"{one['argument_bytes'] / eight['argument_bytes']:.1f}"
        evaluation = f"{eight['evaluation_temporary_bytes'] / 1e6:,.0f}"
        lines.append(
            [model, _memory(one), _memory(eight), ratio, str(eight["collectives_per_pass"]), *sent, evaluation]
        )
    held = ["1 device, MB", "each of 8, MB", "arguments, times less"]
    sent = ["collectives a pass", "MB a pass", "MB an epoch besides", "MB an evaluation", "evaluation's arrays, MB"]
    return markdown(["model", *held, *sent], lines)


def _devices(data: str) -> str:
    """Memory by the number of devices."""
    rows = [row for row in _programs() if row["size"] == data]
    many = {row["model"] for row in rows if row["devices"] > 8}
    rows = sorted((row for row in rows if row["model"] in many), key=lambda row: (row["model"], row["devices"]))
    return markdown(*pivot(rows, ("model",), "devices", _memory))


def _programs() -> list[Row]:
    return [row for row in results("sharding") if row["how"] == "program"]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e8 else f"{size / 1e6:.3g}"


def _memory(row: Row) -> str:
    return " + ".join(f"{row[f'{what}_bytes'] / 1e6:,.0f}" for what in ("argument", "temporary"))


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "performance.md": {
        "gpu": partial(summary, RESULTS / "gpu"),
        "vs_pytorch": partial(_trainer, newest=True),
        "vs_pytorch, earlier": partial(_trainer, newest=False),
        "step_throughput": _price,
        "compile_time": partial(_whole, "compile_time"),
        "propagation": _propagation,
        "sweep_throughput": partial(_whole, "sweep_throughput"),
        "scaling": partial(_whole, "scaling"),
        "floors": partial(_whole, "floors", *list(TABLES["floors"].columns)[1:]),
        "bfloat16": _bfloat16,
    },
    "devices.md": {
        "same_run": _same_run,
        "electronics": partial(_cost, "electronics"),
        "electronics x 10": partial(_cost, "electronics x 10"),
        "devices": partial(_devices, "electronics x 10"),
        "nearest items": _nearest_items,
    },
    "experiments.md": {
        "half-steps": partial(half_steps, "tiktok-theory", "lfm2k-theory"),
    },
    "results.md": {
        "tiktok, means": partial(_means, "tiktok", METRICS, "reference_tiktok.csv"),
        "tiktok, epochs": _curves,
        "tiktok, paired": partial(_paired, "tiktok"),
        "baby, means": partial(_means, "baby", ("recall@5", "map@5", "ndcg@5", "recall@20"), "paper_baby_table9.csv"),
        "baby, paired": partial(_paired, "baby"),
        "baby, five seeds": partial(compared, "baby-layergcn"),
        "baby, equal updates": partial(equal, "baby-layergcn", "layergcn"),
        "lfm2k, five seeds": partial(compared, "lfm2k", "lfm2k-grcn"),
        "lfm2k, equal updates": partial(equal, "lfm2k", "freedom"),
        "lfm2k, grcn at equal updates": partial(equal, "lfm2k-grcn", "grcn"),
        "lfm2k, changes": partial(kept, "lfm2k-noise", "lfm2k-swap", "lfm2k-grcn-swap"),
        "tiktok, five seeds": partial(compared, "tiktok", "tiktok-grcn"),
        "tiktok, changes": partial(kept, "tiktok-noise", "tiktok-swap"),
        "tiktok, bm3's flatness": partial(
            flatness, "tiktok-bm3-landscape", "best epoch", ("trace", "smoothed rise 0.25", "worst rise")
        ),
        "tiktok, freedom's flatness": partial(
            flatness,
            "tiktok-freedom-landscape",
            "equal loss",
            ("trace", "smoothed rise 0.25", "worst rise", "largest eigenvalue"),
        ),
    },
}


if __name__ == "__main__":
    sys.exit(main())
