"""The command of the study that the tests of the analyses share."""

from __future__ import annotations

from pathlib import Path

OPTIONS = {
    "--data": "demo",
    "--models": "vbpr",
    "--methods": "plain,mirror",
    "--seeds": "2",
    "--epochs": "2",
    "--batch-size": "7200",
    "--set": "embedding_dim=8",
    "--keep-every": "1",
}


def compare(out: Path, *flags: str, **changes: str) -> list[str]:
    """The command of the study in `out`; `changes` replace its options, each of which may stand once only."""
    options = {**OPTIONS, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return ["compare", *(word for option in options.items() for word in option), "--out", str(out), *flags]
