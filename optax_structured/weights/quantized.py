"""Parameters in one byte per entry, and the step that rounds them at random."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.quantization.affine import Affine
from optax_structured.quantization.checks import of_leaf
from optax_structured.quantization.codec import AffineCode
from optax_structured.quantization.rounding import cast_stochastically
from optax_structured.trees import Rules, as_rules, map_named, resolve
from optax_structured.trees.precision import at_least_float32, finite
from optax_structured.weights.base import Form, Weight, init


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight(Weight):
    """A parameter in codes.

    Args:
      code: its codes, scales and zero points.
      codec: that made them.
      shape: of the parameter.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> weight = oxs.weights.quantize_weights(jnp.linspace(-0.5, 2.05, 6).reshape(2, 3))
      >>> weight.code.codes.tolist(), weight.merged().shape
      ([[0, 51, 102], [153, 204, 255]], (2, 3))
    """

    code: AffineCode
    codec: Affine = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def merged(self) -> jax.Array:
        return self.codec.decode(self.code, self.shape)


def quantize_weights(params: Any, codec: Affine | Rules = Affine()) -> Any:  # noqa: B008  (frozen)
    r"""Stores matrices in one byte per entry, rounded to the nearest.

    Train them with a gradient with respect to the decoded weights, and `apply_updates`:

    .. math:: W = D(c), \qquad c \leftarrow E_{\text{random}}(W + U)

    Args:
      params: parameters in floating point.
      codec: an `Affine`, or `rules` of them and None. Leaves of fewer than two axes stay as they
        are. So should stacked norm scales and what is not centred at zero in its group: give them
        None.

    Returns:
      `params` with `QuantizedWeight` instead of those leaves.

    Raises:
      TypeError, ValueError: not an `Affine`, a rule for a leaf of fewer than two axes, or groups
        that would lie on several devices of a mesh.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.linspace(-1, 1, 512).reshape(16, 32), "bias": jnp.zeros(32)}
      >>> table = oxs.rules(("kernel", oxs.LowRank(rank=2)), default=None)
      >>> optimizer = oxs.q_galore(0.01, table, weights=None)
      >>> def loss(params, x):
      ...     return jnp.sum((x @ params["kernel"] + params["bias"]) ** 2)
      >>> @jax.jit
      ... def step(weights, state, x, key):
      ...     params = oxs.weights.merge(weights)
      ...     gradient = jax.grad(loss)(params, x)
      ...     updates, state = optimizer.update(gradient, state, params)
      ...     return oxs.apply_updates(weights, updates, key), state
      >>> weights, state = oxs.weights.quantize_weights(params), optimizer.init(params)
      >>> weights, state = step(weights, state, jnp.ones((2, 16)), jax.random.key(0))
      >>> weights["kernel"].code.codes.dtype, weights["bias"].dtype
      (dtype('uint8'), dtype('float32'))

    Reference: Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, whose groups do
    not contain 0 (`Affine(published=True)`): one that is all positive is cut off there.
    """
    structure: Any = jax.tree.structure(params)
    return init(params, structure.unflatten(resolve(weight_codecs(codec), params)))


def apply_updates(weights: Any, updates: Any, key: jax.Array) -> Any:
    """Adds updates to weights in codes and rounds at random: `optax.apply_updates` for them.

    With fresh scales, and up or down such that the expectation is the sum. bfloat16 leaves are
    rounded at random as well, by `cast_stochastically`; all others are added to as usual. An entry
    of an update for codes that is not finite counts as zero.

    Args:
      weights: from `quantize_weights`, or any parameters.
      updates: of an optimizer, with the structure of the parameters.
      key: random key of this step, such as `fold_in(key(0), step)`; each leaf derives its own from
        its path. The same on all replicas, or they drift apart.

    Returns:
      The new weights.

    Equals `keep_on_grid(seed=s)` with the key `fold_in(key(s), step)`, to rounding.

    Example: see `quantize_weights`.
    """

    def add(path: str, update: jax.Array, weight: Any) -> Any:
        if isinstance(weight, QuantizedWeight):
            with of_leaf("apply_updates: the weight", path):
                moved = Grid(weight.codec).moved(weight.merged(), update, key_of(path, key))
            return dataclasses.replace(weight, code=moved)
        weight = jnp.asarray(weight)
        total = at_least_float32(weight) + update
        if weight.dtype == jnp.bfloat16:
            return cast_stochastically(total, key_of(path, key))
        return total.astype(weight.dtype)

    return map_named(add, updates, weights)


@dataclasses.dataclass(frozen=True)
class Grid(Form):
    """A codec as a value of `rules` over parameters."""

    codec: Affine

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError for leaves that cannot be stored in codes."""
        if len(shape) < 2 or math.prod(shape) == 0:
            raise ValueError(
                f"weights in {self.codec!r} are matrices; biases and norm scales stay in floating "
                "point, with None"
            )

    def __repr__(self) -> str:
        return repr(self.codec)

    def init(self, path: str, leaf: Any) -> QuantizedWeight:
        with of_leaf("quantize_weights: the weight", path):
            return QuantizedWeight(self.codec.encode(leaf), self.codec, jnp.shape(leaf))

    def moved(self, weight: jax.Array, update: jax.Array, key: jax.Array | None) -> AffineCode:
        """The codes of a weight after an update."""
        return self.codec.encode(weight + finite(update).astype(weight.dtype), key=key)


def weight_codecs(codec: Any) -> Rules:
    """The table of `Grid` that a codec, or rules of them and None, stands for."""

    def grid(value: Any) -> Grid | None:
        if value is None:
            return None
        if not isinstance(value, Affine):
            raise TypeError(
                f"weights are stored by Affine(bits=8), or rules of it and None; got {value!r}"
            )
        return Grid(value)

    return as_rules(codec).mapped(grid)


def key_of(path: str, key: jax.Array) -> jax.Array:
    """The key of one leaf: the same on all replicas, and after a restore."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
