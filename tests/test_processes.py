"""What a process says where it cannot be one of several."""

from __future__ import annotations

import os
import subprocess
import sys

import jax

from mgrad_jax import processes

ALONE = """
from mgrad_jax import processes
from mgrad_jax.errors import UserError
try:
    processes.connect()
except UserError as error:
    print(error)
"""


def test_a_process_that_no_launcher_started_says_what_to_do() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "PMI"))}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "no launcher that JAX knows (Slurm, Open MPI 4, ...) has started this process; use one, or give --coordinator, "
        "--processes and --process.\n"
    )


def test_a_process_that_was_looked_for_on_the_wrong_host_is_no_lost_one() -> None:
    refused = "INTERNAL: Gloo context initialization failed: [file.cc:1] timed out connecting: SO_ERROR: {}$3"
    there, here = (
        processes.lost(jax.errors.JaxRuntimeError(refused.format(f"remote=[{a}]:1"))) for a in ("10.1.0.2", "127.0.0.1")
    )
    hint = "; if it is on another host, have the name of every host lead to an address that others reach"
    assert here.endswith(hint)
    assert hint not in there
