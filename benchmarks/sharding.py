"""What a training takes of each of several devices, and what these send each other.

    python benchmarks/sharding.py --models freedom lightgcn --sizes electronics --devices 1 8
    python benchmarks/sharding.py --run --models freedom --sizes electronics --devices 1 2 4 8

Without `--run` nothing is trained and nothing is allocated: the programs of an epoch and of its evaluation are compiled
for shapes (`mgrad_jax.training.plan`), on virtual devices of the processor. XLA's account gives each device's memory;
the text of the programs gives the collectives, and with them the bytes that each device sends, by ring algorithms. The
published trainer's split of 8 : 1 : 1 is taken throughout, mirror gradient with Adam, and the batch size of the paper.

With `--run`, an epoch on made-up data is timed, on real devices only, for virtual ones share the same cores: the same
data on each number of devices (`strong`), and data that grow with it (`weak`: users, items and interactions times n).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import jax
import optax
from _frame import Benchmark, Parser, say
from _settings import BATCH_SIZE, LEARNING_RATE, MIRROR, SETTINGS, make_model
from _settings import SIZES as USUAL_SIZES
from _tables import Row
from _timing import spread
from matplotlib.figure import Figure

from mgrad_jax import mirror_gradient, models
from mgrad_jax.data import synthetic, synthetic_interactions
from mgrad_jax.devices import mesh
from mgrad_jax.errors import UserError
from mgrad_jax.training import fit
from mgrad_jax.training.plan import Sizes, make_plan
from mgrad_jax.training.settings import FitSettings

LARGE = synthetic.Size(1_924_030, 630_010, 16_891_880)
SIZES = {**USUAL_SIZES, "electronics x 10": LARGE}
CHOSEN = ["tiktok", "baby", "electronics", "electronics x 10"]


def _options(parser: Parser) -> None:
    parser.option("--models", models.names(), "models", ["lightgcn"], choices=models.names())
    parser.option("--sizes", CHOSEN, "sizes of made-up data", ["quick"], choices=list(SIZES))
    parser.number("--devices", [1, 2, 4, 8], "numbers of devices", [1, 2])
    parser.number("--batch-size", BATCH_SIZE, "interactions per batch")
    parser.number("--repeats", 3, "timed epochs, with --run", 1)
    parser.add_argument("--run", action="store_true", help="time epochs on real devices, instead of compiling only")


def _measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    if options.run and jax.default_backend() == "cpu":
        raise UserError("the devices here are virtual and share the same cores, so that their speed says nothing.")
    for size in options.sizes:
        for model in options.models:
            for devices in options.devices:
                say(model, size, devices)
                if options.run:
                    yield [_timed(model, size, devices, how, options) for how in ("strong", "weak")]
                else:
                    yield [_planned(model, size, devices, options.batch_size)]


def _transformation() -> optax.GradientTransformation:
    return optax.chain(mirror_gradient(**MIRROR), optax.adam(LEARNING_RATE))


def _planned(model: str, size: str, devices: int, batch_size: int) -> Row:
    """Memory and traffic of one model, size and number of devices."""
    n = SIZES[size]
    rest = n.interactions // 10
    splits = (n.interactions - 2 * rest, rest, rest)
    data = Sizes(size, n.users, n.items, splits, {"image": n.image_dim, "text": n.text_dim})
    setting = SETTINGS[model].hyper_parameters
    plan = make_plan(
        lambda: models.create(model, data, **setting),
        data,
        _transformation(),
        FitSettings(batch_size=batch_size),
        mesh(devices),
    )
    return {
        "model": model,
        "size": size,
        "devices": devices,
        "how": "program",
        "users": n.users,
        "items": n.items,
        "interactions": splits[0],
        "argument_bytes": plan.training.arguments,
        "temporary_bytes": plan.training.temporaries,
        "best_bytes": plan.best_bytes,
        "evaluation_argument_bytes": plan.evaluation.arguments,
        "evaluation_temporary_bytes": plan.evaluation.temporaries,
        **{
            f"{name}_{what}": traffic
            for what in ("per_pass", "per_epoch", "per_evaluation")
            for name, traffic in getattr(plan, what)._asdict().items()
        },
    }


def _timed(model: str, size: str, devices: int, how: str, options: argparse.Namespace) -> Row:
    """Seconds of an epoch's batches on so many devices."""
    n = SIZES[size]
    if how == "weak":
        n = synthetic.Size(n.users * devices, n.items * devices, n.interactions * devices, n.image_dim, n.text_dim)
    data = synthetic_interactions(n, name=size)
    epochs = options.repeats + 1  # the first is for warmth
    result = fit(
        make_model(model, data),
        data,
        _transformation(),
        epochs=epochs,
        patience=epochs,
        batch_size=options.batch_size,
        mesh=mesh(devices),
    )
    batches = -(-len(data.train) // options.batch_size)
    return {
        "model": model,
        "size": size,
        "devices": devices,
        "how": how,
        "users": n.users,
        "items": n.items,
        "interactions": len(data.train),
        "seconds_per_batch": spread([report.seconds_train / batches for report in result.history[1:]]),
        "seconds_per_evaluation": spread([report.seconds_evaluate for report in result.history[1:]]),
    }


def _plot(rows: list[Row]) -> Figure:
    """Memory and bytes a pass over the number of devices, a panel for each size and a line for each model."""
    rows = [row for row in rows if row["how"] == "program"]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = Figure(figsize=(3.4 * len(sizes) + 1.6, 6), layout="constrained")
    panels = figure.subplots(2, len(sizes), squeeze=False, sharex=True)
    for column, size in enumerate(sizes):
        for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            mine = sorted((r for r in rows if (r["size"], r["model"]) == (size, model)), key=lambda r: r["devices"])
            devices = [row["devices"] for row in mine]
            memory = [(row["argument_bytes"] + row["temporary_bytes"]) / 1e6 for row in mine]
            sent = [row["sent_per_pass"] / 1e6 or None for row in mine]
            style = {"marker": "o^sv"[number // 10 % 4], "color": f"C{number % 10}", "label": model, "markersize": 4}
            panels[0, column].plot(devices, memory, **style)
            panels[1, column].plot(devices, sent, **style)
        panels[0, column].set_title(size)
        for axes in panels[:, column]:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        panels[1, column].set_xlabel("devices")
    panels[0, 0].set_ylabel("memory of each device, MB")
    panels[1, 0].set_ylabel("sent by each device a pass, MB")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 16)  # compiling takes no more than their number
    sys.exit(Benchmark("sharding", __doc__, _measure, _options, plot=_plot).main())
