"""What every regularizer can do: value, prox in a diagonal metric, and the structure it leaves."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.trees.precision import wide_dtype


@dataclasses.dataclass(frozen=True)
class Regularizer(abc.ABC):
    r"""A penalty :math:`\psi` on one leaf: its value, its prox, and the structure it leaves.

    A subclass is a frozen dataclass with `value` and `prox`; the other methods are right as they
    stand for a penalty that acts on each entry alone. The strength is an argument, never a field,
    so that a schedule may drive it. Everything is pure, and computed in the precision of `u` and
    `metric`, at least float32, which is also the precision of the result.
    """

    constraint: ClassVar[bool] = False  # infinite somewhere: a strength of 0 does not lift it

    @property
    def penalizes(self) -> bool:
        """Whether the prox depends on the strength, as that of a mere constraint does not."""
        return not self.constraint

    @abc.abstractmethod
    def value(self, w: ArrayLike) -> jax.Array:
        r""":math:`\psi(w)`, a scalar, summed in float32 or better."""

    @abc.abstractmethod
    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        r"""The minimiser of half the squared distance to `u` plus `strength` times psi.

        .. math:: \mathrm{prox}(u, m, \tau) = \operatorname{argmin}_w
            \tfrac12 \sum_i m_i (w_i - u_i)^2 + \tau \psi(w)

        Args:
          u: the point to be moved, any shape.
          metric: m, positive; a scalar, or one number per entry of `u`.
          strength: scalar of at least 0, traced or not.

        Returns:
          The global minimiser, shaped like `u`; on a tie, the one nearer to zero.
        """

    def support(self, w: ArrayLike) -> jax.Array:
        """Which pieces of structure are left: per entry, per group or per singular value."""
        return jnp.asarray(w) != 0.0

    def coupled_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes over which psi ties entries together (inside a group, of a matrix); () for none.

        `prox` has a closed form in a metric with ones on these axes, constant on each unit.
        """
        return ()

    def check(self, shape: tuple[int, ...]) -> None:  # noqa: B027 - most take any leaf
        """Raises ValueError, with what to do instead, if a leaf of this shape cannot take it."""


@dataclasses.dataclass(frozen=True)
class Norm(Regularizer):
    """A regularizer that is a norm of the leaf, or one on the leaves that it allows."""

    @abc.abstractmethod
    def dual_norm(self, y: ArrayLike) -> jax.Array:
        r""":math:`\max \{\langle y, w\rangle : \psi(w) \le 1\}`, a scalar.

        At the gradient of the loss in `w = 0` this is the smallest strength that keeps `w = 0`.
        """


def promote(u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> tuple[jax.Array, ...]:
    """The three arguments of a prox in the precision of the first two, at least float32."""
    dtype = wide_dtype(u, metric)
    return jnp.asarray(u, dtype), jnp.asarray(metric, dtype), jnp.asarray(strength, dtype)


def dual_norm(regularizer: Regularizer, y: ArrayLike) -> jax.Array:
    """`Norm.dual_norm`, or TypeError for a regularizer that is not a norm."""
    if not isinstance(regularizer, Norm):
        raise TypeError(f"{type(regularizer).__name__} is not a norm and has no dual norm")
    return regularizer.dual_norm(y)


def piece_size(regularizer: Regularizer, shape: tuple[int, ...]) -> int:
    """How many entries of a leaf of this shape one element of the support stands for.

    >>> from optax_structured.regularizers.group import GroupLasso
    >>> piece_size(GroupLasso(group_axis=-2), (3, 3, 16, 32))
    288
    """
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    pieces = jax.eval_shape(regularizer.support, leaf).size
    return leaf.size // pieces if pieces else 1
