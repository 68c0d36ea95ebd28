"""SNELL and SNELLA: sparse updates of high rank from distances between two thin factors."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from optax_structured.adapters.nodes import (
    Adapter,
    MatrixNode,
    check_axes,
    check_matrix,
    check_rank,
    from_the_end,
    matrix_of,
)
from optax_structured.trees import Axes
from optax_structured.trees.precision import at_least_float32, wide_dtype
from optax_structured.xla.quantile import quantile, ranked

Rule = Literal["hard", "soft"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel(MatrixNode):
    r"""The trained data of `SNELL` and `SNELLA` for one weight.

    Args:
      inputs: (\*batch, H, n_in, q).
      outputs: (\*batch, H, n_out, q).
      mixing: (\*batch, 3): the scalars alpha, gamma and beta of `SNELLA`; None for `SNELL`.
      sparsity: share of zeros unless the `constants` bring another; None for no sparsification.
      rule: see `SNELL`.
      axes: of the weight.

    Example: see `SNELL`.
    """

    inputs: Any
    outputs: Any
    mixing: Any = None
    sparsity: float | None = dataclasses.field(default=None, metadata={"static": True})
    rule: Rule = dataclasses.field(default="hard", metadata={"static": True})
    axes: Axes = dataclasses.field(default=Axes(), metadata={"static": True})  # noqa: RUF009

    @property
    def made_for(self) -> tuple[int, ...]:
        *batch, _, inputs, _ = self.inputs.shape
        return (*batch, inputs, self.outputs.shape[-2])

    def constant(self, weight: jax.Array) -> jax.Array | None:
        if self.sparsity is None:
            return None
        return jnp.full(self.inputs.shape[:-3], self.sparsity, self.inputs.dtype)

    def merged(self, weight: jax.Array, constant: jax.Array | None) -> jax.Array:
        # Recomputed in the backward pass: only the factors are kept from the forward one.
        update = jax.checkpoint(Kernel.update)(self, constant)
        wide = at_least_float32(weight)
        return wide + self.axes.from_matrix(update, weight.shape).astype(wide.dtype)

    def dense(self) -> jax.Array:
        r"""D, (\*batch, n_in, n_out), before sparsification."""
        x, y = self.inputs[..., :, None, :], self.outputs[..., None, :, :]
        squared = jnp.sum(jnp.square(x - y), axis=-1)
        near = squared == 0.0  # the derivative of a root is infinite there: taken for 0
        distance = jnp.where(near, 0.0, jnp.sqrt(jnp.where(near, 1.0, squared)))
        signs = jnp.where(jnp.arange(distance.shape[-3]) % 2 == 0, 0.1, -0.1)
        dense = jnp.sum(signs[:, None, None].astype(distance.dtype) * distance, axis=-3)
        if self.mixing is None:
            return dense
        alpha, gamma, beta = jnp.moveaxis(self.mixing, -1, 0)[..., None, None]
        return dense + alpha * jax.nn.softmax(dense / gamma, axis=-1) + beta

    def update(self, sparsity: jax.Array | None) -> jax.Array:
        """What is added to the matrix of the weight."""
        dense = self.dense()
        if sparsity is None:
            return dense
        return sparsified(dense, sparsity, self.rule)


@dataclasses.dataclass(frozen=True)
class SNELL(Adapter):
    r"""Trains two thin factors whose distances, sparsified, are added to a weight.

    .. math:: D_{ij} = \sum_{h=1}^{H} \pm 0.1\, \|A_{h,i} - B_{h,j}\|_2, \qquad
        S_{ij} = D_{ij} |D_{ij}|\, 1[|D_{ij}| > t]

    with t the quantile of :math:`|D|` at the sparsity, and :math:`|D|` and t without gradient. The
    rank of D is not bounded by r. Since S is quadratic in D, the model starts very nearly as the
    pretrained one, and gradients are tiny: use Adam, not SGD.

    Zeros save neither time nor memory. D is recomputed in the backward pass; its quantile is some
    thirty passes over every weight at each step.

    Args:
      rank: r, shared by the H chunks, a multiple of H; 8 to 32.
      sparsity: share of zeros in S, in [0, 1); 0.3 to 0.9. None adds D itself (KLoRA), neither
        sparse nor squared. A traced one for each weight comes in by `constants`.
      rule: `"hard"` as in the code; `"soft"` as in the paper,
        :math:`S = D \max(|D| - t, 0)` with t the entry of that rank.
      chunks: H, at least 1; 2.
      axes: as in `LoRA`.

    Raises:
      TypeError, ValueError: a rank that the chunks do not divide, a sparsity out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params, adapters = {"kernel": jnp.zeros((6, 5))}, oxs.adapters
      >>> adapter = adapters.init(jax.random.key(0), params, adapters.SNELL(4, sparsity=0.9))
      >>> int(jnp.sum(adapters.merge(params, adapter)["kernel"] != 0))
      3

    Reference: Shen et al., `SNELL <https://arxiv.org/abs/2411.01800>`_, 2024. The paper says that
    a share s of the weights stays; its formula and the code keep 1 - s, as here.
    """

    rank: int
    sparsity: float | None = 0.9
    rule: Rule = "hard"
    chunks: int = 2
    axes: Axes = Axes()  # noqa: RUF009  (frozen)

    mixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_rank(name, self.rank)
        check_axes(name, self.axes)
        if self.chunks < 1 or self.rank % self.chunks:
            raise ValueError(
                f"{name}: the rank is shared by the chunks, and {self.chunks} does not divide "
                f"{self.rank}"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"{name}(sparsity=...) is in [0, 1) or None, got {self.sparsity!r}")
        if self.rule not in ("hard", "soft"):
            raise ValueError(f"{name}(rule=...) is 'hard' or 'soft', got {self.rule!r}")

    def check(self, shape: Sequence[int]) -> None:
        check_matrix(self.axes, shape)

    def init(self, key: jax.Array, weight: Any) -> Kernel:
        axes, dtype = from_the_end(self.axes, weight.shape), wide_dtype(weight)
        batch, inputs, outputs = matrix_of(axes, weight.shape)
        q = self.rank // self.chunks

        def factor(key: jax.Array, n: int) -> jax.Array:
            bound = 1 / math.sqrt(n * q)
            return jax.random.uniform(key, (*batch, self.chunks, n, q), dtype, -bound, bound)

        one, other = jax.random.split(key)
        start = jnp.broadcast_to(jnp.array([1.0, 1.0, 0.0], dtype), (*batch, 3))
        mixing = start if self.mixed else None
        return Kernel(
            factor(one, inputs), factor(other, outputs), mixing, self.sparsity, self.rule, axes
        )


@dataclasses.dataclass(frozen=True)
class SNELLA(SNELL):
    r"""`SNELL` with a softmax over the outputs in its kernel; its sparsity is shared out by weight.

    .. math:: D = F + \alpha \operatorname{softmax}_j(F / \gamma) + \beta

    with F the kernel of `SNELL` and three trained scalars, 1, 1 and 0 at the start. See
    `SparsityAllocator` for sparsities that follow the importance of each weight.

    Args:
      rank: as in `SNELL`; 32.
      sparsity: as in `SNELL`; that of the first steps, where an allocator brings others.
      rule: as in `SNELL`.
      chunks: as in `SNELL`.
      axes: as in `SNELL`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.zeros((6, 5))}
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.SNELLA(4))
      >>> adapter["kernel"].mixing
      Array([1., 1., 0.], dtype=float32)

    Reference: Shen et al., `SNELLA <https://arxiv.org/abs/2510.24037>`_, 2025; from their code.
    """

    sparsity: float | None = 0.01

    mixed: ClassVar[bool] = True


def sparsified(dense: jax.Array, sparsity: jax.Array, rule: Rule) -> jax.Array:
    r"""S of D, (\*batch, n_in, n_out), with a sparsity (\*batch,) that may be traced."""
    size = jax.lax.stop_gradient(jnp.abs(dense))
    flat = size.reshape(*dense.shape[:-2], -1)
    if rule == "hard":
        threshold = quantile(flat, sparsity)[..., None, None]
        return jnp.where(size > threshold, dense * size, 0.0)
    n = flat.shape[-1]
    place = jnp.clip(jnp.ceil(sparsity * n).astype(jnp.int32) - 1, 0, n - 1)
    # At a sparsity of 0 nothing is cut off.
    threshold = jnp.where(sparsity > 0, ranked(flat, place), 0.0)[..., None, None]
    return dense * jnp.maximum(size - threshold, 0.0)
