"""Settings every test runs under."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax
import pytest
from jaxtyping import install_import_hook

# Here and in every process that a test starts: tests neither read nor fill the user's cache of compiled programs.
os.environ["MGRAD_JAX_NO_CACHE"] = "1"

# Annotations, shapes included, are checked wherever the tests call the mathematics. The models stay out: the hook would
# answer a hyper-parameter of the wrong type before the configuration's own sentence does.
install_import_hook(
    ["mgrad_jax.models.losses", "mgrad_jax.dropout", "mgrad_jax.evaluation.metrics"], "beartype.beartype"
)

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile a program once, however many tests of this process ask for it."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def without_cache() -> Iterator[None]:
    """Run a test without the programs that others have compiled."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compile what is marked `quick_compilation` without LLVM's optimisations: half of the time of asking for equations.

    Before any fixture of the test, and with nothing compiled in the other way left: a helper that a test before has
    compiled differently rounds differently, which a run in another process would not.
    """
    quick = item.get_closest_marker("quick_compilation") is not None
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()


@pytest.fixture
def start_command() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start `mgrad-jax` in a process of its own, stderr piped; none outlives the test."""
    # Whoever starts the tests in the background may have them, and all they start, ignore Ctrl-C.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mgrad_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    started = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        arguments = [sys.executable, "-c", program, *command]
        started.append(subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
