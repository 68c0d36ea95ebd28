"""`jax.extend.core`, loaded where a program is first taken apart: with it comes all of Pallas."""

from typing import Any


def __getattr__(name: str) -> Any:
    from jax.extend import core

    return getattr(core, name)
