"""A task: what one loop needs to know of a job in order to train it, continue it and report it."""

import abc
import copy
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from optax_structured.training.config import Config
from optax_structured.training.devices import Devices
from optax_structured.training.folder import Row
from optax_structured.training.history import Evaluation, History
from optax_structured.training.state_bits import folder_name


class State(NamedTuple):
    """All that changes from step to step, but for the step itself."""

    params: Any
    opt_state: Any


class Panel(NamedTuple):
    """Numbers that a run is judged by: a panel of its pictures, and columns of a comparison.

    The first one of a task decides between learning rates: the smaller the better.
    """

    title: str
    lines: Mapping[str, str]  # column of the metrics -> label
    percent: bool = False
    log: bool = False


class Column(NamedTuple):
    """One column of a comparison."""

    heading: str
    name: str  # in the metrics
    percent: bool

    def ends(self, values: Sequence[float] | None) -> str:
        """How runs ended: mean ± standard error over them."""
        if not values:
            return "diverged"
        mean, error = mean_and_error(values)
        factor, digits, sign = (100, 2, " %") if self.percent else (1, 3, "")
        shown = f" ± {factor * error:.{digits}f}" if len(values) > 1 else ""
        return f"{factor * mean:.{digits}f}{shown}{sign}"


class Cost(NamedTuple):
    """What a comparison draws the first number of the first panel against."""

    name: str  # in the metrics, or "state_bytes" or "step_ms"
    heading: str
    word: str  # for one that no other recipe beats in both
    percent: bool = False
    more_is_better: bool = False


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over runs; no error of one."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1)) / n**0.5 if n > 1 else 0.0


