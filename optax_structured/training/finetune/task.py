"""The task `finetune`: a pretrained network is adapted to something else."""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from optax_structured import adapters
from optax_structured.adapters import AllocatorState, Pair, Perturbation
from optax_structured.training.epochs import EpochTask
from optax_structured.training.finetune import config, digits, methods, plots
from optax_structured.training.finetune.watching import watched, watching
from optax_structured.training.folder import Row
from optax_structured.training.history import Evaluation, History
from optax_structured.training.images import models
from optax_structured.training.names import check_known, chosen, counted
from optax_structured.training.schedule import shape_of_schedule
from optax_structured.training.task import Panel, State
from optax_structured.transforms import skip_nonfinite

ADAPTER = "adapter.safetensors"
_CALL = {"digits": 120, "verses": 16}  # steps
_EXAMPLES = 100  # of the test that are looked at at once


class Finetune(EpochTask):
    """Adapt a small network from some digits to others, or a sentence encoder to a classification.

    The weights of the network stay frozen; what is trained, saved and continued is the adapter.
    """

    name, located = "finetune", "text"
    recipes, config_type = methods.METHODS, config.Config
    compared, factors = "full,head,lora,lora_plus,lora_pro,svfit", (0.1, 0.3, 1.0, 3.0, 10.0)
    structure = None

    def __init__(self, config: config.Config, source: Any) -> None:
        self.source, self.steps_a_call = source, _CALL[config.data]
        self.steps_a_unit = self.evaluate_every = source.train_size // config.batch_size
        self.method = chosen("recipe", config.recipe, methods.METHODS)
        self.rules = methods.table(self.method, config.rank or 1, source.head, source.kernels)
        self.panels = [
            Panel("test error", {"error": ""}, percent=True, log=True),
            Panel("ranks left of each LoRA, mean", {"ranks": ""}),
        ]
        steps = self.steps_a_unit * (config.scheduled_epochs or 1)
        self._shape = shape_of_schedule(steps)
        rank, strength = config.rank or 1, config.strength or 0.0
        self._setting = methods.Setting(rank, strength, steps, source.kernels)
        self._watcher = self.method.watcher and self.method.watcher(self._setting)
        self.frozen = source.frozen(config)
        start = adapters.init(jax.random.key(0), self.frozen, self.rules)
        self.constants = adapters.constants(self.frozen, start)
        super().__init__(config, (self.frozen, self.constants, *source.train(config)))
        self._test = jax.device_put(source.test(config))
        self._wrong = jax.jit(self._count_wrong)

    @staticmethod
    def load(given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        check_known("data", given["data"], config.DATA)
        source: Any
        if given["data"] == "digits":
            source = digits.load()
        else:
            from optax_structured.training.finetune import verses

            count, length = given["verses"] or config.VERSES, given["sequence"] or config.SEQUENCE
            source = verses.load(given["text"], count, length)
        return source, {"train_size": source.train_size, "text_sha256": source.digest}

    def init_params(self, key: jax.Array) -> Any:
        return adapters.init(key, self.frozen, self.rules)

    def optimizer(self, learning_rate: Any) -> optax.GradientTransformation:
        def scheduled(peak: Any) -> optax.Schedule:
            return lambda count: peak * self._shape(count)

        optimizer = self.method.build(scheduled(learning_rate), self._setting)
        if self.config.recipe != "head":
            of_head = methods.METHODS["head"].starts[self.config.data].learning_rate
            optimizer = optax.partition(
                {"head": optax.adam(scheduled(of_head)), "others": optimizer}, self._labels
            )
        if self._watcher:
            optimizer = optax.chain(watching(self._watcher, self.frozen), optimizer)
        return skip_nonfinite(optimizer)

    def loss(self, params: Any, train: Any, batch: jax.Array) -> jax.Array:
        frozen, constants, x, labels = train
        inputs = jax.tree.map(lambda x: x[batch], x)
        logits = self.source.adapted(self.config, frozen, params, constants, inputs)
        return models.cross_entropy(logits, labels[batch])

    def value_and_grad(self, state: State, train: Any, batch: Any) -> tuple[jax.Array, Any]:
        frozen, constants, *data = train
        adapter, seen = state.params, watched(state.opt_state)
        if isinstance(self._watcher, Perturbation):
            frozen, adapter = self._watcher.apply(seen, frozen, adapter)
        train = (frozen, self._constants_now(constants, seen), *data)
        return jax.value_and_grad(self.loss)(adapter, train, batch)

    def network(self, state: State) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
        """From inputs as they are stored to logits, with the merged weights as parameters."""
        some = jax.tree.map(lambda x: x[: self.config.batch_size], self._test[0])
        inputs = jax.tree.leaves(some)

        def fn(params: Any, *inputs: Any) -> Any:
            x = jax.tree.unflatten(jax.tree.structure(some), inputs)
            return self.source.apply(self.config, params, x)

        return fn, self._merged(state), tuple(map(jnp.asarray, inputs))

    def watch(self, state: State) -> Row:
        left = [
            int(np.count_nonzero(np.any(np.asarray(pair.b) != 0, axis=0)))
            for pair in state.params.values()
            if isinstance(pair, Pair)
        ]
        return {"ranks": float(np.mean(left)) if left else 0.0}

    def evaluate(self, state: State, step: int) -> Evaluation:
        seen, (x, labels) = watched(state.opt_state), self._test
        frozen, constants, *_ = self.train
        known = self._constants_now(constants, seen)
        wrong = 0
        for i in range(0, len(labels), _EXAMPLES):
            some = jax.tree.map(lambda x: x[i : i + _EXAMPLES], x)  # noqa: B023
            wrong += int(self._wrong(frozen, state.params, known, some, labels[i : i + _EXAMPLES]))
        return Evaluation({"epoch": step // self.steps_a_unit, "error": wrong / len(labels)})

    @property
    def label(self) -> str:
        return self.config.recipe

    @property
    def subject(self) -> tuple[str, str]:
        return self.source.subject

    def describe(self) -> str:
        passes = counted(self.config.epochs, "epoch")
        return (
            f"{self.source.describe(self.config)}, {passes} of batches of {self.config.batch_size}"
        )

    def describe_row(self, row: Row) -> str:
        return f"loss {row['loss']:.3f}  error {row.get('error', float('nan')):.1%}"

    def announce(self, console: Console) -> None:
        adapter = jax.eval_shape(self.init_params, jax.random.key(0))
        console.print(adapters.describe(self.frozen, adapter), soft_wrap=True)

    def report(
        self, state: State, history: History, folder: pathlib.Path, console: Console
    ) -> None:
        adapter = jax.device_get(adapters.shrink(state.params))
        adapters.export(folder / ADAPTER, adapter)
        update = optax.tree.sub(self._merged(state), self.frozen)
        plots.draw_spectra(update, self.title, folder)
        console.print(f"{folder / ADAPTER} holds the adapter; adapters.load reads it")

    def _labels(self, adapter: Mapping[str, Any]) -> dict[str, str]:
        head = re.compile(self.source.head)
        return {path: "head" if head.search(path) else "others" for path in adapter}

    def _constants_now(self, constants: Any, seen: Any) -> Any:
        """With the sparsities of this step, where they are allocated."""
        return constants | seen.sparsity if isinstance(seen, AllocatorState) else constants

    def _merged(self, state: State) -> Any:
        known = self._constants_now(self.constants, watched(state.opt_state))
        return adapters.merge(self.frozen, state.params, known)

    def _count_wrong(
        self, frozen: Any, adapter: Any, constants: Any, x: Any, labels: jax.Array
    ) -> jax.Array:
        logits = self.source.adapted(self.config, frozen, adapter, constants, x)
        return jnp.sum(jnp.argmax(logits, axis=-1) != labels)
