"""Data and imports flow downwards: which part of the package may import which, written down once."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Part -> the parts below it that it may import. A part is a package of `mgrad_jax` or a file of its own; in a package
# only circles are refused. `deprecation` is about old names, which may stand anywhere.
ALLOWED = {
    "errors": (),
    "declaration": ("errors",),
    "deprecation": (),
    "signals": (),
    "dropout": (),
    "files": ("errors",),
    "devices": ("errors",),
    "processes": ("errors",),
    "selection": ("deprecation",),
    "iterates": (),
    "ascent": (),
    "mirror": ("ascent",),
    "same_batch": ("mirror",),
    "nnx_loop": ("mirror",),
    "sparse_masks": (),
    "sharpness_aware": ("mirror", "selection", "sparse_masks"),
    "optimizers": ("declaration", "errors"),
    "graph": ("deprecation", "devices", "dropout", "errors", "selection"),
    "preparation": ("declaration",),
    "data": ("deprecation", "errors", "files", "graph", "preparation"),
    "losses": ("deprecation",),
    "models": ("data", "declaration", "deprecation", "devices", "dropout", "errors", "graph"),
    "evaluation": ("data", "deprecation", "devices", "errors"),
    "interop": ("errors", "models"),
    "training": (
        *("ascent", "data", "declaration", "deprecation", "devices", "errors", "evaluation", "files", "graph"),
        *("iterates", "mirror", "models", "optimizers", "processes", "selection", "sharpness_aware", "signals"),
    ),
    "analysis": (
        *("ascent", "data", "declaration", "deprecation", "errors", "evaluation", "files", "graph", "iterates"),
        *("mirror", "models", "optimizers", "sharpness_aware", "signals", "training"),
    ),
    "cli": (
        *("analysis", "data", "declaration", "devices", "errors", "evaluation", "files", "interop", "mirror"),
        *("models", "optimizers", "preparation", "processes", "sharpness_aware", "signals", "training"),
    ),
    "__main__": ("cli",),
    # The public names.
    "__init__": ("iterates", "mirror", "nnx_loop", "same_batch", "sharpness_aware"),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name under `mgrad_jax`, the package's own being "__init__"."""
    files = {path.relative_to(ROOT / "mgrad_jax"): path for path in (ROOT / "mgrad_jax").rglob("*.py")}
    # `models` is a link in a checkout, which a walk does not follow.
    files |= {path.relative_to(ROOT): path for path in (ROOT / "models").rglob("*.py")}
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): path for file, path in files.items()}


MODULES = modules()


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not read here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "mgrad_jax":
                while rest and rest not in MODULES:
                    rest = rest.rpartition(".")[0]
                found.add(rest or "__init__")
    return found


def part(module: str) -> str:
    """The part a module belongs to: the first of its names."""
    return module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_part_may(module: str) -> None:
    own = part(module)
    upwards = sorted(other for other in imported(MODULES[module]) if part(other) not in (own, *ALLOWED[own]))
    assert not upwards, f"{module} imports {upwards}; {own} may import {ALLOWED[own]}"


def test_the_parts_form_floors() -> None:
    assert set(ALLOWED) == {part(module) for module in MODULES}
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())  # raises where there is a circle
    assert order.index("graph") < order.index("data") < order.index("models") < order.index("training")


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A package's __init__ collects its modules; they may ask for it by name, and import one another directly.
    arrows = {module: imported(path) - {part(module)} for module, path in MODULES.items() if "." in module}
    graphlib.TopologicalSorter(arrows).prepare()


def test_an_import_upwards_is_seen_wherever_it_hides(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import mgrad_jax.cli.train\n"
        "def late():\n    from mgrad_jax.training.fit import fit\n    from mgrad_jax import models, mirror_gradient\n"
    )
    assert imported(file) == {"cli.train", "training.fit", "models", "__init__"}
