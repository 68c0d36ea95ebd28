"""A plan as text: totals, the same on each device, and one line a kind of leaf."""

import math
import textwrap

from optax_structured.planning import tpu
from optax_structured.planning.plan import Plan
from optax_structured.trees.tables import aligned, kinds

_LEFT_OUT = (
    "Activations and the temporaries of a step are not counted: they grow with batch and sequence."
)


def render(plan: Plan, width: int | None = None) -> str:
    """The tables of a plan and what they mean; `width` is that of the screen."""
    size = sum(math.prod(leaf.shape) for leaf in plan.after.leaves)
    heading = f"{plan.name}: {size:,} parameters in {len(plan.after.leaves):,} leaves"
    words = _state_in_words(plan) + _weights_in_words(plan)
    before, after = plan.before, plan.after
    totals = _table(
        plan,
        (before.weight_bytes, plan.weight_bytes),
        (before.gradient_bytes, after.gradient_bytes),
        (before.state_bytes, after.state_bytes),
    )
    parts = [f"{heading}\n{aligned(totals, (1, 2, 3), width)}"]
    if plan.mesh:
        shape = ", ".join(f"{name}={n}" for name, n in plan.mesh.items())
        heading = f"On each of {math.prod(plan.mesh.values())} devices ({shape})"
        part = plan.per_device
        gradients = part["gradients"]
        each = _table(
            plan,
            (gradients, part["weights"]),
            (gradients, gradients),
            (part["before"], part["after"]),
        )
        parts.append(f"{heading}\n{aligned(each, (1, 2, 3), width)}")
    if plan.chip is not None:
        parts += [textwrap.fill(text, width or 120) for text in _on_chip(plan)]
    parts += [textwrap.fill(text, width or 120) for text in (words, _LEFT_OUT)]
    by_kind = aligned(_kinds(plan), range(1, 6), width)
    notes = (textwrap.fill(note, width or 120) for note in plan.after.notes)
    parts.append("\n".join((f"Optimizer state by kind of leaf\n{by_kind}", *notes)))
    return "\n\n".join(parts)


def _table(plan: Plan, *changes: tuple[int, int]) -> list[tuple[str, ...]]:
    """Weights, gradients and state under AdamW and under the recipe, and their sums."""
    old, new = map(sum, zip(*changes, strict=True))
    names = ("weights", "gradients", "optimizer state", "total")
    rows = zip(names, (*changes, (old, new)), strict=True)
    return [_heading(plan), *((name, *_change(*change)) for name, change in rows)]


def _on_chip(plan: Plan) -> list[str]:
    """Whether a device holds it, and what the compiled step takes and receives."""
    chip, step = plan.chip, plan.step
    assert chip is not None
    fits = plan.on_device <= chip.memory
    counted = "weights, gradients and state"
    counted += " and the temporaries of the step" if step else ""
    said = [
        f"{counted.capitalize()}: {_size(plan.on_device)} of the {_size(int(chip.memory))} of a "
        f"{chip.name}: {'it fits' if fits else 'it does not fit'}."
    ]
    if not fits:
        others = "; ".join(f"{options}, {_size(size)}" for options, size in plan.fitting)
        said.append(f"Without temporaries, these fit: {others or 'none; give more devices'}.")
    if step is None:
        said.append(f"Temporaries and communication are not known: {tpu.MISSING}.")
        return said
    always, most = (sum(kinds.values()) for kinds in step.traffic)
    said.append(
        f"The compiled step of the optimizer (libtpu, {step.compile_seconds:.0f} s; nothing was "
        f"executed) has {_size(step.temporaries)} of temporaries a device. A device receives "
        f"{_size(int(always))} in a step, {_size(int(most))} in one that refits every leaf: at the "
        f"{chip.link / 1e9:.0f} GB/s of its links, as an estimate, {1e3 * always / chip.link:.1f} "
        f"and {1e3 * most / chip.link:.1f} ms. Gradients and weights that travel in the backward "
        "pass come on top."
    )
    return said


def _heading(plan: Plan) -> tuple[str, ...]:
    bits = "" if plan.moments is None else f", {plan.moments.bits}-bit state"
    return "", "adamw", f"{plan.recipe}{bits}", "saved"


def _state_in_words(plan: Plan) -> str:
    before, after, moments = plan.before, plan.after, plan.moments
    if after.code_bytes:
        text = f"{_size(after.code_bytes)} of the state are codes. GB are 1e9 bytes."
        if moments is not None:
            text += (
                f" Moments of 4096 entries and more have {moments.bits} bits per entry, and a "
                f"float32 scale for each {moments.block} of them; smaller ones are float32."
            )
        return text
    old, new = before.state_numbers, after.state_numbers
    text = (
        f"Numbers in the state: {old:,} → {new:,}; at two bytes each, as published tables count, "
        f"{_size(2 * old)} → {_size(2 * new)}. GB are 1e9 bytes; "
        "the accumulators of all recipes but adamw are float32."
    )
    if after.formula_numbers is not None:
        text += f" By the published formula: {after.formula_numbers:,} numbers."
    return text


def _weights_in_words(plan: Plan) -> str:
    if plan.weight_bytes == plan.after.weight_bytes:
        return ""
    return (
        " Projected weights are in INT8, as quantize_weights holds them; kept on that grid by the "
        "optimizer, as q_galore does by default, they take as much as those of adamw."
    )


def _kinds(plan: Plan) -> list[tuple[str, ...]]:
    """One row for all leaves whose paths differ in numbers only and that have one shape."""
    adamw = {leaf.path: leaf.state_bytes for leaf in plan.before.leaves}
    rows = [("parameter", "shape", "rank", *_heading(plan)[1:])]
    for name, leaves in kinds(plan.after.leaves, lambda leaf: (leaf.shape, leaf.spec)):
        spec, shape = leaves[0].spec, "×".join(map(str, leaves[0].shape))
        before = sum(adamw[leaf.path] for leaf in leaves)
        after = sum(leaf.state_bytes for leaf in leaves)
        rows.append((name, shape, "" if spec is None else str(spec.rank), *_change(before, after)))
    shared = (_size(report.shared_bytes) for report in (plan.before, plan.after))
    return [*rows, ("shared by all leaves", "", "", *shared, "")]


def _change(old: int, new: int) -> tuple[str, str, str]:
    return _size(old), _size(new), f"{1 - new / old:.1%}" if new != old else ""


def _size(n: int) -> str:
    if n >= 1e8:
        return f"{n / 1e9:,.4f} GB"
    return f"{n / 1e6:,.3f} MB" if n >= 1e5 else f"{n:,} B"
