"""What was cut, what is left, and what could not be cut for which reason."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from optax_structured.compact.factors import is_factors
from optax_structured.compact.forward import is_known
from optax_structured.compact.plan import Plan
from optax_structured.compact.program import Equation, flat
from optax_structured.compact.stuck import Stuck, stuck
from optax_structured.trees import named_leaves
from optax_structured.weights import Factors
from optax_structured.xla import jaxprs as core

_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Layer:
    """A leaf of the parameters before and after.

    Args:
      path: its name.
      before: its shape.
      after: the shape that is left.
      dead: slices that are zero, along each axis.
      size: numbers of parameters before and after.
      rank: of a leaf that is kept as two factors; None for all others.
    """

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    dead: tuple[int, ...]
    size: tuple[int, int]
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Sizes before and after: pairs.

    Args:
      params: numbers of parameters.
      bytes: of the parameters.
      flops: of one call on the example inputs, as XLA counts them, every step of a `lax.scan`;
        None where it does not count.
      constants: numbers that the smaller program holds for constants that were added up.
      layers: one entry per leaf.
      stuck: dead slices whose unit is still there, and why.
      unknown: primitives without a rule, which keep everything, and how often they are used.
      seconds: of one call, the fastest of ten; None where it was not measured.
    """

    params: tuple[int, int]
    bytes: tuple[int, int]
    flops: tuple[float | None, float | None]
    constants: int
    layers: tuple[Layer, ...]
    stuck: tuple[Stuck, ...]
    unknown: dict[str, int]
    seconds: tuple[float, float] | None = None

    @property
    def blocked(self) -> int:
        """Dead slices whose unit could not be cut."""
        return sum(x.count for x in self.stuck)

    @property
    def features(self) -> dict[str, tuple[int, int]]:
        """Output features of each layer with a kernel, before and after.

        For a smaller module built by hand: of linen and nnx, where a layer's kernel is the leaf
        `kernel` (of an embedding `embedding`) and its last axis has the features. Attention has
        `(heads, size)` there; see `layers`.
        """
        found = {}
        for layer in self.layers:
            module, _, name = layer.path.rpartition("/")
            if name in ("kernel", "embedding") and layer.before:
                found[module] = (layer.before[-1], layer.after[-1])
        return found

    def __str__(self) -> str:
        lines = [f"compact: parameters {_pair(self.params)}, bytes {_pair(self.bytes)}"]
        if None not in self.flops:
            lines[0] += f", flops {_pair(self.flops)}"
        if self.seconds is not None:
            before, after = (f"{1e3 * x:.3g} ms" for x in self.seconds)
            lines[0] += f", time {before} -> {after}"
        if self.params[0] == self.params[1] and self.flops[0] == self.flops[1]:
            lines.append("nothing is dead: the function and its parameters are the original ones")
        width = max((len(layer.path) for layer in self.layers), default=0)
        for x in self.layers:
            rank = f" of rank {x.rank}" if x.rank is not None else ""
            lines.append(f"  {x.path:<{width}}  {x.before} -> {x.after}{rank}")
        lines += [f"  not cut: {x}" for x in self.stuck]
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
    named, cut = named_leaves(params), jax.tree.leaves(small, is_leaf=is_factors)
    layers = [_layer(*pair, after) for pair, after in zip(named, cut, strict=True)]
    names: dict[str, int] = {}
    for equation in _left(plan):
        if equation.inputs and not is_known(equation.name):
            names[equation.name] = names.get(equation.name, 0) + 1
    before, after = [leaf for _, leaf in named], jax.tree.leaves(small)
    return Report(
        params=(sum(x.size for x in before), sum(x.size for x in after)),
        bytes=(sum(x.nbytes for x in before), sum(x.nbytes for x in after)),
        flops=(_flops(fn, params, inputs), _flops(smaller, small, inputs)),
        constants=sum(x.constant.size for x in plan.folded.values()),
        layers=tuple(layers),
        stuck=stuck(plan, named),
        unknown=names,
    )


def _left(plan: Plan) -> Iterator[Equation]:
    """The equations that are computed, those of the bodies of loops instead of the loops."""
    for place in plan.run:
        if place in plan.loops:
            yield from _left(plan.loops[place][1].plan)
        else:
            yield plan.program.equations[place]


def _layer(path: str, leaf: Any, after: Any) -> Layer:
    dead = []
    for k in range(leaf.ndim):
        other = tuple(j for j in range(leaf.ndim) if j != k)
        dead.append(int((~(np.asarray(leaf) != 0).any(axis=other)).sum()))
    rank = after.left.shape[-1] if isinstance(after, Factors) else None
    left = sum(x.size for x in jax.tree.leaves(after))
    return Layer(path, leaf.shape, after.shape, tuple(dead), (leaf.size, left), rank)


def _flops(fn: Callable[..., Any], params: Any, inputs: Any) -> float | None:
    return _all_steps(jax.make_jaxpr(fn)(params, *inputs))


def _all_steps(closed: Any) -> float | None:
    """What XLA counts, which is the body of a loop once, and the other steps."""
    found = _counted(closed)
    for equation in flat(closed).equations:
        if equation.name == "scan":
            body = equation.params["jaxpr"]
            once, whole = _counted(body), _all_steps(body)
            if found is None or once is None or whole is None:
                return None
            found += equation.params["length"] * whole - once
    return found


def _counted(closed: Any) -> float | None:
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in closed.in_avals]
    cost = jax.jit(core.jaxpr_as_fun(closed)).lower(*inputs).cost_analysis()
    return float(cost.get("flops", 0.0)) if cost is not None else None


def timed(
    pairs: tuple[tuple[Callable[..., Any], Any], tuple[Callable[..., Any], Any]], inputs: Any
) -> tuple[float, float]:
    """Seconds of one call of two compiled functions of parameters, in turns: the fastest of ten."""
    runs = [jax.jit(fn).lower(params, *inputs).compile() for fn, params in pairs]
    best = [float("inf"), float("inf")]
    for _ in range(_REPEATS):
        for i, ((_, params), run) in enumerate(zip(pairs, runs, strict=True)):
            start = time.perf_counter()
            jax.block_until_ready(run(params, *inputs))
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]
