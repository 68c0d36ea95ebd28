"""The task `images`: what a network that ends up exactly structured is trained on, and shows."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from optax_structured import diagnostics
from optax_structured.proximal import prox_point
from optax_structured.regularizers import NuclearNorm
from optax_structured.step_sizes import Stages
from optax_structured.training import report
from optax_structured.training.epochs import EpochTask
from optax_structured.training.folder import Row
from optax_structured.training.history import Evaluation, History
from optax_structured.training.images import data, models, plots, recipes
from optax_structured.training.images.config import Config
from optax_structured.training.names import counted
from optax_structured.training.peers import KNOWN
from optax_structured.training.task import Cost, Panel, State
from optax_structured.transforms import skip_nonfinite
from optax_structured.trees import named_leaves, resolve

_TEST_BATCH = 500
_GRADIENT_IMAGES = 10_000


class Summary(NamedTuple):
    """Where a run stands, over the training images (at most 10 000 of them)."""

    rows: list[diagnostics.LayerRow]  # of the parameters
    point_rows: list[diagnostics.LayerRow]
    objective: jax.Array  # ()
    stationarity: jax.Array  # (): distance of the parameters to it


class Images(EpochTask):
    """Classify images with a network that ends up exactly structured.

    Images stay on the device as they are stored, and are standardised batch by batch.
    """

    name, steps_a_call = "images", 120
    recipes, config_type, located = recipes.RECIPES, Config, "data_dir"
    compared, factors = "adamw,prox_sgd,prox_adam,rmda,ramda", (1.0,)

    def __init__(self, config: Config, images: data.Images) -> None:
        self.images = images
        self.steps_a_unit = self.evaluate_every = config.steps_per_epoch
        self.milestones = tuple(m * config.steps_per_epoch for m in config.milestones)
        self.averages = KNOWN[config.recipe].averages
        self.structure = recipes.structure(config.regularizer)
        self.model = models.make(config.model, images.train.shape[1:], len(images.classes))
        self.measure, name = recipes.REGULARIZERS[config.regularizer]
        self.panels = [
            Panel("test error", {"error": "W", "point_error": "Ŵ"}, percent=True, log=True),
            Panel(name, {self.measure: "W", f"point_{self.measure}": "Ŵ"}, percent=True),
        ]
        self.costs = (
            Cost(self.measure, name, "zeros", percent=True, more_is_better=True),
            *super().costs[1:],
        )
        super().__init__(config, (images.train, images.train_labels))
        self._summary = jax.jit(self._summarise)
        self._wrong = jax.jit(self._count_wrong)
        self.structure_of = jax.jit(self._structure_of)
        self.strips = jax.jit(self._strips)

    @staticmethod
    def load(given: Mapping[str, Any]) -> tuple[data.Images, dict[str, Any]]:
        images = data.load(given["data"], given["data_dir"])
        return images, {"train_size": len(images.train)}

    def init_params(self, key: jax.Array) -> Any:
        return models.init(self.model, self.images.train.shape[1:], key)

    def optimizer(self, learning_rate: Any) -> Any:
        stages = Stages(self.milestones)
        return skip_nonfinite(recipes.build(self.config, learning_rate, self.structure, stages))

    def loss(self, params: Any, train: Any, batch: jax.Array) -> jax.Array:
        x, labels = train
        return models.cross_entropy(self._logits(params, x[batch]), labels[batch])

    def point(self, state: State) -> Any:
        """The prox point; of recipes that do not average, the parameters themselves."""
        return prox_point(state.opt_state) if self.averages else state.params

    def network(self, state: State) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
        """From images as they are stored to logits, with the prox point as parameters."""
        return self._logits, self.point(state), (self.images.test[: self.config.batch_size],)

    def error(self, params: Any) -> float:
        """Share of the test images that are classified wrongly."""
        return float(self._wrong(params, *self._test)) / len(self.images.test)

    def score_error(self, score: float) -> float:
        return math.sqrt(score * (1 - score) / len(self.images.test))

    def watch(self, state: State) -> Row:
        of_w, of_point = self.structure_of(state.params), self.structure_of(self.point(state))
        found = {**of_w, **{f"point_{name}": value for name, value in of_point.items()}}
        return {name: float(value) for name, value in jax.device_get(found).items()}

    def evaluate(self, state: State, step: int) -> Evaluation:
        point = self.point(state)
        row = {
            "epoch": step // self.steps_a_unit,
            "error": self.error(state.params),
            "point_error": self.error(point),
        }
        return Evaluation(row, strips=self.strips(point))

    def summary(self, state: State) -> Summary:
        """Layers, objective and distance to stationarity."""
        used = min(len(self.images.train), _GRADIENT_IMAGES) // self.config.batch_size
        order = np.arange(used * self.config.batch_size).reshape(used, -1)
        return self._summary(state.params, self.point(state), order, self.train)

    @property
    def subject(self) -> tuple[str, str]:
        return self.config.model, self.config.data

    def describe(self) -> str:
        chosen = self.config
        stages = f"stages end after epochs {', '.join(map(str, chosen.milestones))}"
        return (
            f"{chosen.model} on {chosen.data}, {chosen.regularizer}, "
            f"{counted(chosen.epochs, 'epoch')} of batches of {chosen.batch_size}, "
            f"{stages if chosen.milestones else 'one stage'}"
        )

    def describe_row(self, row: Row) -> str:
        return (
            f"loss {row['loss']:.3f}  error {row.get('error', math.nan):.1%}  "
            f"zero {row[self.measure]:.0%} (Ŵ {row['point_' + self.measure]:.0%})  "
            f"{row['steps_per_second']:.0f}/s"
        )

    def announce(self, console: Console) -> None:
        if strength := self.config.strength:
            rows = self.summary(self.init()).rows
            held = [(float(r.strength_max), r) for r in rows if r.strength_max is not None]
            scale, row = min(held, key=lambda pair: pair[0])
            console.print(
                f"the strength is {strength / scale:.2%} of {scale:.3g}, the dual norm of the "
                f"gradient of {row.path}, the smallest at the initial weights: near it a layer "
                "vanishes, and the network with it"
            )

    def report(
        self, state: State, history: History, folder: pathlib.Path, console: Console
    ) -> None:
        summary, chosen = self.summary(state), self.config
        rows = summary.rows, summary.point_rows
        report.show(console, report.layer_table(*rows, chosen.strength, console.width))
        console.print(
            f"objective {summary.objective:.5f}, "
            f"distance to stationarity {summary.stationarity:.2e}"
        )
        if history.strips:
            plots.draw_layers(
                history.strips, summary.point_rows, chosen.milestones, self.title, folder
            )

    def _structure_of(self, tree: Any) -> dict[str, jax.Array]:
        """The structure metrics of parameters or of a prox point."""
        return {
            "unstructured": diagnostics.unstructured_sparsity(tree),
            "structured": diagnostics.structured_sparsity(tree, self.structure),
            "weighted": diagnostics.weighted_sparsity(tree, self.structure),
            "low_rank": diagnostics.low_rank_level(tree, self.structure),
        }

    def _strips(self, tree: Any) -> dict[str, jax.Array]:
        """What a picture of each layer shows: the share that is left of each input or rank."""

        def strip(leaf: jax.Array, spec: Any) -> jax.Array:
            if isinstance(spec, NuclearNorm):
                return spec.support(leaf).astype("float32").ravel()
            alive = spec.support(leaf) if spec is not None else leaf != 0.0
            inside = [axis for axis in range(alive.ndim - 1) if axis != alive.ndim - 2]
            entrywise = alive.ndim == leaf.ndim
            return jnp.mean(alive, axis=(*inside, -1)) if entrywise else alive.astype("float32")

        named = zip(named_leaves(tree), resolve(self.structure, tree), strict=True)
        return {path: strip(leaf, spec) for (path, leaf), spec in named if leaf.ndim > 1}

    def _logits(self, params: Any, x: jax.Array) -> Any:
        return self.model.apply({"params": params}, self.images.standardise(x))

    def _summarise(self, params: Any, point: Any, order: jax.Array, train: Any) -> Summary:
        def add(total: Any, rows: jax.Array) -> tuple[Any, None]:
            found = jax.value_and_grad(self.loss)(params, train, rows)
            return jax.tree.map(jnp.add, total, found), None

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zero, order)
        loss, gradient = jax.tree.map(lambda leaf: leaf / len(order), total)
        structure, strength = self.structure, self.config.strength
        return Summary(
            diagnostics.layer_rows(params, structure, gradient),
            diagnostics.layer_rows(point, structure),
            diagnostics.objective(loss, params, structure, strength),
            diagnostics.stationarity(params, gradient, structure, strength),
        )

    @functools.cached_property
    def _test(self) -> tuple[jax.Array, jax.Array]:
        """The test images in equal batches; padding has a label that no class has."""
        size = min(_TEST_BATCH, len(self.images.test))
        missing = -len(self.images.test) % size
        x = np.pad(self.images.test, ((0, missing), *((0, 0),) * 3))
        labels = np.pad(self.images.test_labels, (0, missing), constant_values=-1)
        return jax.device_put((x.reshape(-1, size, *x.shape[1:]), labels.reshape(-1, size)))

    def _count_wrong(self, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        def count(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            found = jnp.argmax(self._logits(params, batch[0]), axis=-1)
            return jnp.sum((found != batch[1]) & (batch[1] >= 0))

        return jnp.sum(jax.lax.map(count, (x, labels)))
