"""A network that knows the digits 0 to 4, and the digits 5 to 9."""

import functools
from typing import Any

import jax
import numpy as np
import optax

from optax_structured import adapters
from optax_structured.training.images import data, models
from optax_structured.training.names import counted
from optax_structured.trees import Axes

_KNOWN, _BATCH, _SHAPE = 5, 32, (8, 8, 1)
_MODEL = models.make("conv", _SHAPE, _KNOWN)


class Digits:
    """The digits of scikit-learn, split by whether the network knows them.

    Those from 5 on are the classes 0 to 4.
    """

    subject = ("conv", "digits")
    head, digest = "Dense_1", ""
    kernels = {r"Conv_\d/kernel": Axes(rows=(0, 1, 2), cols=3), "Dense_0/kernel": Axes()}

    def __init__(self) -> None:
        images = self._images = data.load("digits")

        def half(x: np.ndarray, labels: np.ndarray, known: bool) -> tuple[Any, Any]:
            chosen = (labels < _KNOWN) == known
            return x[chosen], labels[chosen] % _KNOWN

        self._known = half(images.train, images.train_labels, True)
        self._train = half(images.train, images.train_labels, False)
        self._test = half(images.test, images.test_labels, False)
        self.train_size = len(self._train[1])
        self._pretrained = functools.cache(self._pretrain)

    def train(self, config: Any) -> tuple[Any, Any]:
        """Images and labels."""
        return self._train

    def test(self, config: Any) -> tuple[Any, Any]:
        """Likewise."""
        return self._test

    def frozen(self, config: Any) -> Any:
        """The network after some passes over the digits 0 to 4: the same at every call."""
        return self._pretrained(config.pretrain_epochs)

    def adapted(
        self, config: Any, frozen: Any, adapter: Any, constants: Any, x: jax.Array
    ) -> jax.Array:
        """Logits of the adapted network."""
        return self.apply(config, adapters.merge(frozen, adapter, constants), x)

    def apply(self, config: Any, params: Any, x: jax.Array) -> jax.Array:
        """Logits of merged parameters."""
        return self._logits(params, x)

    def describe(self, config: Any) -> str:
        """What runs have in common."""
        return f"digits 0 to 4 for {counted(config.pretrain_epochs, 'epoch')}, then 5 to 9"

    def _pretrain(self, epochs: int) -> Any:
        x, labels = self._known
        optimizer, steps = optax.adam(1e-3), len(x) // _BATCH

        @jax.jit
        def run(key: jax.Array, x: jax.Array, labels: jax.Array) -> Any:
            def step(carry: Any, batch: jax.Array) -> Any:
                params, state = carry

                def loss(params: Any) -> jax.Array:
                    return models.cross_entropy(self._logits(params, x[batch]), labels[batch])

                updates, state = optimizer.update(jax.grad(loss)(params), state, params)
                return (optax.apply_updates(params, updates), state), None

            start, order = jax.random.split(key)
            params = models.init(_MODEL, _SHAPE, start)
            orders = jax.vmap(lambda k: jax.random.permutation(k, len(x))[: steps * _BATCH])(
                jax.random.split(order, epochs)
            )
            batches = orders.reshape(-1, _BATCH)
            (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
            return params

        return run(jax.random.key(0), x, labels)

    def _logits(self, params: Any, x: jax.Array) -> Any:
        return _MODEL.apply({"params": params}, self._images.standardise(x))


@functools.cache
def load() -> Digits:
    """`Digits`, once a process."""
    return Digits()
