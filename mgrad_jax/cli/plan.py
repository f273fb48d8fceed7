"""`--plan`: what each device would hold and send in a training; its programs are compiled, and nothing is run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

from mgrad_jax.cli.console import print_table

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mgrad_jax.training.config import RunConfig
    from mgrad_jax.training.plan import Plan


def show_plan(config: RunConfig, devices: int | Literal["all"]) -> None:
    """Print what `train` with this configuration takes of each device, and what these send each other.

    Raises:
        UserError: what training itself would refuse, except for want of memory.
    """
    mesh = _mesh(devices)
    from mgrad_jax.data import load_interactions
    from mgrad_jax.training.plan import make_plan

    data = load_interactions(config.data)
    plan = make_plan(lambda: config.create_model(data), data, config.transformation(data), config, mesh)
    platform = mesh.devices.flat[0].platform
    title = f"{config.summary} on {mesh.size} {platform} device{'s' if mesh.size > 1 else ''}: nothing was trained"
    print_table(title, ["on each device", ""], _rows(plan))


def _rows(plan: Plan) -> list[list[str]]:
    from mgrad_jax.training.memory import in_words

    rows = {
        "an epoch's arguments": in_words(plan.training.arguments),
        "its temporary arrays": in_words(plan.training.temporaries),
        "the best epoch's parameters": in_words(plan.best_bytes),
        "evaluation's temporary arrays": in_words(plan.evaluation.temporaries),
    }
    if plan.neighbour_bytes:
        rows["before, while nearest items are found, about"] = in_words(plan.neighbour_bytes)
    for traffic, what in (
        (plan.per_pass, "sent in a pass over a batch"),
        (plan.per_epoch, "sent once an epoch besides"),
        (plan.per_evaluation, "sent in an evaluation"),
    ):
        rows[what] = f"{in_words(traffic.sent)} in {traffic.collectives:,} collectives"
    return [[what, value] for what, value in rows.items()]


def _mesh(devices: int | Literal["all"]) -> Mesh:
    """So many devices: those there are, or virtual ones of the processor where there are fewer."""
    import jax

    from mgrad_jax.devices import mesh

    if devices == "all":
        return mesh()
    with contextlib.suppress(RuntimeError):  # JAX has begun to compute, and has the devices that it has
        jax.config.update("jax_num_cpu_devices", devices)
    return mesh(devices, None if len(jax.devices()) >= devices else "cpu")
