"""Kernels of Equinox modules."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.presets.kernels import Core, of_convolution
from optax_structured.trees import path_name


def params_of(model: Any) -> Any:
    """All arrays that have gradients, concrete or abstract."""
    import equinox as eqx

    return eqx.filter(model, lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact))


def cores(model: Any) -> Iterator[tuple[str, Core]]:
    """`(path, Core)` of the layers that are known."""
    import equinox as eqx

    known = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.GRUCell, eqx.nn.LSTMCell)
    layers = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, known))
    for path, layer in layers:
        for name, core in _cores(layer):
            yield path_name((*path, jax.tree_util.GetAttrKey(name))), core


def _cores(module: Any) -> Iterator[tuple[str, Core]]:
    import equinox as eqx

    layer = type(module).__name__
    if isinstance(module, eqx.nn.Linear):
        made, read = (1 if n == "scalar" else n for n in (module.out_features, module.in_features))
        yield "weight", Core(layer, (made, read), (1,), (0,))
    elif isinstance(module, eqx.nn.Conv | eqx.nn.ConvTranspose):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        yield "weight", of_convolution(layer, shape, 1, 0, module.groups)
    elif isinstance(module, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        gates = 3 if isinstance(module, eqx.nn.GRUCell) else 4
        for name, read in (("weight_ih", module.input_size), ("weight_hh", module.hidden_size)):
            yield name, Core(layer, (gates * module.hidden_size, read), (1,), (0,))
