"""A plan as two tables: totals, and one line a kind of leaf."""

import math

from rich import box
from rich.console import Group
from rich.table import Table

from optax_structured.planning.plan import Plan
from optax_structured.trees.tables import kinds


def render(plan: Plan) -> Group:
    """The two tables of a plan: totals, and one line a kind of leaf."""
    return Group(_totals(plan), _kinds(plan))


def _totals(plan: Plan) -> Table:
    before, after, local = plan.before, plan.after, plan.per_device
    devices = math.prod(plan.mesh.values())
    size = sum(math.prod(leaf.shape) for leaf in after.leaves)
    table = _table(f"{plan.name}: {size:,} parameters in {len(after.leaves):,} leaves")
    table.add_column("")
    label = plan.recipe if plan.moments is None else f"{plan.recipe}, {plan.moments.bits}-bit state"
    for heading in ("adamw", label, "saved"):
        table.add_column(heading, justify="right")
    if plan.mesh:
        shape = ", ".join(f"{name}={n}" for name, n in plan.mesh.items())
        for heading in ("adamw", label):
            table.add_column(f"{heading}\neach of {devices} ({shape})", justify="right")

    def row(name: str, old: int, new: int, *each: int, style: str | None = None) -> None:
        local_cells = map(_size, each) if plan.mesh else ()
        table.add_row(name, *_change(old, new), *local_cells, style=style)

    gradients, weights = local["gradients"], local["weights"]
    row("weights", before.weight_bytes, plan.weight_bytes, gradients, weights)
    row("gradients", before.gradient_bytes, after.gradient_bytes, gradients, gradients)
    each = (local["before"], local["after"])
    row("optimizer state", before.state_bytes, after.state_bytes, *each, style="bold")
    row(
        "total",
        2 * before.weight_bytes + before.state_bytes,
        plan.weight_bytes + after.gradient_bytes + after.state_bytes,
        2 * gradients + local["before"],
        weights + gradients + local["after"],
    )
    table.caption = _state_in_words(plan) + _weights_in_words(plan)
    table.caption_justify = "left"
    return table


def _state_in_words(plan: Plan) -> str:
    before, after, moments = plan.before, plan.after, plan.moments
    if after.code_bytes:
        text = f"{_size(after.code_bytes)} of the state are codes. GB are 1e9 bytes."
        if moments is not None:
            text += (
                f" Moments of 4096 entries and more have {moments.bits} bits an entry, and a "
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


def _kinds(plan: Plan) -> Table:
    """One line for all leaves whose paths differ in numbers only and that have one shape."""
    adamw = {leaf.path: leaf.state_bytes for leaf in plan.before.leaves}
    table = _table("Optimizer state by kind of leaf")
    table.add_column("parameter", overflow="fold")
    columns = ("shape", "rank", "adamw", plan.recipe, "saved")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, leaves in kinds(plan.after.leaves, lambda leaf: (leaf.shape, leaf.spec)):
        spec, shape = leaves[0].spec, "×".join(map(str, leaves[0].shape))
        rank = "" if spec is None else str(spec.rank)
        before = sum(adamw[leaf.path] for leaf in leaves)
        after = sum(leaf.state_bytes for leaf in leaves)
        table.add_row(name, shape, rank, *_change(before, after), style=None if rank else "dim")
    shared = (_size(report.shared_bytes) for report in (plan.before, plan.after))
    table.add_row("shared by all leaves", "", "", *shared, "", style="dim")
    if plan.after.notes:
        table.caption = "\n".join(plan.after.notes)
        table.caption_justify = "left"
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _change(old: int, new: int) -> tuple[str, str, str]:
    return _size(old), _size(new), f"{1 - new / old:.1%}" if new != old else ""


def _size(n: int) -> str:
    if n >= 1e8:
        return f"{n / 1e9:,.4f} GB"
    return f"{n / 1e6:,.3f} MB" if n >= 1e5 else f"{n:,} B"
