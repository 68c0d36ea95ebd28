"""The compiled parts of a language-model run: many steps at once, held-out loss, a gradient."""

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structured.training.lm import recipes
from optax_structured.training.lm.config import Config
from optax_structured.training.lm.model import Functional
from optax_structured.training.lm.text import Text

STEPS_A_CALL = 10
_WARM_UP, _LAST_RATE = 0.1, 0.1


class State(NamedTuple):
    """All that changes from step to step, but for the step itself."""

    params: Any
    opt_state: Any


class Experiment:
    """One configuration made ready to run on one text.

    Which bytes a step sees is a function of seed and step alone, so that every recipe sees the
    same, and a run continues from any step.
    """

    def __init__(self, config: Config, text: Text) -> None:
        self.config, self.text = config, text
        self.model = Functional(config.width, config.layers, config.heads, config.stacked)
        parts = {part: getattr(config, part) for part in recipes.PARTS}
        self.low_rank = (
            None
            if config.rank is None or config.period is None
            else recipes.structure(
                config.rank, config.period, parts, recipes.find(config.recipe).codec
            )
        )
        self._train = jax.device_put(text.train)
        self._steps = jax.jit(self._run_steps, donate_argnums=0)
        self._initial = jax.jit(self._make_state)
        self._held_out_losses = jax.jit(self._sum_losses)
        self._gradient = jax.jit(self._mean_gradient)

    def variant(self, **changes: Any) -> "Experiment":
        """The same experiment with another seed or learning rate; what is compiled is shared."""
        if not changes.keys() <= {"seed", "learning_rate"}:
            raise ValueError(f"{', '.join(changes)}: anything but these two is compiled in")
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **changes)
        return other

    def init(self) -> State:
        """The state before the first step."""
        return self._initial(self._keys()[0])

    def abstract_params(self) -> Any:
        """Shapes and dtypes of the parameters."""
        return jax.eval_shape(self.model.init, self._keys()[0])

    def optimizer(self) -> optax.GradientTransformation:
        """The recipe, on the schedule of this run."""
        return self._optimizer(self.config.learning_rate)

    def steps(self, state: State, first: int, count: int) -> tuple[State, jax.Array]:
        """`count` steps from step `first` on, in one call; `state` is donated.

        Returns:
          The state, and the losses, (STEPS_A_CALL,), of which the first `count` are meant.
        """
        # One program for every count: the bits do not depend on where a run was stopped.
        rate = np.float32(self.config.learning_rate)
        bounds = np.int32(first), np.int32(count)
        return self._steps(state, self._train, self._keys()[1], rate, *bounds)

    def held_out_loss(self, params: Any) -> float:
        """Mean negative log-likelihood of a byte, over every byte of the held-out text, in nats."""
        return float(np.sum(self._held_out_sums(params)) / len(self.text.held_out))

    def gradient(self, params: Any, step: int) -> Any:
        """The gradient that this step meets."""
        return self._gradient(params, self._train, self._keys()[1], np.int32(step))

    def _held_out_sums(self, params: Any) -> np.ndarray:
        # Summed in float64 on the host: a float32 total of so many bytes would round.
        return np.asarray(self._held_out_losses(params, *self._held_out), np.float64)

    def _keys(self) -> jax.Array:
        """For the initial parameters, and for the order of the data."""
        return jax.random.split(jax.random.key(self.config.seed))

    def _optimizer(self, learning_rate: Any) -> optax.GradientTransformation:
        config = self.config
        shape = self._shape_of_schedule()
        return recipes.build(
            config.recipe,
            lambda count: learning_rate * shape(count),
            self.low_rank,
            scale=config.scale,
            weight_decay=config.weight_decay,
            clip=config.clip,
            state_bits=config.state_bits,
        )

    def _shape_of_schedule(self) -> optax.Schedule:
        """Up to 1 over the first tenth of the run, then along a cosine to a tenth."""
        steps = self.config.steps
        rise = max(1, round(_WARM_UP * steps))
        return optax.join_schedules(
            [
                lambda count: (count + 1) / rise,
                optax.cosine_decay_schedule(1.0, max(1, steps - rise), alpha=_LAST_RATE),
            ],
            [rise],
        )

    def _make_state(self, key: jax.Array) -> State:
        params = self.model.init(key)
        return State(params, self.optimizer().init(params))

    def _loss(self, params: Any, text: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
        """Of the windows of one step, drawn with replacement."""
        length, batch = self.config.sequence, self.config.batch_size
        starts = jax.random.randint(
            jax.random.fold_in(key, step), (batch, 1), 0, len(text) - length
        )
        windows = text[starts + jnp.arange(length + 1)].astype("int32")
        return jnp.mean(self.model.losses(params, windows[:, :-1], windows[:, 1:]))

    def _run_steps(
        self,
        state: State,
        text: jax.Array,
        key: jax.Array,
        rate: jax.Array,
        first: jax.Array,
        count: jax.Array,
    ) -> tuple[State, jax.Array]:
        optimizer = self._optimizer(rate)

        def step(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            (params, opt_state), losses = carry
            loss, gradient = jax.value_and_grad(self._loss)(params, text, key, first + i)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return State(optax.apply_updates(params, updates), opt_state), losses.at[i].set(loss)

        return jax.lax.fori_loop(0, count, step, (state, jnp.zeros(STEPS_A_CALL)))

    def _mean_gradient(self, params: Any, text: jax.Array, key: jax.Array, step: jax.Array) -> Any:
        return jax.grad(self._loss)(params, text, key, step)

    @functools.cached_property
    def _held_out(self) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets, (batches, batch, sequence); padding has the target -1.

        The byte before the first is the last of the training text, so that every held-out byte
        is a target exactly once. A window has no context but its own.
        """
        targets = self.text.held_out.astype(np.int32)
        inputs = np.concatenate([self.text.train[-1:], self.text.held_out[:-1]]).astype(np.int32)
        shape = self.config.batch_size, self.config.sequence
        missing = -len(targets) % (shape[0] * shape[1])
        inputs = np.pad(inputs, (0, missing)).reshape(-1, *shape)
        targets = np.pad(targets, (0, missing), constant_values=-1).reshape(-1, *shape)
        return jax.device_put((inputs, targets))

    def _sum_losses(self, params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        def total(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            losses = self.model.losses(params, batch[0], jnp.maximum(batch[1], 0))
            return jnp.sum(jnp.where(batch[1] < 0, 0.0, losses))

        return jax.lax.map(total, (inputs, targets))
