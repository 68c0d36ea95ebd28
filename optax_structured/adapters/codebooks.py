"""Codebooks in the manner of JLCM: entries and the choice among them, learned together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.adapters.codebook_weight import (
    Backward,
    Forward,
    codebook_weight,
    footprint_bits,
    spacing,
)
from optax_structured.adapters.nodes import (
    Adapter,
    MatrixNode,
    check_axes,
    check_matrix,
    from_the_end,
)
from optax_structured.meshes import placement
from optax_structured.trees import Axes
from optax_structured.trees.precision import wide_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes(MatrixNode):
    """The trained data of `Codebook` for one matrix.

    Args:
      logits: (outputs, inputs, K).
      codebook: (G, K).
      scale: (G,).
      spec: the record that made it.
      axes: of the weight.

    Example: see `Codebook`.
    """

    logits: Any
    codebook: Any
    scale: Any
    spec: "Codebook" = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(default=Axes(), metadata={"static": True})  # noqa: RUF009

    @property
    def made_for(self) -> tuple[int, ...]:
        return self.logits.shape[1::-1]

    def constant(self, weight: jax.Array) -> jax.Array:
        return jnp.asarray(self.spec.groups_of(weight, self.axes))

    def merged(self, weight: jax.Array, constant: jax.Array) -> jax.Array:
        spec = self.spec
        w = codebook_weight(
            self.logits,
            self.codebook,
            self.scale,
            constant,
            spec.backward,
            spec.forward,
            spec.smoothing,
        )
        return self.axes.from_matrix(w.T, weight.shape)

    @property
    def bits(self) -> int:
        """What the matrix takes once its logits are codes."""
        rows, cols, entries = self.logits.shape
        return footprint_bits(rows, cols, entries, self.spec.groups)


@dataclasses.dataclass(frozen=True)
class Codebook(Adapter):
    r"""Replaces a matrix by codes of a few trained codewords for each group of rows.

    The codewords start as k-means of the weights of a group, the logits as
    :math:`-(W - c)^2 / T` with T a tenth of the squared distance of codewords. Rows are grouped by
    their standard deviation. While training, logits take K times the weight, and Adam twice that:
    adapt a layer at a time.

    Args:
      entries: K, at least 2; 16 is 4 bits.
      groups: G, at least 1.
      backward: as in `codebook_weight`.
      forward: as in `codebook_weight`; hard for what is deployed.
      smoothing: as in `codebook_weight`.
      axes: as in `LoRA`; rows of the codes are the outputs.

    Raises:
      ValueError: a number out of range, stacked weights, or more groups than outputs.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.arange(24.0).reshape(6, 4) % 3}
      >>> table = oxs.adapters.Codebook(entries=3, forward="hard")
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, table)
      >>> merged = oxs.adapters.merge(params, adapter)["kernel"]
      >>> bool(jnp.allclose(merged, params["kernel"], atol=1e-5)), adapter["kernel"].bits
      (True, 176)
    """

    entries: int = 16
    groups: int = 1
    backward: Backward = "proximal"
    forward: Forward = "soft"
    smoothing: float = 1e-2
    axes: Axes = Axes()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        check_axes("Codebook", self.axes)
        if self.entries < 2 or self.groups < 1:
            raise ValueError(
                f"Codebook takes at least 2 entries and 1 group, got entries={self.entries!r} and "
                f"groups={self.groups!r}"
            )
        if self.backward not in ("proximal", "default") or self.forward not in ("soft", "hard"):
            raise ValueError(
                "Codebook: backward is 'proximal' or 'default' and forward 'soft' or 'hard', got "
                f"{self.backward!r} and {self.forward!r}"
            )

    def check(self, shape: Sequence[int]) -> None:
        check_matrix(self.axes, shape)
        if len(self.axes.matrix_shape(shape)) > 2:
            raise ValueError("codebooks are for single matrices, not for stacks of them")
        if self.groups > self.axes.matrix_shape(shape)[1]:
            raise ValueError(f"{self.groups} groups exceed the outputs, which are the rows")

    def groups_of(self, weight: Any, axes: Axes) -> np.ndarray:
        """The group of each row, (m,) int32."""
        rows = axes.matrix_shape(weight.shape)[1]
        if self.groups == 1:
            return np.zeros(rows, np.int32)
        if isinstance(weight, jax.core.Tracer):
            raise ValueError(
                "Codebook reads the groups of rows off the weights: outside jit, call "
                "constants(params, adapter), and give merge the result"
            )
        spread = np.asarray(axes.to_matrix(weight), np.float64).std(axis=0)
        group = np.empty(rows, np.int32)
        group[np.argsort(spread, kind="stable")] = np.arange(rows) * self.groups // rows
        return group

    def init(self, key: jax.Array, weight: Any) -> Codes:
        axes, dtype = from_the_end(self.axes, weight.shape), wide_dtype(weight)
        group = self.groups_of(weight, axes)
        matrix = placement.whole_matrices(axes.to_matrix(jnp.asarray(weight, dtype))).T
        books = jnp.stack([_k_means(matrix, group == g, self.entries) for g in range(self.groups)])
        words = books[group]
        temperature = jnp.square(spacing(words)) / 10
        away = jnp.square(matrix[..., None] - words[:, None, :])
        safe = jnp.where(temperature > 0, temperature, 1.0)[:, None, None]
        return Codes(-away / safe, books, jnp.ones(self.groups, dtype), self, axes)


def _k_means(matrix: jax.Array, rows: np.ndarray, entries: int, iterations: int = 25) -> jax.Array:
    """Codewords of the weights of some rows, from evenly spaced quantiles."""
    weights = matrix[np.flatnonzero(rows)].reshape(-1)
    start = jnp.quantile(weights, jnp.linspace(0.0, 1.0, 2 * entries + 1)[1::2])

    def step(words: jax.Array, _: None) -> tuple[jax.Array, None]:
        nearest = jnp.argmin(jnp.abs(weights[:, None] - words), axis=-1)
        total = jax.ops.segment_sum(weights, nearest, entries)
        count = jax.ops.segment_sum(jnp.ones_like(weights), nearest, entries)
        return jnp.where(count > 0, total / jnp.maximum(count, 1), words), None

    words, _ = jax.lax.scan(step, start.astype(matrix.dtype), None, iterations)
    return jnp.sort(words)
