"""The kernels of a model: which axes of a leaf read inputs, and which make outputs."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_structured.trees import named_leaves


class Core(NamedTuple):
    """A kernel as its layer knows it, without the axes along which layers may be stacked."""

    layer: str  # its class
    shape: tuple[int, ...]
    inputs: tuple[int, ...]  # axes over which it contracts
    outputs: tuple[int, ...]  # axes that number what it makes
    window: tuple[int, ...] = ()  # of a convolution
    heads: tuple[int, ...] = ()  # the axis of attention heads, one of the inputs or outputs
    groups: int = 1  # of a convolution: its input axis is that of one group


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a model, and what its axes are."""

    path: str  # "/"-joined name of the leaf
    shape: tuple[int, ...]
    layer: str  # class of the layer
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    window: tuple[int, ...]
    heads: tuple[int, ...]
    batch: tuple[int, ...]  # independent copies: stacked layers, what an einsum goes over
    groups: int  # of a convolution: its input axis is that of one group

    @property
    def linear(self) -> bool:
        """Whether it is one matrix (or a stack of them), as of dense layers and attention."""
        return not self.window and self.groups == 1


def placed(cores: Iterable[tuple[str, Core]], params: Any) -> tuple[Kernel, ...]:
    """The kernels of a tree of parameters, in its order; its leaves may stack the cores.

    A path of `cores` that is no leaf is passed over.

    Raises:
      ValueError: a leaf whose shape is not that of its core with axes added.
    """
    known = dict(cores)
    return tuple(
        _placed(path, known[path], tuple(np.shape(leaf)))
        for path, leaf in named_leaves(params)
        if path in known
    )


def _placed(path: str, core: Core, shape: tuple[int, ...]) -> Kernel:
    stack = _stack(path, core, shape)
    rest = [axis for axis in range(len(shape)) if axis not in stack]
    moved = [tuple(rest[axis] for axis in axes) for axes in core[2:6]]
    inputs, outputs, window, heads = moved
    batch = tuple(axis for axis in range(len(shape)) if axis not in inputs + outputs + window)
    return Kernel(path, shape, core.layer, inputs, outputs, window, heads, batch, core.groups)


def _stack(path: str, core: Core, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of a leaf that its core does not have: leading ones, or one anywhere."""
    extra = len(shape) - len(core.shape)
    if extra >= 0 and tuple(shape[extra:]) == core.shape:
        return tuple(range(extra))
    elsewhere = [
        at for at in range(len(shape)) if (*shape[:at], *shape[at + 1 :]) == tuple(core.shape)
    ]
    if len(elsewhere) != 1:
        raise ValueError(
            f"presets: {path!r} has shape {tuple(shape)}, its {core.layer} {core.shape}: write the "
            "rule of this leaf by hand"
        )
    return (elsewhere[0],)


def of_einsum(layer: str, equation: str, shape: Sequence[int]) -> Core | None:
    """The kernel that is the second operand of an einsum; None where it is summed alone."""
    operands, _, made = equation.replace(" ", "").replace("...", "").partition("->")
    read, kernel = operands.split(",")
    if any(letter not in read + made for letter in kernel):
        return None
    axes = range(len(kernel))
    inputs = tuple(i for i in axes if kernel[i] not in made)
    outputs = tuple(i for i in axes if kernel[i] not in read)
    return Core(layer, tuple(shape), inputs, outputs) if inputs and outputs else None


def of_convolution(
    layer: str, shape: Sequence[int], inputs: int, outputs: int, groups: int = 1
) -> Core:
    """A convolution whose input and output channels are these axes, negative or not."""
    ndim = len(shape)
    ends = (inputs % ndim, outputs % ndim)
    window = tuple(axis for axis in range(ndim) if axis not in ends)
    return Core(layer, tuple(shape), ends[:1], ends[1:], window, groups=groups)
