"""Running a function output by output, its inputs made only when they are needed."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.xla import jaxprs as core
from optax_structured.xla.entrywise import Shape, evaluate, is_entrywise, value_of

Make = Callable[[bool], Any]  # an input; in blocks or in its own shape
InBlocks = Callable[[jax.Array], jax.Array]


class InTurn:
    """A traced function whose outputs are computed a few at a time, in an order of our choice.

    What several outputs need is computed once. So a state that is decoded leaf by leaf is never
    decoded as a whole, whatever the transformation between: it is traced once, as a whole, and
    each leaf then runs the operations that it depends on and that did not run yet. Callbacks,
    checks and other effects run once each and in their order, whether or not an output needs them.

    Args:
      function: of positional arguments; what else it reads, it may close over.
      arguments: trees of abstract or concrete arrays.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        traced, self.shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        self._program = traced.jaxpr
        self._values: dict[Any, Any] = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        self._makers: dict[Any, int] = {}
        self._effects = [i for i, e in enumerate(traced.jaxpr.eqns) if e.effects]  # still to run
        for i, equation in enumerate(traced.jaxpr.eqns):
            self._makers.update(dict.fromkeys(equation.outvars, i))
        self._inputs: dict[Any, Make] = {}

    def reads(self, inputs: Sequence[Make]) -> None:
        """Says how to make each leaf of the arguments when it is first needed."""
        self._inputs = dict(zip(self._program.invars, inputs, strict=True))

    def run(self, outputs: Sequence[int]) -> list[Any]:
        """The values of some leaves of the output."""
        wanted = [self._program.outvars[i] for i in outputs]
        equations, inputs = self._slice(wanted)
        for v in inputs:
            self._values[v] = self._inputs[v](False)
        self._evaluate(equations)
        return [value_of(v, self._values) for v in wanted]

    def finish(self) -> None:
        """Runs the effects that no output needed."""
        equations, inputs = self._slice((), effects=self._effects)
        for v in inputs:
            self._values[v] = self._inputs[v](False)
        self._evaluate(equations)

    def is_entrywise(self, outputs: Sequence[int], shape: Shape) -> bool:
        """Whether outputs have this shape, and no entry of them depends on another one."""
        wanted = [self._program.outvars[i] for i in outputs]
        if any(isinstance(v, core.Literal) or v.aval.shape != shape for v in wanted):
            return False
        return is_entrywise(self._slice(wanted)[0], shape)

    def run_in_blocks(
        self, outputs: Sequence[int], shape: Shape, in_blocks: InBlocks
    ) -> Iterator[jax.Array]:
        """The values, in blocks, of outputs that are entrywise: one after the other.

        What several of them compute is computed once, but each makes its own inputs. XLA makes
        better loops of arrays in blocks: their scales stay in place while a block lasts.
        """
        made: dict[Any, jax.Array] = {}
        for wanted in (self._program.outvars[i] for i in outputs):
            equations, inputs = self._slice([wanted], made)
            for v in inputs:
                if v.aval.shape == ():
                    self._values[v] = self._inputs[v](False)
            of_scalars = [e for e in equations if all(v.aval.shape == () for v in e.outvars)]
            self._evaluate(of_scalars)
            equations = [e for e in equations if e not in of_scalars]
            values = made | {v: self._inputs[v](True) for v in inputs if v.aval.shape != ()}
            new = {v for e in equations for v in e.outvars}
            for v in (wanted, *(v for e in equations for v in e.invars)):
                if isinstance(v, core.Literal) or v in values or v in new:
                    continue
                values[v] = self._values[v] if v.aval.shape == () else in_blocks(self._values[v])
            model = next(x for x in values.values() if jnp.ndim(x))
            evaluate(equations, values, shape, model)
            made.update((v, values[v]) for v in new)
            yield values[wanted]

    def _slice(
        self, wanted: Sequence[Any], known: Container[Any] = (), effects: Sequence[int] = ()
    ) -> tuple[list[Any], list[Any]]:
        """The equations that are still to run for some variables, and the inputs to make."""
        due: set[int] = set()
        inputs: dict[Any, None] = {}
        pending = [v for v in wanted if not isinstance(v, core.Literal)]

        def add(i: int) -> None:
            if i not in due:
                due.add(i)
                operands = self._program.eqns[i].invars
                pending.extend(v for v in operands if not isinstance(v, core.Literal))

        for i in effects:
            add(i)
        while pending:
            variable = pending.pop()
            if variable in self._values or variable in known:
                continue
            if variable in self._inputs:
                inputs[variable] = None
            else:
                maker = self._makers[variable]
                add(maker)
                if maker in self._effects:
                    for earlier in self._effects[: self._effects.index(maker)]:
                        add(earlier)
        return [self._program.eqns[i] for i in sorted(due)], list(inputs)

    def _evaluate(self, equations: list[Any]) -> None:
        if not equations:
            return
        made = [v for e in equations for v in e.outvars if not isinstance(v, core.DropVar)]
        new = set(made)
        operands = (v for e in equations for v in e.invars if not isinstance(v, core.Literal))
        used = dict.fromkeys(v for v in operands if v not in new)
        part = self._program.replace(constvars=[], invars=list(used), outvars=made, eqns=equations)
        run = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))
        self._values.update(zip(made, run(*(self._values[v] for v in used)), strict=True))
        if self._effects:
            ran = {id(e) for e in equations}
            self._effects = [i for i in self._effects if id(self._program.eqns[i]) not in ran]
