"""The compiled parts of a run: many steps at once, accuracy, structure, gradient."""

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structured import diagnostics
from optax_structured.proximal import Stages, prox_point
from optax_structured.regularizers import NuclearNorm
from optax_structured.training.images import models, recipes_table
from optax_structured.training.images.config import Config
from optax_structured.training.images.data import Images
from optax_structured.training.state_bits import codec_of, with_moments
from optax_structured.trees import named_leaves, resolve

_TEST_BATCH = 500
_GRADIENT_IMAGES = 10_000


class State(NamedTuple):
    """All that changes from step to step, but for the step itself."""

    params: Any
    opt_state: Any


class Summary(NamedTuple):
    """Where a run stands, over the training images (at most 10 000 of them)."""

    rows: list[diagnostics.LayerRow]  # of the parameters
    point_rows: list[diagnostics.LayerRow]
    objective: jax.Array  # ()
    stationarity: jax.Array  # (): distance of the parameters to it
    strength_max: jax.Array  # (): largest dual norm of the gradient of a leaf


class Experiment:
    """One configuration made ready to run on one data set.

    Images stay on the device as they are stored, and are standardised batch by batch. The order of
    the data is a function of seed and epoch alone.
    """

    def __init__(self, config: Config, images: Images) -> None:
        self.config, self.images = config, images
        self.steps_per_epoch = len(images.train) // config.batch_size
        self.recipe = recipes_table.find(config.recipe)
        self.structure = recipes_table.structure(config.regularizer)
        self.model = models.make(config.model, images.train.shape[1:], len(images.classes))
        hyper = recipes_table.Hyperparameters(
            config.learning_rate, config.strength, config.momentum, config.eps
        )
        stages = Stages(tuple(m * self.steps_per_epoch for m in config.milestones))
        build = with_moments(self.recipe.build, codec_of(config.state_bits))
        self.optimizer = build(hyper, self.structure, stages)
        self._train = jax.device_put((images.train, images.train_labels))
        self._steps = jax.jit(self._run_steps, donate_argnums=0)
        self._initial = jax.jit(self._make_state)
        self._summary = jax.jit(self._summarise)
        self._correct = jax.jit(self._count_correct)
        self.structure_of = jax.jit(self._structure_of)
        self.strips = jax.jit(self._strips)

    def for_seed(self, seed: int) -> "Experiment":
        """The same experiment from another seed; what is compiled is shared."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, seed=seed)
        return other

    def init(self) -> State:
        """The state before the first step."""
        key, _ = self._keys()
        return self._initial(key)

    def order(self, epoch: int) -> np.ndarray:
        """Which images each step of an epoch sees, (steps, batch); a last partial batch is left."""
        _, key = self._keys()
        key = jax.random.fold_in(key, epoch)
        chosen = jax.random.permutation(key, len(self.images.train))
        shape = self.steps_per_epoch, self.config.batch_size
        return np.asarray(chosen[: shape[0] * shape[1]]).reshape(shape)

    def steps(self, state: State, order: np.ndarray) -> tuple[State, jax.Array]:
        """As many steps as `order` has rows, in one call; `state` is donated. The losses, too."""
        return self._steps(state, order, *self._train)

    def point(self, state: State) -> Any:
        """The prox point; of recipes that do not average, the parameters themselves."""
        return prox_point(state.opt_state) if self.recipe.averages else state.params

    def accuracy(self, params: Any) -> float:
        """Share of the test images that are classified correctly."""
        return float(self._correct(params, *self._test)) / len(self.images.test)

    def summary(self, state: State) -> Summary:
        """Layers, objective and distance to stationarity."""
        used = min(len(self.images.train), _GRADIENT_IMAGES) // self.config.batch_size
        order = np.arange(used * self.config.batch_size).reshape(used, -1)
        return self._summary(state.params, self.point(state), order, *self._train)

    def _make_state(self, key: jax.Array) -> State:
        params = models.init(self.model, self.images.train.shape[1:], key)
        return State(params, self.optimizer.init(params))

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

    def _keys(self) -> jax.Array:
        """For the initial parameters, and for the order of the data."""
        return jax.random.split(jax.random.key(self.config.seed))

    def _logits(self, params: Any, x: jax.Array) -> Any:
        return self.model.apply({"params": params}, self.images.standardise(x))

    def _loss(self, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        return models.cross_entropy(self._logits(params, x), labels)

    def _run_steps(
        self, state: State, order: jax.Array, x: jax.Array, labels: jax.Array
    ) -> tuple[State, jax.Array]:
        def step(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
            params, opt_state = state
            loss, gradient = jax.value_and_grad(self._loss)(params, x[rows], labels[rows])
            updates, opt_state = self.optimizer.update(gradient, opt_state, params)
            return State(optax.apply_updates(params, updates), opt_state), loss

        return jax.lax.scan(step, state, order)

    def _summarise(
        self, params: Any, point: Any, order: jax.Array, x: jax.Array, labels: jax.Array
    ) -> Summary:
        def add(total: Any, rows: jax.Array) -> tuple[Any, None]:
            found = jax.value_and_grad(self._loss)(params, x[rows], labels[rows])
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
            diagnostics.strength_max(gradient, structure),
        )

    @functools.cached_property
    def _test(self) -> tuple[jax.Array, jax.Array]:
        """The test images in equal batches; padding has a label that no class has."""
        size = min(_TEST_BATCH, len(self.images.test))
        missing = -len(self.images.test) % size
        x = np.pad(self.images.test, ((0, missing), *((0, 0),) * 3))
        labels = np.pad(self.images.test_labels, (0, missing), constant_values=-1)
        return jax.device_put((x.reshape(-1, size, *x.shape[1:]), labels.reshape(-1, size)))

    def _count_correct(self, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        def count(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.sum(jnp.argmax(self._logits(params, batch[0]), axis=-1) == batch[1])

        return jnp.sum(jax.lax.map(count, (x, labels)))
