"""`mgrad-jax`: train, evaluate and recommend from the command line; each command a thin call into the library.

Every mistake gives one sentence on stderr and exit code 2. Whatever takes time to import is imported in `main`, where
Ctrl-C is already watched for; JAX is imported by the commands that need it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mgrad_jax.cli import stopping


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input, 3 when another process is gone, 130 when
    stopped.

    Args:
        arguments: without the program's name; `sys.argv` by default.
    """
    with stopping.watched():
        try:
            from mgrad_jax.cli import program

            return program.run(arguments)
        except KeyboardInterrupt:
            from mgrad_jax.cli.failures import fail

            return fail(stopping.sentence(), stopping.EXIT_CODE)
