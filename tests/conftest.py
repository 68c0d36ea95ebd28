"""Eight host devices for the sharding tests, and double precision where a test asks for it."""

import gc
import itertools
import os
import pathlib

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)

# Most of the time goes to compiling programs that run a few steps each. Without LLVM's passes, and
# with the emitter of kernels that is quicker to set up, the suite takes half as long; XLA's own
# passes, which the tests look at, stay. jaxlib 0.11 has no such choice of emitters, and XLA aborts
# on flags that it does not know.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS[: 2 if jax.__version_info__ < (0, 11) else 1]))

# No deadline: the first example of each shape compiles. The same examples in every run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# Each program that XLA's CPU backend compiled holds memory maps, of which a process may have 65530.
_MAPS, _ENOUGH = pathlib.Path("/proc/self/maps"), 25_000
_tests_done = itertools.count()


@pytest.fixture(autouse=True)
def forget_programs():
    """Thousands of tests in one process would run into that limit, and XLA into a segfault."""
    yield
    if next(_tests_done) % 20 == 0 and _MAPS.exists():
        with _MAPS.open("rb") as lines:
            if sum(1 for _ in lines) > _ENOUGH:
                jax.clear_caches()
                gc.collect()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
