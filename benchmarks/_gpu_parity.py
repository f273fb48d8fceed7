"""Recorded numbers of the published code against ours on this device, at one precision: step (a) of `gpu.py`.

    python benchmarks/_gpu_parity.py --mode default --output FILE

Losses, gradients, embeddings and scores of the ten models and two trajectories of two epochs, built as the parity tests
build them (`tests/models`). A deviation is the largest difference in an array over the largest recorded number in it; a
row keeps the largest over its arrays. Modes:

    highest   float32, `jax_default_matmul_precision` highest
    default   float32, products as the device does them by default (TF32 on recent NVIDIA cards)
    float64   on the recorded graphs

Arrays that were recorded in float32 bound the deviation in float64 to some 1e-7.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import Parser, cores, device_name, exit_status, versions, write_json
from flax import nnx

TESTS = Path(__file__).resolve().parents[1] / "tests" / "models"
MODES = ("highest", "default", "float64")
TRAJECTORIES = [(model, run) for model in ("vbpr", "freedom") for run in ("adam", "sgd")]
# The name of embeddings and scores in the files, where it is not the usual one.
FILES = {"selfcf": "selfcfed_lgn"}


@exit_status
def main() -> None:
    """Compare and write."""
    parser = Parser(__doc__)
    parser.add_argument("--mode", choices=MODES, default="highest")
    parser.add_argument("--quick", action="store_true", help="one model and one trajectory")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", options.mode == "float64")
    jax.config.update("jax_default_matmul_precision", "highest" if options.mode == "highest" else None)
    sys.path.insert(0, str(TESTS))
    dtype = jnp.float64 if options.mode == "float64" else jnp.float32
    cases = {name: lambda name=name: _model(name, dtype) for name in (["vbpr"] if options.quick else _MODELS)}
    runs = TRAJECTORIES[:1] if options.quick else TRAJECTORIES
    cases |= {f"{model}, {run}": lambda model=model, run=run: _trajectory(model, run, dtype) for model, run in runs}
    # Nearly all of the time is compilation, which threads share.
    with ThreadPoolExecutor(min(8, cores())) as pool:
        found = list(pool.map(_guarded, cases.values()))
    common = {"mode": options.mode, "device": device_name(), "versions": versions()}
    write_json(options.output, [{"case": name, **row, **common} for name, row in zip(cases, found, strict=True)])


def _guarded(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A case that cannot be computed is a row that says so."""
    try:
        return case()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _vbpr_bm3_freedom(name: str, dtype: Any) -> Any:
    import test_parity

    model = test_parity.build(name, dtype)
    if dtype == jnp.float64:
        test_parity.feed_recorded_graphs(name, model)
    return model


def _layergcn_selfcf_slmrec(name: str, dtype: Any) -> Any:
    import test_parity_graph_cf
    from golden import graph_of, recorded

    from mgrad_jax.models import Frozen

    model = test_parity_graph_cf.build(name, dtype)
    if dtype == jnp.float64:
        model.graph = Frozen(graph_of(recorded(FILES.get(name, name))["graph/norm_adj"], dtype))
    return model


def _mmgcn_grcn(name: str, dtype: Any) -> Any:
    import test_parity_modal_graphs

    return test_parity_modal_graphs.build(name, dtype, recorded_graph=dtype == jnp.float64)


def _dualgnn_dragon(name: str, dtype: Any) -> Any:
    import test_parity_user_graphs

    return test_parity_user_graphs.build(name, dtype, recorded_graph=dtype == jnp.float64)


_MODELS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("vbpr", "bm3", "freedom"), _vbpr_bm3_freedom),
    **dict.fromkeys(("layergcn", "selfcf", "slmrec"), _layergcn_selfcf_slmrec),
    **dict.fromkeys(("mmgcn", "grcn"), _mmgcn_grcn),
    **dict.fromkeys(("dualgnn", "dragon"), _dualgnn_dragon),
}


def _model(name: str, dtype: Any) -> dict[str, Any]:
    """Largest deviations of one model's loss, gradients and scores."""
    from golden import batch_of, loss_and_gradients, recorded

    model, numbers = _MODELS[name](name, dtype), recorded(FILES.get(name, name))
    loss, gradients = loss_and_gradients(model, batch_of(numbers))
    published = {path: f"grad/{model.published_names[path]}" for path in gradients}
    # Where the true gradient is zero, what is recorded is rounding.
    compared = {p: k for p, k in published.items() if k in numbers and np.abs(numbers[k]).max() > 1e-12}
    scores = model.scores(jnp.arange(model.n_users))
    scores = jax.nn.sigmoid(scores) if name == "slmrec" else scores
    return {
        "loss": _deviation(loss, numbers["out/loss"]),
        "gradients": max(_deviation(gradients[path], numbers[key]) for path, key in compared.items()),
        "scores": _deviation(scores, numbers["out/scores"]),
        "arrays": len(compared) + 2,
    }


def _trajectory(model: str, run: str, dtype: Any) -> dict[str, Any]:
    """Largest deviation of the parameters after any batch of two epochs, and of the losses."""
    import test_trajectories as tests
    from golden import recorded

    numbers, names = recorded(f"mg_{model}"), tests.build(model, jnp.float32).published_names
    trajectory, losses = tests.train(model, tests.transformation(model, run), dtype)
    deviations = []
    for t, params in enumerate(trajectory):
        for path, value in nnx.to_flat_state(params):
            dotted = ".".join(map(str, path))
            key = f"traj/{run}/{t}/{names[dotted]}"
            if key in numbers and dotted not in tests.ZERO_GRADIENT:
                array = np.asarray(value[...])
                deviations.append(_deviation(array.T if path[-1] == "kernel" else array, numbers[key]))
    return {
        "loss": _deviation([loss[-1] for loss in losses], numbers[f"traj/{run}/loss"]),
        "parameters": max(deviations),
        "arrays": len(deviations) + 1,
    }


def _deviation(ours: Any, recorded: Any) -> float:
    """The largest difference over the largest recorded number."""
    recorded = np.asarray(recorded, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - recorded).max() / np.abs(recorded).max())


if __name__ == "__main__":
    sys.exit(main())
