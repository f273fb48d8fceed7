"""Puts `models/` into the wheel as `mgrad_jax/models`, also where a checkout has no symbolic links."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Models(BuildHookInterface):
    """Takes the models from where they are and not through the link, which an editable installation needs, however."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folder to a wheel; end an editable installation that would lack the models, with one sentence."""
        if version != "editable":
            build_data["force_include"]["models"] = "mgrad_jax/models"
            return
        link = Path(self.root) / "mgrad_jax" / "models"
        if not (link / "__init__.py").is_file():
            sys.exit(
                f"{link} is not a link to the folder models, as in a checkout or an archive without symbolic links; "
                "install without --editable, or check out again with git -c core.symlinks=true."
            )
