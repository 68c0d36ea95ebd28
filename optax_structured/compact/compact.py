"""The same function with everything dead cut away."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.compact.evaluation import evaluate
from optax_structured.compact.factors import is_factors
from optax_structured.compact.low_rank import factored
from optax_structured.compact.plan import Plan, facts, plan
from optax_structured.compact.program import trace
from optax_structured.compact.report import Report, report, timed
from optax_structured.compact.sets import Sets, everything, is_everything


@dataclasses.dataclass(frozen=True, eq=False)
class Compacted:
    """A smaller program.

    Args:
      fn: of (params, *inputs), as the original; any JAX transformation applies to it. For inputs of
        other shapes than the example's it is planned again, when it is traced.
      params: those of the original without their dead slices, in the same tree; a leaf that nothing
        reads has axes of length 0, and one of low rank is `oxs.weights.Factors`.
      report: what was cut, and what was not.
    """

    fn: Callable[..., Any]
    params: Any
    report: Report


def compact(
    fn: Callable[..., Any], params: Any, *inputs: Any, unroll: bool = False, measure: bool = False
) -> Compacted:
    r"""Cuts from a function what its parameters make dead; nothing that it returns changes.

    .. math:: g(\theta', x) = f(\theta, x) \quad\text{for all } x

    The function is traced to its equations. Forward, it is found which slices of every value,
    along each axis, are the same for all inputs: zero, or a constant such as relu of a bias.
    Backward, it is found which slices anybody needs: zero rows of a kernel free the units that they
    read, through bias, activation, pooling, reshapes, residual sums and attention. Every equation
    is then computed at the shape that is left. Constants are added up where they are read. A kernel
    of a rank so low that two small products take fewer operations than one is kept as two factors.
    A primitive without a rule keeps everything it reads and makes: the result can only be less
    small, never wrong.

    Args:
      fn: of (params, *inputs), pure and traceable; linen's `apply`, nnx after `nnx.split`, equinox
        after `eqx.partition`, or plain.
      params: tree of arrays with exact zeros (`== 0`), such as a proximal recipe ends in.
      *inputs: an example of the other arguments, arrays or `jax.ShapeDtypeStruct`.
      unroll: write the steps of every `lax.scan` out, if that saves at least a percent of the
        operations. A scan that stays has one body, with what is alive in any of its layers;
        written out, every layer is cut by itself, and takes longer to compile. A stacked leaf keeps
        what is alive in any layer.
      measure: compile both functions and time them on the inputs, for the report; nothing to time
        where nothing is cut.

    Returns:
      `Compacted(fn, params, report)`. Without anything dead it holds `fn` and `params` themselves.

    Raises:
      TypeError: the function needs the numbers of its arguments in Python.

    The result equals the original up to rounding, as sums are taken over fewer zeros, for inputs of
    which all values of the original are finite (0 times infinity is taken as 0). Parameters may be
    trained further: what was cut stays away, and constants that were added up stay as they are.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> def mlp(params, x):
      ...     return jnp.maximum(x @ params["a"] + params["b"], 0) @ params["c"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones(4), "c": jnp.ones((4, 2)).at[1:].set(0)}
      >>> x = jnp.arange(15.0).reshape(5, 3)
      >>> small = oxs.compact.compact(mlp, params, x)
      >>> {name: leaf.shape for name, leaf in small.params.items()}
      {'a': (3, 1), 'b': (1,), 'c': (1, 2)}
      >>> print(jnp.allclose(small.fn(small.params, x), mlp(params, x)))
      True
      >>> print(small.report)
      compact: parameters 24 -> 6, bytes 96 -> 24, flops ...
        a  (3, 4) -> (3, 1)
        b  (4,) -> (1,)
        c  (4, 2) -> (1, 2)
    """
    made = _smaller(fn, params, inputs, unroll=False)
    if unroll:
        flat = _smaller(fn, params, inputs, unroll=True)
        (_, loop), (_, written_out) = made.report.flops, flat.report.flops
        # Counting its steps costs a loop a few operations, too.
        made = flat if (written_out or 0) < 0.99 * (loop or 0) else made
    if not measure or made.fn is fn:
        return made
    example = jax.tree.map(lambda x: jnp.asarray(_example(x)), inputs)
    seconds = timed(((fn, params), (made.fn, made.params)), example)
    return dataclasses.replace(made, report=dataclasses.replace(made.report, seconds=seconds))


def _smaller(fn: Callable[..., Any], params: Any, inputs: Any, unroll: bool) -> Compacted:
    first = _Planned(fn, params, inputs, None, unroll)
    leaves = jax.tree.leaves(params)
    tree: Any = jax.tree.structure(params)
    cut = [_cut(leaf, sets) for leaf, sets in zip(leaves, first.blocks, strict=True)]
    cut = factored(first.plan, cut)
    same = (x.shape == jnp.shape(y) and not is_factors(x) for x, y in zip(cut, leaves, strict=True))
    # Written out, single layers may be smaller though every unit is alive in one of them.
    if not unroll and all(same):
        return Compacted(fn, params, report(fn, params, fn, params, inputs, first.plan))
    planned = {_shapes(inputs): first}
    small = jax.tree.unflatten(tree, cut)
    form = _shapes(small, dtypes=False)

    def smaller(params: Any, *inputs: Any) -> Any:
        if _shapes(params, dtypes=False) != form:
            raise ValueError(
                "compact: these are not parameters of the smaller function; give it `.params` of "
                "the result, or a tree with the same shapes"
            )
        key = _shapes(inputs)
        if key not in planned:
            example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
            original = jax.tree.unflatten(tree, leaves)
            planned[key] = _Planned(fn, original, example, first.blocks, unroll)
        return planned[key].run(jax.tree.leaves(params, is_leaf=is_factors), inputs)

    return Compacted(smaller, small, report(fn, params, smaller, small, inputs, first.plan))


class _Planned:
    """A function and its plan for inputs of some shapes."""

    plan: Plan

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        inputs: Any,
        blocks: list[Sets | None] | None,
        unroll: bool,
    ) -> None:
        leaves, given = jax.tree.leaves(params), [_example(x) for x in jax.tree.leaves(inputs)]
        program, self._out = trace(fn, params, *inputs, unroll=unroll)
        settled: dict[int, Sets | None] = {
            v: everything(program.shape(v)) for v in program.inputs[len(leaves) :]
        }
        settled.update(zip(program.inputs, blocks or (), strict=False))
        with jax.ensure_compile_time_eval():  # also where the smaller function is being traced
            self.plan = plan(program, facts(program, leaves, given), settled)
        self.blocks = [self.plan.kept[v] for v in program.inputs[: len(leaves)]]

    def run(self, params: list[Any], inputs: Any) -> Any:
        made = evaluate(self.plan, params, jax.tree.leaves(inputs))
        return jax.tree.unflatten(self._out, made)


def _cut(leaf: Any, sets: Sets | None) -> Any:
    if not jnp.ndim(leaf):
        return jnp.asarray(leaf)
    if sets is None:
        return jnp.zeros((0,) * leaf.ndim, leaf.dtype)
    return leaf if is_everything(sets, leaf.shape) else jnp.asarray(np.asarray(leaf)[np.ix_(*sets)])


def _example(x: Any) -> Any:
    """Numbers for an input of which only the shape is given: away from 0, no two alike."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return np.zeros(x.shape, x.dtype)
    return np.random.default_rng(0).uniform(0.25, 0.75, x.shape).astype(x.dtype)


def _shapes(inputs: Any, dtypes: bool = True) -> Any:
    leaves, tree = jax.tree.flatten(inputs)
    return tree, tuple((jnp.shape(x), jnp.result_type(x) if dtypes else None) for x in leaves)
