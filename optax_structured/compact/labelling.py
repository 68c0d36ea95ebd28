"""The units of a program, with those axes followed at its reshapes that keep most of them."""

from collections.abc import Sequence

from optax_structured.compact import unit_rules
from optax_structured.compact.program import Program
from optax_structured.compact.units import Units, Value, fixed, of_leaf

OUTPUT = "output"


def labelled(program: Program, shapes: Sequence[tuple[int, ...]]) -> tuple[Units, list[Value]]:
    """The labels, with choices of axes that keep as many units as can be."""
    choices: dict[int, int] = {}
    units, leaves = _tried(program, shapes, choices)
    site = 0
    while site < len(units.sites):
        for other in range(1, units.sites[site].candidates):
            if units.is_kept(units.sites[site]):
                break
            trial = _tried(program, shapes, choices | {site: other})
            if site < len(trial[0].sites) and trial[0].is_kept(trial[0].sites[site]):
                choices[site], (units, leaves) = other, trial
        site += 1
    return units, leaves


def _tried(
    program: Program, shapes: Sequence[tuple[int, ...]], choices: dict[int, int]
) -> tuple[Units, list[Value]]:
    units = Units(choices)
    leaves = [of_leaf(units, shape) for shape in shapes]
    others = [fixed(program.shape(v)) for v in program.inputs[len(leaves) :]]
    outputs = unit_rules.run(units, program, [*leaves, *others])
    units.doing = OUTPUT
    for value in outputs:
        for axis in value.axes:
            units.stay(axis)
    return units, leaves
