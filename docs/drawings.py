"""The drawings of the concept pages, from computations of the library: `python docs/drawings.py`.

Backgrounds are transparent and inks of middle lightness, so that one file serves light and dark.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import optax_structured as oxs
from optax_structured import diagnostics
from optax_structured.states import arrays_of

IMAGES = pathlib.Path(__file__).parent / "images"
INK, FAINT = "#808a92", "#a9b1b6"
TEAL, ORANGE, PURPLE, GREEN, GOLD = "#1f8a9c", "#d1603d", "#9a6fb5", "#5a9c49", "#bf9722"
matplotlib.rcParams |= {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 10,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "optax_structured",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def figure(width: float = 8.5, height: float = 3.4) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def save(fig: Figure, name: str) -> None:
    fig.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def subproblem() -> None:
    """The minimiser in the metric, beside a Euclidean prox; and its norm as the strength grows."""
    fig = figure()
    left, right = fig.subplots(1, 2, width_ratios=(1.15, 1))
    u, metric, strength = jnp.array([1.6, 1.0]), jnp.array([0.3, 3.0]), 0.7
    penalty = oxs.GroupLasso(group_axis=(), weight=1.0)
    exact = penalty.prox(u, metric, strength)
    euclidean = penalty.prox(u, 1.0, strength)
    x, y = np.meshgrid(np.linspace(-0.4, 2.1, 300), np.linspace(-0.3, 1.5, 300))
    quadratic = (metric[0] * (x - u[0]) ** 2 + metric[1] * (y - u[1]) ** 2) / 2
    objective = quadratic + strength * np.hypot(x, y)
    least = float(jnp.sum(metric * (exact - u) ** 2) / 2 + strength * jnp.linalg.norm(exact))
    left.contour(x, y, objective, least + np.array([0.02, 0.08, 0.2, 0.4]), colors=FAINT)
    left.contour(x, y, quadratic, [0.1, 0.4], colors=GOLD, linestyles="dotted")
    for point, label, colour in (
        (u, "u, the step without penalty", GOLD),
        (exact, "prox in the metric", TEAL),
        (euclidean, "Euclidean prox of u", ORANGE),
    ):
        left.plot(*point, "o", color=colour, label=label)
    left.plot(0, 0, "+", color=INK, markersize=10)
    left.set(title="one group of two entries, metric (0.3, 3)", xlabel="entry 1", ylabel="entry 2")
    left.legend(loc="lower right", fontsize=9)
    strengths = jnp.linspace(0, 3.5, 200)
    for metric, colour in (((0.3, 3.0), TEAL), ((1.0, 1.0), ORANGE), ((0.3, 0.3), PURPLE)):
        norms = [jnp.linalg.norm(penalty.prox(u, jnp.array(metric), s)) for s in strengths]
        right.plot(strengths, norms, color=colour, label=f"metric {metric}")
        right.plot(jnp.linalg.norm(jnp.array(metric) * u), 0, "o", color=colour, clip_on=False)
    right.set(title="norm of the group", xlabel="strength", ylim=(0, None))
    right.legend()
    save(fig, "concept_subproblem")


def prox_point() -> None:
    """Norms of groups in the prox point and in the parameters, over a run in two stages."""
    x = jax.random.normal(jax.random.key(0), (256, 12))
    y = x[:, :2] @ jnp.ones((2, 4))
    params = {"kernel": jax.random.normal(jax.random.key(1), (12, 4)) / 2}
    penalty = oxs.GroupLasso(group_axis=-2)
    steps = 400
    optimizer = oxs.ramda(0.1, penalty, 0.1, stages=oxs.Stages.equal(steps, number=2))

    def loss(p: Any) -> jax.Array:
        return jnp.mean((x @ p["kernel"] - y) ** 2)

    @jax.jit
    def run(params: Any, state: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            point = oxs.prox_point(state, penalty)
            both = [jnp.linalg.norm(p["kernel"], axis=1) for p in (point, params)]
            return (params, state), both

        return jax.lax.scan(step, (params, state), length=steps)[1]

    fig = figure()
    titles = ("prox point: zero at once", "parameters: fade, zero once momentum is 0")
    for axes, norms, title in zip(
        fig.subplots(1, 2, sharey=True), run(params, optimizer.init(params)), titles, strict=True
    ):
        for i, norm in enumerate(np.asarray(norms).T):
            colour = TEAL if i < 2 else ORANGE
            axes.plot(np.where(norm == 0, np.nan, norm), color=colour, linewidth=1.2)
            died = np.flatnonzero(norm[::-1] != 0)[0]
            if died:
                axes.plot(steps - died, 3e-6, "x", color=colour)
        axes.axvline(steps / 2, color=FAINT, linestyle="dotted")
        axes.set(title=title, xlabel="step", yscale="log", ylim=(2e-6, 5))
    fig.axes[0].set_ylabel("norm of a group; ×: 0 from here on")
    save(fig, "concept_prox_point")


def low_rank() -> None:
    """The way of a gradient through its projection; what the subspace holds of real gradients."""
    fig = figure(8.5, 5.6)
    top, bottom = fig.subplots(2, 1, height_ratios=(1.15, 1))
    top.set(xlim=(0, 100), ylim=(-4, 44))
    top.axis("off")
    boxes = {
        "gradient\nG": (8, 30, INK),
        "projected\nR = PᵀG": (34, 30, TEAL),
        "inner optimizer\nN, with moments": (61, 30, INK),
        "update\na P N": (92, 30, INK),
        "refresh: when\nprojector: refit P": (34, 4, PURPLE),
        "transport:\nmoments into new P": (61, 4, GREEN),
        "residual:\nG − P R": (92, 4, ORANGE),
    }
    placed = {}
    for text, (x, y, colour) in boxes.items():
        style = {"boxstyle": "round,pad=0.5", "facecolor": "none", "edgecolor": colour}
        box = top.text(x, y, text, ha="center", va="center", bbox=style, color=colour, fontsize=9)
        placed[text.split("\n")[0].rstrip(":")] = box
    for start, end, colour, bend in (
        ("gradient", "projected", INK, 0),
        ("projected", "inner optimizer", INK, 0),
        ("inner optimizer", "update", INK, 0),
        ("gradient", "refresh: when", PURPLE, 0.1),
        ("refresh: when", "projected", PURPLE, 0),
        ("refresh: when", "transport", GREEN, 0),
        ("transport", "inner optimizer", GREEN, 0),
        ("residual", "update", ORANGE, 0),
    ):
        style = {
            "arrowstyle": "->",
            "color": colour,
            "connectionstyle": f"arc3,rad={bend}",
            "patchA": placed[start].get_bbox_patch(),
            "patchB": placed[end].get_bbox_patch(),
        }
        places = (placed[end].get_position(), placed[start].get_position())
        top.annotate("", *places, arrowprops=style)

    keys = jax.random.split(jax.random.key(0), 4)
    params = {"kernel": jax.random.normal(keys[0], (64, 48)) / 8}
    target = jax.random.normal(keys[1], (64, 48)) / 8 * jnp.geomspace(1, 0.02, 64)[:, None]
    spread = jnp.geomspace(1, 0.1, 64)
    steps = 120
    for period, colour in ((10, TEAL), (40, PURPLE)):
        spec = oxs.LowRank(rank=8, period=period)
        optimizer = oxs.galore(0.02, spec)

        def step(carry: Any, key: Any, spec: Any = spec, optimizer: Any = optimizer) -> Any:
            params, state = carry
            x = jax.random.normal(key, (32, 64)) * spread
            loss = lambda p: jnp.mean((x @ (p["kernel"] - target)) ** 2)  # noqa: E731
            gradient = jax.grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            held = diagnostics.captured_energy(state, gradient, spec)["kernel"]
            return (optax.apply_updates(params, updates), state), held

        start = (params, optimizer.init(params))
        held = jax.jit(lambda c, step=step: jax.lax.scan(step, c, jax.random.split(keys[2], steps)))
        bottom.plot(held(start)[1], color=colour, linewidth=1.3, label=f"period {period}")
    bottom.set(
        title="share of each gradient inside the subspace, rank 8 of 48",
        xlabel="step",
        ylim=(None, 1.02),
    )
    bottom.legend(loc="lower left", ncols=2)
    save(fig, "concept_low_rank")


def rules() -> None:
    """Which rule takes which leaf: the assignment of a table."""
    params = {
        "blocks": {
            "down": jnp.ones((4, 512, 128)),
            "norm": jnp.ones((4, 128)),
            "query": jnp.ones((4, 128, 128)),
            "up": jnp.ones((4, 128, 512)),
        },
        "embed": jnp.ones((256, 128)),
        "head": {"bias": jnp.ones(256), "kernel": jnp.ones((128, 256))},
    }
    table = oxs.rules(
        ("embed|head|norm", None),
        ("query", oxs.LowRank(rank=16)),
        default=oxs.LowRank(rank=32),
    )
    found = table.assign(params)
    names = ['"embed|head|norm" → None', '"query" → LowRank(rank=16)', "default → LowRank(rank=32)"]
    colours = (FAINT, PURPLE, TEAL)
    rows = {pattern: i for i, pattern in enumerate([*(p for p, _ in table.pairs), None])}
    fig = figure(8.5, 3.2)
    axes = fig.subplots()
    axes.axis("off")
    axes.set(xlim=(0, 10), ylim=(len(found) - 0.4, -1.1))
    axes.text(0.1, -0.8, "leaves, by path", style="italic")
    axes.text(6.4, -0.8, "rules, from the top; the first match wins", style="italic")
    for i, item in enumerate(found):
        to, at = rows[item.rule], 1 + 2 * rows[item.rule]
        axes.text(0.1, i, f"{item.path}  {item.shape}", va="center", family="monospace", fontsize=9)
        axes.annotate(
            "",
            (6.3, at),
            (2.9, i),
            arrowprops={"arrowstyle": "->", "color": colours[to], "linewidth": 1.3},
        )
    for i, name in enumerate(names):
        axes.text(6.4, 1 + 2 * i, name, va="center", color=colours[i] if i else INK, fontsize=9.5)
    save(fig, "concept_rules")


def state() -> None:
    """Bytes of optimizer state by role, per parameter of a 60M LLaMA, from abstract states."""
    params = oxs.memory.llama("60m")
    table = oxs.rules((oxs.memory.PLAIN_LEAVES, None), default=oxs.LowRank(rank=128))
    optimizers = {
        "optax.adamw": optax.adamw(1e-3),
        "ramda": oxs.ramda(1e-3),
        "galore": oxs.galore(1e-2, table),
        "ldadam": oxs.ldadam(1e-3, table),
        "apollo_mini": oxs.apollo_mini(
            1e-2, oxs.rules((oxs.memory.PLAIN_LEAVES, None), default=oxs.LowRank(rank=1))
        ),
        "quantized(adamw)": oxs.quantized(optax.adamw(1e-3)),
        "quantized(galore)": oxs.quantized(oxs.galore(1e-2, table)),
        "q_galore": oxs.q_galore(1e-2, table),
    }
    kinds = {
        "first moments": TEAL,
        "second moments": PURPLE,
        "sums and points": GOLD,
        "bases": GREEN,
        "errors": ORANGE,
        "codes, all roles": INK,
    }
    by_role = {
        "first_moment": "first moments",
        "second_moment": "second moments",
        "gradient_sum": "sums and points",
        "point": "sums and points",
        "basis": "bases",
        "error": "errors",
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    fig = figure(8.5, 3.6)
    axes = fig.subplots()
    for row, tx in enumerate(optimizers.values()):
        bytes_of = dict.fromkeys(kinds, 0.0)
        for x in arrays_of(oxs.memory.abstract_state(tx, params)):
            size = x.array.size * x.array.dtype.itemsize / count
            kind = by_role.get(x.role.name if x.role else "")
            if x.role and x.role.name == "codes" or x.array.dtype == jnp.uint8:
                kind = "codes, all roles"
            if kind:
                bytes_of[kind] += size
        left = 0.0
        for kind, size in bytes_of.items():
            label = kind if row == 0 else None
            axes.barh(row, size, left=left, color=kinds[kind], height=0.6, label=label)
            left += size
        axes.text(left + 0.15, row, f"{left:.2f}", va="center")
    axes.set_yticks(range(len(optimizers)), optimizers, family="monospace")
    axes.invert_yaxis()
    axes.set(title="bytes of state per parameter, LLaMA 60M, rank 128", xlim=(0, 15.5))
    axes.legend(loc="lower right")
    save(fig, "concept_state")


if __name__ == "__main__":
    for draw in (subproblem, prox_point, low_rank, rules, state):
        draw()
