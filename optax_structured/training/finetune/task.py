"""The task `finetune`: a network that knows the digits 0 to 4 is adapted to 5 to 9."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from optax_structured import adapters
from optax_structured.adapters import Pair
from optax_structured.training.finetune import methods, plots
from optax_structured.training.finetune.config import Config
from optax_structured.training.folder import Row
from optax_structured.training.history import Evaluation, History
from optax_structured.training.images import data, models
from optax_structured.training.names import counted
from optax_structured.training.task import Panel, State, Task
from optax_structured.transforms import skip_nonfinite

ADAPTER = "adapter.safetensors"
_KNOWN, _BATCH, _SHAPE = 5, 32, (8, 8, 1)
_MODEL = models.make("conv", _SHAPE, _KNOWN)


class Halves(NamedTuple):
    """The digits below 5, for pretraining, and those from 5 on, as the classes 0 to 4."""

    images: data.Images
    known: tuple[Any, Any]  # images and labels
    train: tuple[Any, Any]
    test: tuple[Any, Any]


class Finetune(Task):
    """Adapt a network that was trained on the digits 0 to 4 to the digits 5 to 9.

    The weights of the network stay frozen; what is trained, saved and continued is the adapter.
    """

    name, unit, steps_a_call = "finetune", "epoch", 120
    recipes, config_type = methods.METHODS, Config
    located = ""  # the data come with scikit-learn
    compared, factors = "full,head,lora,lora_plus,lora_pro,svfit", (0.3, 1.0, 3.0)
    structure = None

    def __init__(self, config: Config, halves: Halves) -> None:
        self.steps_a_unit = self.evaluate_every = len(halves.train[0]) // config.batch_size
        self.method = methods.find(config.recipe)
        self.rules = methods.table(self.method, config.rank or 1)
        self.panels = [
            Panel("test error", {"error": ""}, percent=True, log=True),
            Panel("ranks left of each LoRA, mean", {"ranks": ""}),
        ]
        self._images, self._test = halves.images, halves.test
        self.frozen = pretrained(config.pretrain_epochs)
        start = adapters.init(jax.random.key(0), self.frozen, self.rules)
        self.constants = adapters.constants(self.frozen, start)
        super().__init__(config, (self.frozen, self.constants, *halves.train))
        self._order = jax.jit(self._permutation)
        self._wrong = jax.jit(self._count_wrong)

    @staticmethod
    def load(given: Mapping[str, Any]) -> tuple[Halves, dict[str, Any]]:
        halves = load_halves()
        return halves, {"train_size": len(halves.train[0])}

    def init_params(self, key: jax.Array) -> Any:
        return adapters.init(key, self.frozen, self.rules)

    def optimizer(self, learning_rate: Any) -> Any:
        return skip_nonfinite(self.method.build(learning_rate, self.config.strength))

    def batches(self, first: int, count: int) -> np.ndarray:
        epoch, step = divmod(first, self.steps_a_unit)
        order = np.asarray(self._order(self.keys()[1], epoch))[step : step + count]
        return np.pad(order, ((0, self.steps_a_call - len(order)), (0, 0)))

    def loss(self, params: Any, train: Any, batch: jax.Array) -> jax.Array:
        frozen, constants, x, labels = train
        merged = adapters.merge(frozen, params, constants)
        return models.cross_entropy(_logits(merged, self._images, x[batch]), labels[batch])

    def network(self, state: State) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
        """From images as they are stored to logits, with the merged weights as parameters."""
        merged = adapters.merge(self.frozen, state.params, self.constants)
        images = jnp.asarray(self._test[0][: self.config.batch_size])
        return lambda params, x: _logits(params, self._images, x), merged, (images,)

    def watch(self, state: State) -> Row:
        left = [
            int(np.count_nonzero(np.any(np.asarray(pair.b) != 0, axis=0)))
            for pair in state.params.values()
            if isinstance(pair, Pair)
        ]
        return {"ranks": float(np.mean(left)) if left else 0.0}

    def evaluate(self, state: State, step: int) -> Evaluation:
        wrong = int(self._wrong(state.params, self.train, *self._test))
        row = {"epoch": step // self.steps_a_unit, "error": wrong / len(self._test[0])}
        return Evaluation(row)

    @property
    def label(self) -> str:
        return self.config.recipe

    @property
    def subject(self) -> tuple[str, str]:
        return "conv", "digits"

    def describe(self) -> str:
        chosen = self.config
        return (
            f"digits 0 to 4 for {counted(chosen.pretrain_epochs, 'epoch')}, then 5 to 9 for "
            f"{counted(chosen.epochs, 'epoch')} of batches of {chosen.batch_size}"
        )

    def describe_row(self, row: Row) -> str:
        return f"loss {row['loss']:.3f}  error {row.get('error', float('nan')):.1%}"

    def announce(self, console: Console) -> None:
        console.print(adapters.describe(self.frozen, self.init().params), soft_wrap=True)

    def report(
        self, state: State, history: History, folder: pathlib.Path, console: Console
    ) -> None:
        adapter = jax.device_get(adapters.shrink(state.params))
        adapters.export(folder / ADAPTER, adapter)
        merged = adapters.merge(self.frozen, adapter, self.constants)
        update = optax.tree.sub(merged, self.frozen)
        plots.draw_spectra(update, self.title, folder)
        console.print(f"{folder / ADAPTER} holds the adapter; adapters.load reads it")

    def _permutation(self, key: jax.Array, epoch: jax.Array) -> jax.Array:
        size = self.config.train_size
        order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
        shape = self.steps_a_unit, self.config.batch_size
        return order[: shape[0] * shape[1]].reshape(shape)

    def _count_wrong(self, adapter: Any, train: Any, x: jax.Array, labels: jax.Array) -> Any:
        frozen, constants, *_ = train
        merged = adapters.merge(frozen, adapter, constants)
        return jnp.sum(jnp.argmax(_logits(merged, self._images, x), axis=-1) != labels)


@functools.cache
def load_halves() -> Halves:
    """The digits of scikit-learn, split by whether the network knows them."""
    images = data.load("digits")

    def half(x: np.ndarray, labels: np.ndarray, known: bool) -> tuple[Any, Any]:
        chosen = (labels < _KNOWN) == known
        return x[chosen], labels[chosen] % _KNOWN

    return Halves(
        images,
        half(images.train, images.train_labels, True),
        half(images.train, images.train_labels, False),
        half(images.test, images.test_labels, False),
    )


@functools.cache
def pretrained(epochs: int) -> Any:
    """The network after some passes over the digits 0 to 4: the same at every call."""
    halves = load_halves()
    x, labels = halves.known
    optimizer, steps = optax.adam(1e-3), len(x) // _BATCH

    @jax.jit
    def run(key: jax.Array, x: jax.Array, labels: jax.Array) -> Any:
        def step(carry: Any, batch: jax.Array) -> Any:
            params, state = carry

            def loss(params: Any) -> jax.Array:
                return models.cross_entropy(_logits(params, halves.images, x[batch]), labels[batch])

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


def _logits(params: Any, images: data.Images, x: jax.Array) -> Any:
    return _MODEL.apply({"params": params}, images.standardise(x))
