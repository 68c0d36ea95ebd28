"""Kernels of Haiku modules, found while the function is initialised abstractly."""

from typing import Any

import jax

from optax_structured.presets.kernels import Core, of_convolution
from optax_structured.presets.watched import Cores, watched
from optax_structured.trees import named_leaves


def found(
    model: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, dict[str, Core]]:
    """The abstract parameters, and the layers that are known by the path of their kernel."""
    import haiku as hk

    def layers(module: Any, *_: Any) -> Cores:
        for path, weight in module.params_dict().items():
            name = path.removeprefix(f"{module.module_name}/")
            yield path, _core(module, name, weight.shape)

    def init(*inputs: Any) -> Any:
        return model.init(jax.random.key(0), *inputs, **named)

    made, cores = watched(hk.intercept_methods, init, inputs, layers)
    params = made[0] if isinstance(made, tuple) else made
    for path, _ in named_leaves(params):  # a layer stack calls its layers by their inner names
        stack, _, inner = path.partition("/")
        if stack.startswith("__layer_stack") and inner in cores:
            cores[path] = cores[inner]
    return params, cores


def _core(module: Any, name: str, shape: tuple[int, ...]) -> Core | None:
    import haiku as hk

    layer = type(module).__name__
    if name == "w" and isinstance(module, hk.Linear):
        return Core(layer, shape, (0,), (1,))
    if name in ("w_i", "w_h") and isinstance(module, hk.GRU):
        return Core(layer, shape, (0,), (1,))
    if name == "w" and isinstance(module, hk.ConvND):
        return of_convolution(layer, shape, -2, -1, module.feature_group_count)
    if name == "w" and isinstance(module, hk.ConvNDTranspose):
        return of_convolution(layer, shape, -1, -2)
    if name == "w" and isinstance(module, hk.DepthwiseConv2D):
        return of_convolution(layer, shape, -2, -1, groups=shape[-1] // module.channel_multiplier)
    return None
