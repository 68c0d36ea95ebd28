"""What processes that tests start are given."""

import os


def host_devices(count):
    """An environment of so many devices, that compiles as quickly as the tests do."""
    return {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}",
        "JAX_PLATFORMS": "cpu",
    }
