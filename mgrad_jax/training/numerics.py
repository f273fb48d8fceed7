"""How exactly a device computes: the precision of dense products, and sums that come out alike every time.

Nothing here changes JAX's own settings: the precision holds inside a `with`, and determinism is a flag of XLA's that
has to be there before JAX begins to compute, so only a command line can set it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax

from mgrad_jax.errors import UserError
from mgrad_jax.training.settings import Settings

# What runs count as whose files say nothing of it; on a CPU it makes no difference.
UNSAID = {"matmul_precision": "highest", "deterministic": False}
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def make_deterministic() -> None:
    """Have XLA take deterministic operations in this process, which must not have computed anything yet."""
    if not _is_deterministic():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()


@contextlib.contextmanager
def as_configured(config: Settings) -> Iterator[None]:
    """Trace and compute with a run's precision; also a decorator.

    Raises:
        UserError: the run is to be deterministic and this process, on a GPU, is not.
    """
    if config.deterministic and jax.default_backend() == "gpu" and not _is_deterministic():
        raise UserError(
            "deterministic training needs a flag of XLA's before JAX starts; "
            f"set the environment variable XLA_FLAGS={_DETERMINISTIC}, or train with mgrad-jax train --deterministic."
        )
    with jax.default_matmul_precision(config.matmul_precision):
        yield


def _is_deterministic() -> bool:
    return _DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split()
