"""The documentation as a site: `sphinx-build -W docs docs/_build`."""

from __future__ import annotations

import re
from typing import Any

project = "mgrad_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
exclude_patterns = ["_build"]

default_role = "code"  # docstrings put code into single backticks
autodoc_member_order = "bysource"
napoleon_use_ivar = True
myst_heading_anchors = 4

_LEAVES_THIS_FOLDER = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)")
_BAR = re.compile(r"(`[^`]*`)|\|")


def setup(app: Any) -> None:
    """Have pages and docstrings read as they are meant."""

    def unlink(app: Any, page: str, source: list[str]) -> None:
        """Links to files beside this folder work in a checkout; on the site they are plain text."""
        source[0] = _LEAVES_THIS_FOLDER.sub(r"\1", source[0])

    def keep_bars(app: Any, what: str, name: str, of: object, options: Any, lines: list[str]) -> None:
        """A norm is written with bars, which would be a substitution."""
        lines[:] = [_BAR.sub(lambda found: found[1] or r"\|", line) for line in lines]

    app.connect("source-read", unlink)
    app.connect("autodoc-process-docstring", keep_bars)
