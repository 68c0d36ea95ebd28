"""Eight host devices for the sharding tests, and double precision where a test asks for it."""

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)

# No deadline: the first example of each shape compiles. The same examples in every run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
