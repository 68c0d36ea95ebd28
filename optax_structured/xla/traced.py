"""A traced function whose outputs can be changed as soon as they are made."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from optax_structured.xla import jaxprs as core

Change = Callable[[jax.Array], jax.Array]


class Traced:
    """A function of flat lists of arrays, traced once.

    A change that is applied to an output after the call leaves two versions of the array: the
    output, and the one that the rest of the program reads. XLA then cannot write either of them
    over a donated buffer. With the moments of Adam restored leaf by leaf in this way, a step on a
    CPU takes 3 times as long and needs another copy of the state; with the changes applied where
    the moments are made, it takes 1.1 times as long and no memory (tests/transforms/
    test_nonfinite.py shows the memory).

    Args:
      function: of one list of arrays, which returns a list of arrays; it may close over others.
      inputs: concrete or abstract arrays.
    """

    def __init__(self, function: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
        traced = jax.make_jaxpr(function)(list(inputs))
        self._program, self._consts = traced.jaxpr, traced.consts

    def sources(self) -> list[set[int]]:
        """The inputs that each output depends on, by their positions.

        An operation depends on all of its operands, a loop or branch on everything in it.
        """
        found: dict[Any, set[int]] = {v: {i} for i, v in enumerate(self._program.invars)}
        for equation in self._program.eqns:
            read = set().union(*(found.get(v, set()) for v in core.variables(equation.invars)))
            found.update(dict.fromkeys(equation.outvars, read))
        outputs = self._program.outvars
        return [set() if isinstance(v, core.Literal) else found.get(v, set()) for v in outputs]

    def run(self, inputs: Sequence[Any], changes: Mapping[int, Change]) -> list[Any]:
        """The outputs, some of them changed; all that is computed from those reads them changed.

        Args:
          inputs: arrays like those that the function was traced with.
          changes: by the position of an output, its change.
        """
        program, outputs = self._program, self._program.outvars
        values: dict[Any, Any] = dict(zip(program.constvars, self._consts, strict=True))
        values.update(zip(program.invars, inputs, strict=True))
        known = [i for i in changes if not isinstance(outputs[i], core.Literal)]
        waiting = {outputs[i]: i for i in known[::-1]}
        done: set[int] = set()
        pending: list[Any] = []
        for equation in program.eqns:
            pending.append(equation)
            made = [v for v in equation.outvars if v in waiting]
            if made:
                core.evaluate(program, pending, values)
                pending = []
            for v in made:
                values[v] = changes[waiting[v]](values[v])
                done.add(waiting[v])
        core.evaluate(program, pending, values)
        found = [v.val if isinstance(v, core.Literal) else values[v] for v in outputs]
        rest = (changes.get(i) if i not in done else None for i in range(len(found)))
        return [x if change is None else change(x) for x, change in zip(found, rest, strict=True)]
