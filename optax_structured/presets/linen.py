"""Kernels of Flax linen modules, found while the module is initialised abstractly."""

from typing import Any

import jax

from optax_structured.presets.kernels import Core, of_convolution, of_einsum
from optax_structured.presets.nnx import general
from optax_structured.presets.watched import Cores, watched


def found(
    model: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, dict[str, Core]]:
    """The abstract parameters, and the layers that are known by the path of their kernel."""
    from flax import linen as nn

    def layers(module: Any, args: Any, kwargs: Any) -> Cores:
        if module.has_variable("params", "kernel"):
            shape = module.get_variable("params", "kernel").shape
            yield "/".join((*module.path, "kernel")), _core(module, shape, args, kwargs)

    def init(*inputs: Any) -> Any:
        key = jax.random.key(0)
        return model.init({"params": key, "dropout": key}, *inputs, **named)

    variables, cores = watched(nn.intercept_methods, init, inputs, layers)
    return nn.unbox(variables).get("params", {}), cores


def _core(module: Any, shape: tuple[int, ...], args: Any, kwargs: Any) -> Core | None:
    from flax import linen as nn

    layer = type(module).__name__
    if isinstance(module, nn.Dense | nn.recurrent.DenseParams):
        return Core(layer, shape, (0,), (1,))
    if isinstance(module, nn.DenseGeneral):
        first, last = len(_many(module.batch_dims)), len(shape) - len(_many(module.features))
        heads = isinstance(module.parent, nn.MultiHeadDotProductAttention)
        return general(layer, shape[:first], shape[first:last], shape[last:], heads)
    if isinstance(module, nn.Einsum):
        given = dict(zip(("inputs", "einsum_str"), args, strict=False)) | kwargs
        equation: Any = given.get("einsum_str") or module.einsum_str
        return of_einsum(layer, equation, shape)
    if isinstance(module, nn.Conv):
        return of_convolution(layer, shape, -2, -1, module.feature_group_count)
    if isinstance(module, nn.ConvTranspose):
        ends = (-1, -2) if module.transpose_kernel else (-2, -1)
        return of_convolution(layer, shape, *ends)
    return None


def _many(given: Any) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given)
