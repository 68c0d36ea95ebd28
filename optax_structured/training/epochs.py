"""Tasks that see all their examples once per epoch."""

from typing import Any

import jax
import numpy as np

from optax_structured.training.task import Task


class EpochTask(Task):
    """A task whose batch is the numbers of its examples, in an order that each epoch draws.

    The configuration has `train_size` and `batch_size`; a last partial batch is left out.
    """

    unit = "epoch"

    def __init__(self, config: Any, train: Any) -> None:
        super().__init__(config, train)
        self._order = jax.jit(self._permutation)

    def batches(self, first: int, count: int) -> np.ndarray:
        epoch, step = divmod(first, self.steps_a_unit)
        order = np.asarray(self._order(self.keys()[1], epoch))[step : step + count]
        return np.pad(order, ((0, self.steps_a_call - len(order)), (0, 0)))

    def _permutation(self, key: jax.Array, epoch: jax.Array) -> jax.Array:
        order = jax.random.permutation(jax.random.fold_in(key, epoch), self.config.train_size)
        shape = self.steps_a_unit, self.config.batch_size
        return order[: shape[0] * shape[1]].reshape(shape)
