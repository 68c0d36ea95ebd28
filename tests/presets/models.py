"""The same kinds of layers in each library: how to call them, and what their kernels are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from recipes_table import normal

KEY = jax.random.key(0)
CHANNELS = normal("image", (1, 5, 5, 4))  # as many as a kernel reads
SEQUENCE = normal("sequence", (1, 3, 6))


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer with one kernel, as a function of its parameters."""

    name: str
    model: Any  # what presets read
    inputs: tuple[Any, ...]  # for them
    params: Any
    kernel: str  # path
    apply: Callable[[Any, jax.Array], jax.Array]  # channels last
    x: jax.Array  # channels last
    read: int = 1  # trailing axes of x over which it contracts
    made: int = 1  # trailing axes of what it makes


def linen(name: str, module: nn.Module, x: jax.Array, **axes: int) -> Layer:
    params = module.init(KEY, x)["params"]
    apply = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
    return Layer(f"linen-{name}", module, (x,), params, "kernel", apply, x, **axes)


def of_nnx(name: str, module: nnx.Module, x: jax.Array, **axes: int) -> Layer:
    graph, params = nnx.split(module)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)

    return Layer(f"nnx-{name}", module, (), params, "kernel", apply, x, **axes)


def equinox(name: str, module: eqx.Module, x: jax.Array) -> Layer:
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        out = eqx.combine(params, static)(jnp.moveaxis(x[0], -1, 0))
        return jnp.moveaxis(out, 0, -1)[None]

    return Layer(f"equinox-{name}", module, (), params, "weight", apply, x)


def haiku(name: str, make: Callable[[], Any], x: jax.Array) -> Layer:
    model = hk.transform(lambda x: make()(x))
    params = model.init(KEY, x)
    (owner,) = params
    apply = lambda params, x: model.apply(params, None, x)  # noqa: E731
    return Layer(f"haiku-{name}", model, (x,), params, f"{owner}/w", apply, x)


def layers() -> list[Layer]:
    """Inputs and outputs of one length wherever a layer can have them: shapes then say nothing."""
    rngs, vector, image = nnx.Rngs(0), CHANNELS[0, 0], CHANNELS
    heads = normal("heads", (2, 4, 4))
    general = {"read": 1, "made": 2}, {"read": 2, "made": 1}
    into_heads, from_heads = general
    return [
        linen("dense", nn.Dense(4), vector),
        linen("heads", nn.DenseGeneral((4, 4)), vector, **into_heads),
        linen("from heads", nn.DenseGeneral(4, axis=(-2, -1)), heads, **from_heads),
        linen("einsum", nn.Einsum((4, 4, 4), "bc,cde->bde"), vector, **into_heads),
        linen("conv", nn.Conv(4, (3, 3)), image),
        linen("depthwise", nn.Conv(4, (3, 3), feature_group_count=4), image),
        linen("conv transpose", nn.ConvTranspose(4, (3, 3)), image),
        linen("transposed kernel", nn.ConvTranspose(4, (3, 3), transpose_kernel=True), image),
        of_nnx("linear", nnx.Linear(4, 4, rngs=rngs), vector),
        of_nnx("heads", nnx.LinearGeneral(4, (4, 4), rngs=rngs), vector, **into_heads),
        of_nnx(
            "from heads",
            nnx.LinearGeneral((4, 4), 4, axis=(-2, -1), rngs=rngs),
            heads,
            **from_heads,
        ),
        of_nnx("einsum", nnx.Einsum("bde,dec->bc", (4, 4, 4), rngs=rngs), heads, **from_heads),
        of_nnx("conv", nnx.Conv(4, 4, (3, 3), rngs=rngs), image),
        of_nnx("depthwise", nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs), image),
        of_nnx("conv transpose", nnx.ConvTranspose(4, 4, (3, 3), rngs=rngs), image),
        of_nnx(
            "transposed kernel",
            nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=True, rngs=rngs),
            image,
        ),
        equinox("linear", eqx.nn.Linear(4, 4, key=KEY), vector[:1]),
        equinox("conv", eqx.nn.Conv2d(4, 4, 3, key=KEY), image),
        equinox("depthwise", eqx.nn.Conv2d(4, 4, 3, groups=4, key=KEY), image),
        equinox("conv transpose", eqx.nn.ConvTranspose2d(4, 4, 3, key=KEY), image),
        haiku("linear", lambda: hk.Linear(4), vector),
        haiku("conv", lambda: hk.Conv2D(4, 3), image),
        haiku("depthwise", lambda: hk.DepthwiseConv2D(1, 3), image),
        haiku("conv transpose", lambda: hk.Conv2DTranspose(4, 3), image),
    ]