class Task(abc.ABC):
    """One configuration made ready to run on its data.

    A step is a function of seed, step and state alone, so every recipe sees the same data, and a
    run continues from any step, however its steps were split into calls.
    """

    # Of the kind.
    name: ClassVar[str]  # of --task
    unit: ClassVar[str]  # of the length of a run, which is the field `{unit}s` of the configuration
    recipes: ClassVar[Mapping[str, Any]]
    config_type: ClassVar[type[Config]]
    located: ClassVar[str]  # field that says where the data are: it may differ on resuming
    compared: ClassVar[str]  # recipes, separated by commas
    also_compared: ClassVar[tuple[str, ...]] = ()  # what "all" adds to `recipes`
    factors: ClassVar[tuple[float, ...]]  # of a recipe's learning rate: what a comparison sweeps
    # Of one configuration, or of the kind.
    steps_a_call: int
    steps_a_unit: int
    evaluate_every: int  # steps
    milestones: tuple[int, ...] = ()  # steps after which something changes, for the pictures
    panels: Sequence[Panel]
    costs: Sequence[Cost] = (
        Cost("state_bytes", "bytes of optimizer state", "bytes"),
        Cost("step_ms", "milliseconds a step", "time"),
    )
    structure: Any  # `rules` that the optimizer was built with, or None

    takes_mesh: ClassVar[bool] = False  # whether its constructor takes `devices`

    def __init__(self, config: Any, train: Any, devices: Devices | None = None) -> None:
        self.config = config
        self.devices = devices or Devices()
        self.train = jax.device_put(train)
        place = self._shardings()
        losses, params = self.devices.everywhere, place and place.params
        self._steps = jax.jit(self._run_steps, donate_argnums=0, out_shardings=(place, losses))
        self._initial = jax.jit(self._make_state, out_shardings=place)
        self._gradient = jax.jit(self._one_gradient, out_shardings=params)

    @staticmethod
    @abc.abstractmethod
    def load(given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The data, from the options; and the fields of the configuration that they decide."""

    @abc.abstractmethod
    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters."""

    @abc.abstractmethod
    def optimizer(self, learning_rate: Any) -> optax.GradientTransformation:
        """The recipe, on the schedule of this run; the rate may be traced."""

    @abc.abstractmethod
    def batches(self, first: int, count: int) -> Any:
        """The input of the steps from `first` on, (steps_a_call, ...); `count` of them are used."""

    @abc.abstractmethod
    def loss(self, params: Any, train: Any, batch: Any) -> jax.Array:
        """The loss of one step, ()."""

    def value_and_grad(self, state: State, train: Any, batch: Any) -> tuple[jax.Array, Any]:
        """The loss of one step, and the gradient that the optimizer is given."""
        return jax.value_and_grad(self.loss)(state.params, train, batch)

    @abc.abstractmethod
    def evaluate(self, state: State, step: int) -> Evaluation:
        """What is measured every `evaluate_every` steps."""

    @abc.abstractmethod
    def network(self, state: State) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
        """What was trained: a function, its parameters, and an example of its other arguments."""

    def watch(self, state: State) -> Row:
        """What is measured after each compiled call, beside the loss."""
        return {}

    @property
    @abc.abstractmethod
    def subject(self) -> tuple[str, str]:
        """Model and data, a word each."""

    @abc.abstractmethod
    def describe(self) -> str:
        """What all runs of a comparison share, in words."""

    @abc.abstractmethod
    def describe_row(self, row: Row) -> str:
        """Where a run stands, for its live line."""

    @abc.abstractmethod
    def announce(self, console: Console) -> None:
        """Prints what is worth knowing before the first step."""

    @abc.abstractmethod
    def report(
        self, state: State, history: History, folder: pathlib.Path, console: Console
    ) -> None:
        """Prints how a run ended, and writes what belongs to this task alone."""

    @property
    def length(self) -> int:
        """Of the run, in units."""
        return getattr(self.config, f"{self.unit}s")

    @property
    def total_steps(self) -> int:
        """Of the run."""
        return self.length * self.steps_a_unit

    @property
    def label(self) -> str:
        """The recipe and the bits of its state."""
        return folder_name(self.config.recipe, self.config.state_bits)

    @property
    def title(self) -> str:
        """Of the pictures of a run."""
        return f"{self.label}: {' on '.join(self.subject)}, seed {self.config.seed}"

    def score_error(self, score: float) -> float:
        """The standard error of what `panels` judge by, of one run: how well it is measured."""
        return 0.0

    @property
    def columns(self) -> list[Column]:
        """One for each line of each panel."""
        return [
            Column(f"{panel.title} {label}", name, panel.percent)
            for panel in self.panels
            for name, label in panel.lines.items()
        ]

    def variant(self, **changes: Any) -> Self:
        """The same task with another seed or learning rate; what is compiled is shared."""
        if not changes.keys() <= {"seed", "learning_rate"}:
            raise ValueError(f"{', '.join(changes)}: anything but these two is compiled in")
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **changes)
        return other

    def init(self) -> State:
        """The state before the first step."""
        return self._initial(self.keys()[0])

    def steps(self, state: State, first: int, count: int) -> tuple[State, jax.Array]:
        """`count` steps from step `first` on, in one call; `state` is donated.

        Returns:
          The state, and the losses, (steps_a_call,), of which the first `count` are valid.
        """
        # One program for every count: the bits do not depend on where a run was stopped.
        batches, rate = self.batches(first, count), np.float32(self.config.learning_rate)
        return self._steps(state, self.train, batches, rate, np.int32(count))

    def gradient(self, params: Any, step: int) -> Any:
        """The gradient that this step meets."""
        return self._gradient(params, self.train, self.batches(step, 1))

    def keys(self) -> jax.Array:
        """For the initial parameters, and for the order of the data."""
        return jax.random.split(jax.random.key(self.config.seed))

    def abstract_state(self) -> State:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self._make_state, self.keys()[0])

    def _shardings(self) -> State | None:
        """Of the state; None on one device."""
        if not self.devices.mesh:
            return None
        params = jax.eval_shape(self.init_params, jax.random.key(0))
        return State(*self.devices.shardings(self.optimizer(self.config.learning_rate), params))

    def _make_state(self, key: jax.Array) -> State:
        params = self.init_params(key)
        return State(params, self.optimizer(self.config.learning_rate).init(params))

    def _run_steps(
        self, state: State, train: Any, batches: Any, rate: jax.Array, count: jax.Array
    ) -> tuple[State, jax.Array]:
        optimizer = self.optimizer(rate)

        def step(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            (params, opt_state), losses = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            loss, gradient = self.value_and_grad(State(params, opt_state), train, batch)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return State(optax.apply_updates(params, updates), opt_state), losses.at[i].set(loss)

        return jax.lax.fori_loop(0, count, step, (state, jnp.zeros(self.steps_a_call)))

    def _one_gradient(self, params: Any, train: Any, batches: Any) -> Any:
        return jax.grad(self.loss)(params, train, jax.tree.map(lambda x: x[0], batches))
