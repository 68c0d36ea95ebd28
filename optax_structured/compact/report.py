"""What was cut, what is left, and what could not be cut for which reason."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optax_structured.compact.forward import is_known
from optax_structured.compact.plan import Plan
from optax_structured.compact.sets import Sets
from optax_structured.trees import named_leaves


@dataclasses.dataclass(frozen=True)
class Layer:
    """A leaf of the parameters before and after.

    Args:
      path: its name.
      before: its shape.
      after: the shape that is left.
      dead: slices that are zero and were cut, along each axis.
      blocked: slices that are zero and are still there, along each axis.
    """

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    dead: tuple[int, ...]
    blocked: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """Sizes before and after: pairs.

    Args:
      params: numbers of parameters.
      bytes: of the parameters.
      flops: of one call on the example inputs, as XLA counts them (the body of a loop once); None
        where it does not count.
      constants: numbers that the smaller program holds for constants that were added up.
      layers: one entry a leaf.
      unknown: primitives without a rule, which keep everything, and how often they are used.
    """

    params: tuple[int, int]
    bytes: tuple[int, int]
    flops: tuple[float | None, float | None]
    constants: int
    layers: tuple[Layer, ...]
    unknown: dict[str, int]

    @property
    def blocked(self) -> int:
        """Dead slices that could not be cut."""
        return sum(sum(layer.blocked) for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"compact: parameters {_pair(self.params)}, bytes {_pair(self.bytes)}"]
        if None not in self.flops:
            lines[0] += f", flops {_pair(self.flops)}"
        if self.params[0] == self.params[1]:
            lines.append("nothing is dead: the function and its parameters are the original ones")
        width = max((len(layer.path) for layer in self.layers), default=0)
        for x in self.layers:
            note = f"  blocked {x.blocked}" if any(x.blocked) else ""
            lines.append(f"  {x.path:<{width}}  {x.before} -> {x.after}{note}")
        if self.unknown:
            names = ", ".join(f"{name} ({n})" for name, n in self.unknown.items())
            lines.append(f"  kept whole, because no rule knows them: {names}")
        return "\n".join(lines)


def _pair(values: tuple[Any, Any]) -> str:
    return " -> ".join(f"{x:,.0f}" for x in values)


def report(
    fn: Callable[..., Any],
    params: Any,
    smaller: Callable[..., Any],
    small: Any,
    inputs: Any,
    plan: Plan,
) -> Report:
    """Compares a function with its smaller form."""
    leaves, cut = named_leaves(params), jax.tree.leaves(small)
    blocks = [plan.kept[v] for v in plan.program.inputs[: len(cut)]]
    layers = [
        _layer(path, np.asarray(leaf), after, sets)
        for (path, leaf), after, sets in zip(leaves, cut, blocks, strict=True)
    ]
    names: dict[str, int] = {}
    for place in plan.run:
        equation = plan.program.equations[place]
        if equation.inputs and not is_known(equation.name):
            names[equation.name] = names.get(equation.name, 0) + 1
    before = [leaf for _, leaf in leaves]
    return Report(
        params=(sum(x.size for x in before), sum(x.size for x in cut)),
        bytes=(sum(x.nbytes for x in before), sum(x.nbytes for x in cut)),
        flops=(_flops(fn, params, inputs), _flops(smaller, small, inputs)),
        constants=sum(x.constant.size for x in plan.folded.values()),
        layers=tuple(layers),
        unknown=names,
    )


def _layer(path: str, leaf: np.ndarray, after: Any, sets: Sets | None) -> Layer:
    dead, blocked = [], []
    for k in range(leaf.ndim):
        other = tuple(j for j in range(leaf.ndim) if j != k)
        zero = ~(leaf != 0).any(axis=other)
        dead.append(int(zero.sum()))
        blocked.append(int(zero[sets[k]].sum()) if sets is not None else 0)
    cut = tuple(d - b for d, b in zip(dead, blocked, strict=True))
    return Layer(path, leaf.shape, after.shape, cut, tuple(blocked))


def _flops(fn: Callable[..., Any], params: Any, inputs: Any) -> float | None:
    cost = jax.jit(fn).lower(params, *inputs).cost_analysis()
    return float(cost.get("flops", 0.0)) if cost is not None else None
