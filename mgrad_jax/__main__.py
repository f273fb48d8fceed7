"""`python -m mgrad_jax`."""

import sys

from mgrad_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
