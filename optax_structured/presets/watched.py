"""Finding the layers of a model that makes them when it is called: linen and haiku."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from optax_structured.presets.kernels import Core

Cores = Iterable[tuple[str, Core | None]]


def watched(
    intercept: Callable[..., Any],
    init: Callable[..., Any],
    inputs: tuple[Any, ...],
    layers: Callable[[Any, Any, Any], Cores],
) -> tuple[Any, dict[str, Core]]:
    """What `init` makes of the inputs, abstract, and the known layers by the path of their kernel.

    `intercept` is `intercept_methods` of the library; `layers(module, args, kwargs)` gives the
    kernels of a module that was called.
    """
    cores: dict[str, Core] = {}

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            found = layers(context.module, args, kwargs)
            cores.update((path, core) for path, core in found if core is not None)
        return result

    def run(*inputs: Any) -> Any:
        with intercept(look):
            return init(*inputs)

    return jax.eval_shape(run, *inputs), cores
