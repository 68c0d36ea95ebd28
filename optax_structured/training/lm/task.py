"""The task `lm`: what a small language model is trained on, and shows."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from optax_structured.memory import MemoryReport, memory_report
from optax_structured.training import report
from optax_structured.training.devices import Devices
from optax_structured.training.folder import Row, write_table
from optax_structured.training.history import Evaluation, History
from optax_structured.training.lm import plots, probes, recipes
from optax_structured.training.lm import text as texts
from optax_structured.training.lm.config import Config
from optax_structured.training.lm.model import Functional
from optax_structured.training.names import counted
from optax_structured.training.peers import PEERS
from optax_structured.training.task import Panel, State, Task

STATE = "state.csv"


class LanguageModel(Task):
    """Pretrain a small language model of bytes, its optimizer state in low rank.

    A step sees windows of the text drawn with replacement.
    """

    name, unit, steps_a_unit, steps_a_call, takes_mesh = "lm", "step", 1, 10, True
    recipes, config_type, located = recipes.RECIPES, Config, "text"
    compared, factors = "adamw,galore,fira,apollo,dct_adamw,ldadam", (0.3, 1.0, 3.0, 10.0)
    also_compared = ("adamw:8", "lion:8", "muon:8", "galore:8", "fira:8", "apollo:8")
    panels = (Panel("held-out perplexity", {"perplexity": "per byte"}, log=True),)

    def __init__(self, config: Config, text: texts.Text, devices: Devices | None = None) -> None:
        self.text, self.evaluate_every = text, config.evaluate_every
        self.model = Functional(config.width, config.layers, config.heads, config.stacked)
        self.structure = recipes.structure(config)
        super().__init__(config, (), devices)
        if config.batch_size % self.devices.share:
            raise ValueError(
                f"batch_size {config.batch_size} must be a multiple of the {self.devices.share} "
                "devices of the mesh that share it"
            )
        everywhere = self.devices.everywhere
        self._starts = jax.jit(self._draw_starts)
        self._held_out_losses = jax.jit(self._sum_losses, out_shardings=everywhere)
        self._probe = jax.jit(functools.partial(probes.measure, self), out_shardings=everywhere)

    @staticmethod
    def load(given: Mapping[str, Any]) -> tuple[texts.Text, dict[str, Any]]:
        text = texts.load(given["text"])
        return text, {"text_sha256": text.digest, "train_bytes": len(text.train)}

    def init_params(self, key: jax.Array) -> Any:
        return self.model.init(key)

    def optimizer(self, learning_rate: Any) -> optax.GradientTransformation:
        return recipes.build(self.config, learning_rate, self.structure)

    def batches(self, first: int, count: int) -> Any:
        """Windows of the text, (steps_a_call, batch, sequence + 1)."""
        starts = np.asarray(self._starts(self.keys()[1], np.int32(first)))
        length = self.config.sequence + 1
        windows = np.lib.stride_tricks.sliding_window_view(self.text.train, length)
        return self.devices.examples(
            (*starts.shape, length), lambda part: windows[starts[part[:2]]][..., part[2]]
        )

    def loss(self, params: Any, train: Any, batch: jax.Array) -> jax.Array:
        windows = batch.astype("int32")
        return jnp.mean(self.model.losses(params, windows[:, :-1], windows[:, 1:]))

    def held_out_loss(self, params: Any) -> float:
        """Mean negative log-likelihood of a byte, over every byte of the held-out text, in nats."""
        # Summed in float64 on the host: a float32 total of so many bytes would round.
        sums = np.asarray(self._held_out_losses(params, *self._held_out), np.float64)
        return float(np.sum(sums) / len(self.text.held_out))

    def evaluate(self, state: State, step: int) -> Evaluation:
        loss = self.held_out_loss(state.params)
        row = {
            "tokens": step * self.config.batch_size * self.config.sequence,
            "held_out_loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2),
        }
        if self.structure is None or self.config.recipe in PEERS:  # no subspaces that we know
            return Evaluation(row)
        found = self._probe(state, self.gradient(state.params, step))
        return Evaluation(row, probes.rows(jax.device_get(found), step))

    @property
    def subject(self) -> tuple[str, str]:
        return self.name, pathlib.Path(self.config.text).stem

    def describe(self) -> str:
        chosen = self.config
        size = sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state().params))
        return (
            f"{size:,} parameters (width {chosen.width}, {counted(chosen.layers, 'layer')}, "
            f"{counted(chosen.heads, 'head')}) on {self.text.origin}, "
            f"{counted(chosen.steps, 'step')} of {chosen.batch_size}×{chosen.sequence} bytes"
        )

    def network(self, state: State) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
        """From tokens and targets to the loss of each."""
        tokens, targets = (x[0] for x in self._held_out)
        return self.model.losses, state.params, (tokens, jnp.maximum(targets, 0))

    def describe_row(self, row: Row) -> str:
        pace = row["steps_per_second"] * self.config.batch_size * self.config.sequence
        return (
            f"loss {row['loss']:.3f}  perplexity {row.get('perplexity', math.nan):.3f}  "
            f"{pace:,.0f} tokens/s  state {self.memory.state_bytes:,} B"
        )

    def announce(self, console: Console) -> None:
        report.show(console, report.state_table(self.memory, console.width))

    def report(
        self, state: State, history: History, folder: pathlib.Path, console: Console
    ) -> None:
        memory, held = self.memory, sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
        numbers = ("weight_bytes", "state_bytes", "code_bytes")
        rows = [
            {
                "path": leaf.path,
                "shape": "×".join(map(str, leaf.shape)),
                "rule": leaf.rule,
                "rank": getattr(leaf.spec, "rank", ""),
                **{name: getattr(leaf, name) for name in numbers},
            }
            for leaf in memory.leaves
        ]
        write_table(folder / STATE, rows)
        console.print(
            f"optimizer state {held:,} bytes, {memory.code_bytes:,} of them in codes of 8 or 4 "
            f"bits, {held / memory.weight_bytes:.2f} times the weights "
            f"(adamw: {2 * memory.weight_bytes:,}, 2.00 times)"
        )
        if history.leaves:
            plots.draw_leaves(history.leaves, self.config.rank, self.title, folder)

    @functools.cached_property
    def memory(self) -> MemoryReport:
        """Bytes of weights and optimizer state, leaf by leaf, before anything is allocated."""
        optimizer = self.optimizer(self.config.learning_rate)
        return memory_report(optimizer, self.abstract_state().params, self.structure)

    def _draw_starts(self, key: jax.Array, first: jax.Array) -> jax.Array:
        shape, last = (self.config.batch_size,), len(self.text.train) - self.config.sequence

        def draw(step: jax.Array) -> jax.Array:
            return jax.random.randint(jax.random.fold_in(key, step), shape, 0, last)

        return jax.vmap(draw)(first + jnp.arange(self.steps_a_call))

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
        return tuple(self.devices.examples(x.shape, x.__getitem__) for x in (inputs, targets))

    def _sum_losses(self, params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        def total(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            losses = self.model.losses(params, batch[0], jnp.maximum(batch[1], 0))
            return jnp.sum(jnp.where(batch[1] < 0, 0.0, losses))

        return jax.lax.map(total, (inputs, targets))
