"""LoRA: the update of a weight as a product of two thin factors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from optax_structured.adapters.nodes import (
    Adapter,
    MatrixNode,
    check_axes,
    check_matrix,
    check_rank,
    from_the_end,
    is_node,
    matrix_of,
)
from optax_structured.meshes import placement
from optax_structured.trees import Axes
from optax_structured.trees.precision import at_least_float32, wide_dtype
from optax_structured.xla.by_matrix import by_matrix

Start = Literal["zero", "svd"]


class StartFactors(NamedTuple):
    """The factors that a `Pair` with `start="svd"` began with."""

    a: jax.Array  # (*batch, r, inputs): function of the weight alone
    b: jax.Array  # (*batch, outputs, r): likewise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair(MatrixNode):
    r"""Two factors of the update of one weight, as in `lora_A` and `lora_B`.

    .. math:: W = W_0 + s\, b a \quad (\text{outputs} \times \text{inputs})

    Args:
      a: (\*batch, r, inputs).
      b: (\*batch, outputs, r).
      scale: s.
      axes: the axes of the weight; rows are its inputs, columns its outputs.
      start: how many of the leading singular triplets of the weight the factors began with; their
        product is subtracted.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> pair = oxs.adapters.Pair(jnp.ones((1, 3)), jnp.ones((2, 1)), scale=0.5)
      >>> pair.product().shape
      (2, 3)
    """

    a: Any
    b: Any
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    axes: Axes = dataclasses.field(default=Axes(), metadata={"static": True})  # noqa: RUF009
    start: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """r."""
        return self.b.shape[-1]

    def product(self) -> jax.Array:
        r"""s b a, (\*batch, outputs, inputs)."""
        return self.scale * placement.product(self.b, self.a)

    @property
    def made_for(self) -> tuple[int, ...]:
        *batch, _, inputs = self.a.shape
        return (*batch, inputs, self.b.shape[-2])

    def constant(self, weight: jax.Array) -> StartFactors | None:
        return leading_factors(weight, self.axes, self.start, self.scale) if self.start else None

    def merged(self, weight: jax.Array, constant: StartFactors | None) -> jax.Array:
        update = _inputs_by_outputs(self.a, self.b)
        if constant is not None:
            update = update - _inputs_by_outputs(*jax.lax.stop_gradient(constant))
        wide = at_least_float32(weight)
        moved = self.axes.from_matrix(self.scale * update, weight.shape).astype(wide.dtype)
        return wide + placement.like(moved, wide)


@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
    r"""Trains two factors of rank r beside a frozen weight.

    .. math:: W = W_0 + s\, b a, \qquad s = \alpha / r \;\text{ or }\; \alpha / \sqrt r

    With `start="zero"` b = 0 and :math:`a \sim U(-1/\sqrt{n}, 1/\sqrt{n})`, n inputs. With
    `start="svd"` both factors hold the leading singular triplets of the weight and
    :math:`W = W_0 + s (b a - b_0 a_0)`. Either way the adapted model starts as the pretrained one.

    Args:
      rank: r, at least 1; 8 to 64.
      alpha: numerator of the scale; default twice the rank.
      scaling: `"linear"` for alpha / r, `"root"` for alpha / sqrt(r), which keeps large ranks
        trainable.
      start: `"zero"` or `"svd"`.
      axes: which axes of the weight are inputs (rows) and outputs (cols); the others are batch
        axes. The default suits kernels of flax and stacks of them; a convolution is
        `Axes((0, 1, 2), 3)`, a layout (out, in) is `Axes(-1, -2)`.

    Raises:
      TypeError, ValueError: a rank, scale or start out of range; on a weight whose smaller side is
        below the rank.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.LoRA(rank=2))
      >>> adapter["kernel"].a.shape, adapter["kernel"].b.shape
      ((2, 6), (4, 2))

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2022; Kalajdzievski, `rsLoRA
      <https://arxiv.org/abs/2312.03732>`_, 2023; Meng et al., `PiSSA
      <https://arxiv.org/abs/2404.02948>`_, 2024, which changes the frozen weight; here it stays.
    """

    rank: int
    alpha: float | None = None
    scaling: Literal["linear", "root"] = "linear"
    start: Start = "zero"
    axes: Axes = Axes()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        check_rank("LoRA", self.rank)
        check_axes("LoRA", self.axes)
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"LoRA(alpha=...) must be above 0, got {self.alpha!r}")
        if self.scaling not in ("linear", "root"):
            raise ValueError(f"LoRA(scaling=...) is 'linear' or 'root', got {self.scaling!r}")
        if self.start not in get_args(Start):
            raise ValueError(f"LoRA(start=...) is 'zero' or 'svd', got {self.start!r}")

    @property
    def scale(self) -> float:
        """s."""
        alpha = 2.0 * self.rank if self.alpha is None else float(self.alpha)
        return alpha / (self.rank if self.scaling == "linear" else math.sqrt(self.rank))

    def check(self, shape: Sequence[int]) -> None:
        check_matrix(self.axes, shape, self.rank)

    def init(self, key: jax.Array, weight: Any) -> Pair:
        shape, dtype = weight.shape, wide_dtype(weight)
        axes = from_the_end(self.axes, shape)
        if self.start == "svd":
            first = leading_factors(weight, axes, self.rank, self.scale)
            return Pair(first.a, first.b, self.scale, axes, self.rank)
        batch, inputs, outputs = matrix_of(axes, shape)
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(key, (*batch, self.rank, inputs), dtype, -bound, bound)
        b = jnp.zeros((*batch, outputs, self.rank), dtype)
        return Pair(*_at_home(a, b, weight, axes), self.scale, axes)


def is_pair(x: Any) -> bool:
    """Whether a node of an adapter is a `Pair`."""
    return isinstance(x, Pair)


def map_pairs(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Applies a function to the pairs of an adapter; its other nodes are those of the last tree."""
    return jax.tree.map(
        lambda node, *more: f(node, *more) if is_pair(node) else (node, *more)[-1],
        tree,
        *rest,
        is_leaf=is_node,
    )


def with_factors(pair: Pair, a: Any, b: Any) -> Pair:
    """A pair with other arrays."""
    return dataclasses.replace(pair, a=a, b=b)


def leading_factors(weight: jax.Array, axes: Axes, rank: int, scale: float) -> StartFactors:
    r"""The best two factors of a weight: s b a is its nearest matrix of this rank."""
    matrix = axes.to_matrix(at_least_float32(weight))
    u, s, vt = by_matrix(lambda x: jnp.linalg.svd(x, full_matrices=False), matrix)
    root = jnp.sqrt(s[..., :rank] / scale)
    a = root[..., None] * jnp.swapaxes(u[..., :rank], -1, -2)
    b = jnp.swapaxes(vt[..., :rank, :], -1, -2) * root[..., None, :]
    return StartFactors(*jax.lax.stop_gradient(_at_home(a, b, weight, axes)))


def _inputs_by_outputs(a: jax.Array, b: jax.Array) -> jax.Array:
    return placement.product(a, b, transpose_a=True, transpose_b=True)


def _at_home(a: jax.Array, b: jax.Array, weight: Any, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Factors sharded like the axes of the weight that they meet, where those are known."""
    place = placement.home(weight)
    if place is None:
        return a, b
    mesh, spec = place
    batch, rows, cols = axes.split(weight.shape)
    lead = [spec[axis] for axis in batch]
    return (
        placement.put(a, mesh, (*lead, (), spec[rows[0]])),
        placement.put(b, mesh, (*lead, spec[cols[0]], ())),
    )
