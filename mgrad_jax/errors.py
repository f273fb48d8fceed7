"""The one exception for mistakes a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: one sentence that names the file or option, the place in it and the remedy.

    The command line prints the sentence and exits with code 2; Python callers may catch it as a `ValueError`.

    >>> raise UserError("data/x.inter line 3: item id -1 is negative; ids count from 0.")
    Traceback (most recent call last):
    mgrad_jax.errors.UserError: data/x.inter line 3: item id -1 is negative; ids count from 0.
    """
