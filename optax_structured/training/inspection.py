"""What a run says about its learning rate: spectrum, stability, agreement of signs, energy."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from optax_structured import curvature
from optax_structured.states import arrays_of
from optax_structured.states.roles import SECOND_MOMENT
from optax_structured.training.checkpoint import Checkpoints
from optax_structured.training.history import History
from optax_structured.training.peers import KNOWN
from optax_structured.training.style import COLOURS, GREY, STYLE, figure_of
from optax_structured.training.task import State, Task
from optax_structured.transforms import sign_agreement
from optax_structured.trees import named_leaves

PICTURE = "inspection.png"
_MOMENTUM = 0.9  # of the averages of gradients that adaptive recipes take
_EPS = 1e-8


class Inspection(NamedTuple):
    """What was measured at the last checkpoint of a run."""

    step: int
    learning_rate: float  # the peak of the run
    density: curvature.Density  # of the Hessian, on one batch
    scaled: curvature.Density | None  # preconditioned by the second moments, where there are any
    limit: float | None  # rate above which quadratic steps grow; dual averaging has none
    agreement: float  # of the signs of gradients of different batches, in [0, 1]
    leaves: dict[str, float]  # the same, leaf by leaf
    chance: float  # what random signs would give

    def describe(self) -> str:
        """The conclusion, in a sentence or two."""
        signs = (
            f"signs of gradients agree by {self.agreement:.2f} (random signs: {self.chance:.2f})"
        )
        if self.limit is None:
            return f"step {self.step}: dual averaging has no stability limit of its rate; {signs}"
        ratio = self.learning_rate / self.limit
        steps = "preconditioned by its second moments" if self.scaled else "of gradient descent"
        verdict = "below" if ratio < 1 else "above"
        return (
            f"step {self.step}: the learning rate {self.learning_rate:g} is {ratio:.2g} times the "
            f"stability limit {self.limit:.3g} {steps}, {verdict} it; {signs}"
        )


def inspect(
    task: Task, folder: pathlib.Path, *, order: int = 32, probes: int = 1, batches: int = 16
) -> Inspection:
    """Measures the last checkpoint of a run, on batches that it met.

    Args:
      task: the run, as stored.
      folder: its run folder.
      order: of the Lanczos iteration.
      probes: random vectors.
      batches: gradients that are compared in sign, one after the other.
    """
    with Checkpoints(folder) as checkpoints:
        step, state = checkpoints.restore(task.abstract_state())
    first = max(0, step - batches)
    agreement, leaves, chance = _agreement(task, state.params, first, batches)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[0], task.batches(first, 1))
    key = jax.random.key(0)

    @jax.jit
    def density(params: Any, train: Any, batch: Any, scales: Any) -> curvature.Density:
        return curvature.hessian_density(
            lambda p, b: task.loss(p, train, b),
            params,
            batch,
            key,
            order=order,
            probes=probes,
            preconditioner=scales,
        )

    ones = jax.tree.map(jnp.ones_like, state.params)
    plain, scaled = density(state.params, task.train, batch, ones), None
    limit = None
    if not KNOWN[task.config.recipe].averages:
        limit = 2 / float(curvature.summarize(plain).largest)
        if (roots := _roots(state)) is not None:
            scaled = density(state.params, task.train, batch, roots)
            edge = (2 + 2 * _MOMENTUM) / (1 - _MOMENTUM)
            limit = edge / float(curvature.summarize(scaled).largest)
    return Inspection(
        step, task.config.learning_rate, plain, scaled, limit, agreement, leaves, chance
    )


def draw(task: Task, found: Inspection, history: History, folder: pathlib.Path) -> None:
    """One page, `inspection.png`: four panels, or three where the rate has no limit."""
    with matplotlib.rc_context(STYLE):
        figure = figure_of(f"{task.title}, step {found.step}", 10.5, 7.0)
        right = "spectrum" if found.limit is None else "rates"
        axes: Any = figure.subplot_mosaic([["spectrum", right], ["signs", "last"]])
        _draw_spectrum(axes["spectrum"], found)
        if found.limit is not None:
            _draw_rates(axes["rates"], found.learning_rate, found.limit)
        _draw_signs(axes["signs"], found)
        _draw_energy(axes["last"], history)
        figure.savefig(folder / PICTURE)


def _agreement(
    task: Task, params: Any, first: int, batches: int
) -> tuple[float, dict[str, float], float]:
    """Mean size of the average sign over batches: whole, by leaf, and by chance."""
    monitor = sign_agreement(decay=1 - 1 / batches)
    state = monitor.init(params)
    observe = jax.jit(monitor.update)
    for step in range(first, first + batches):
        _, state = observe(task.gradient(params, step), state)
    mean = jax.tree.map(lambda s: jnp.mean(jnp.abs(s)) / state.total, state.signs)
    leaves = {path: float(x) for path, x in named_leaves(mean)}
    weights = (1 - 1 / batches) ** np.arange(batches)
    chance = np.sqrt(2 / np.pi * np.sum(weights**2)) / np.sum(weights)
    return float(state.agreement), leaves, float(chance)


def _roots(state: State) -> Any:
    """Roots of the second moments as a tree like the parameters; None unless each has one."""
    moments = [a.array for a in arrays_of(state.opt_state) if a.role is SECOND_MOMENT]
    leaves, structure = jax.tree.flatten(state.params)
    if [m.shape for m in moments] != [x.shape for x in leaves]:
        return None
    return jax.tree.unflatten(structure, [jnp.sqrt(m) + _EPS for m in moments])


def _draw_spectrum(ax: Any, found: Inspection) -> None:
    density = found.scaled or found.density
    values, grid = curvature.smooth(density, sigma_squared=1e-4, points=600)
    ax.plot(grid, np.maximum(values, 1e-7), color=COLOURS[0])
    ax.set_yscale("log")
    ax.set_ylim(1e-6, None)
    summary = curvature.summarize(density)
    what = "preconditioned Hessian" if found.scaled else "Hessian"
    no_limit = "; the rate of dual averaging has no limit by them" if found.limit is None else ""
    ax.set_title(f"eigenvalues of the {what}{no_limit}")
    ax.set_xlabel(f"largest {summary.largest:.3g}, negative share {summary.negative_mass:.1%}")
    ax.set_ylabel("density")


def _draw_rates(ax: Any, learning_rate: float, limit: float) -> None:
    names = ("learning rate", "stability limit")
    values = (learning_rate, limit)
    ax.barh(names, values, color=(COLOURS[1], COLOURS[0]), log=True)
    ax.set_xlim(min(values) / 10, max(values) * 10)
    for name, value in zip(names, values, strict=True):
        ax.text(value * 1.15, name, f"{value:.3g}", va="center")
    below = learning_rate < limit
    ax.set_title("below the limit: sane" if below else "above the limit: it bounces, or will")


def _draw_signs(ax: Any, found: Inspection) -> None:
    lowest = sorted(found.leaves.items(), key=lambda item: item[1])[-16:]
    ax.barh([path for path, _ in lowest], [value for _, value in lowest], color=COLOURS[0])
    ax.axvline(found.chance, color=GREY, ls=":")
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xlim(0, 1)
    ax.set_title("agreement of gradient signs (dotted: chance)")


def _draw_energy(ax: Any, history: History) -> None:
    rows = [row for row in history.leaves if "captured_energy" in row]
    if not rows:
        losses = history.losses
        ax.plot(np.arange(1, len(losses) + 1), losses, color=COLOURS[0], lw=0.8)
        ax.set_title("training loss, nats")
    else:
        steps = sorted({row["step"] for row in rows})
        values = [[r["captured_energy"] for r in rows if r["step"] == step] for step in steps]
        ax.plot(steps, [np.mean(v) for v in values], color=COLOURS[0], marker=".")
        ax.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
        ax.set_ylim(0, 1.02)
        ax.set_title("gradient energy in subspaces: mean, range")
    ax.set_xlabel("step")
