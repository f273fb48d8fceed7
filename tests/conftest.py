"""Settings every test runs under."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax
import pytest
from jaxtyping import install_import_hook
from type_checks import CHECKED

# Here and in every process that a test starts: tests neither read nor fill the user's cache of compiled programs.
os.environ["MGRAD_JAX_NO_CACHE"] = "1"

# Here and in every process that a test starts: compiling is most of what tests do, and without optimisations it takes a
# third of the time. `XLA_FLAGS= pytest` compiles as users do.
_QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # later versions know no other emitters, and end at a flag that they do not know
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK))

# Tracing makes many objects and few cycles; looking for these all the time took a seventeenth of it.
gc.disable()

# What is printed is compared as it reads in a file, not as in whatever terminal or service the tests were started in.
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "GITHUB_ACTIONS"):
    os.environ.pop(_name, None)

# Annotations, shapes included, are checked wherever the tests call a module that states shapes.
install_import_hook([f"mgrad_jax.{name}" for name in CHECKED], "type_checks.functions")

jax.config.update("jax_numpy_rank_promotion", "raise")

# Nobody reads which line an operation of a compiled program is from, and finding out took a thirtieth of the time.
jax.config.update("jax_traceback_in_locations_limit", 0)

# As many as the tests of several devices need, on one processor; whoever asks for none uses the first.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the last files are short, and no worker waits long for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile a program once, however many tests of this process ask for it."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module", autouse=True)
def garbage() -> Iterator[None]:
    """Collect what a file leaves behind once, at its end; what survives it is not looked at again."""
    yield
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Have signals to stop do what they usually do, here and in processes that the test starts.

    Whoever starts the tests in the background, or under `nohup`, may have them ignored.
    """
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def start_command(usual_signals: None) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `mgrad-jax` in a process of its own, after some lines of Python, stderr piped; none outlives the test."""
    program = "import sys\nfrom mgrad_jax.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    started = []

    def start(command: list[str], before: str = "") -> subprocess.Popen[str]:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        arguments = [sys.executable, "-c", before + program, *command]
        started.append(subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
