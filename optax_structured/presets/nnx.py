"""Kernels of Flax nnx modules."""

from collections.abc import Iterator
from typing import Any

from optax_structured.presets.kernels import Core, of_convolution, of_einsum


def params_of(model: Any) -> Any:
    """All parameters."""
    from flax import nnx

    return nnx.state(model, nnx.Param)


def cores(model: Any) -> Iterator[tuple[str, Core]]:
    """`(path, Core)` of the layers that are known."""
    from flax import nnx

    parents = dict(nnx.iter_modules(model))
    for path, module in parents.items():
        heads = isinstance(parents.get(path[:-1]), nnx.MultiHeadAttention)
        core = _core(module, heads)
        if core is not None:
            yield "/".join(map(str, (*path, "kernel"))), core


def _core(module: Any, heads: bool) -> Core | None:
    from flax import nnx

    layer = type(module).__name__
    if isinstance(module, nnx.Linear):
        return Core(layer, (module.in_features, module.out_features), (0,), (1,))
    if isinstance(module, nnx.LinearGeneral):
        batch, read, made = (
            tuple(x) for x in (module.batch_axis.values(), module.in_features, module.out_features)
        )
        return general(layer, batch, read, made, heads)
    if isinstance(module, nnx.Einsum):
        return of_einsum(layer, module.einsum_str, module.kernel_shape)
    if isinstance(module, nnx.Conv):
        return of_convolution(layer, module.kernel_shape, -2, -1, module.feature_group_count)
    if isinstance(module, nnx.ConvTranspose):
        ends = (-1, -2) if module.transpose_kernel else (-2, -1)
        return of_convolution(layer, module.kernel_shape, *ends)
    return None


def general(
    layer: str,
    batch: tuple[int, ...],
    read: tuple[int, ...],
    made: tuple[int, ...],
    heads: bool,
) -> Core:
    """A kernel (*batch, *inputs, *outputs); of attention, the longer end is (heads, size)."""
    start, end = len(batch), len(batch) + len(read)
    inputs, outputs = tuple(range(start, end)), tuple(range(end, end + len(made)))
    of_heads = () if not heads else outputs[:1] if len(made) > len(read) else inputs[:1]
    return Core(layer, (*batch, *read, *made), inputs, outputs, heads=of_heads)
