"""What every regularizer can do: value, prox in a diagonal metric, support, zero test."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.trees.precision import wide_dtype


def promote(u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> tuple[jax.Array, ...]:
    """The three arguments of a prox in the precision of the first two, at least float32."""
    dtype = wide_dtype(u, metric)
    return jnp.asarray(u, dtype), jnp.asarray(metric, dtype), jnp.asarray(strength, dtype)


@dataclasses.dataclass(frozen=True)
class Regularizer(abc.ABC):
    r"""A penalty :math:`\psi` on one leaf: its value, its prox, and the structure it leaves.

    The two forms of the prox are the same problem (:math:`b = m u`),

    .. math::
        \mathrm{prox}(u, m, \tau) &= \operatorname{argmin}_w
            \tfrac12 \sum_i m_i (w_i - u_i)^2 + \tau \psi(w) \\
        \mathrm{minimise}(b, m, \tau) &= \operatorname{argmin}_w
            \tfrac12 \sum_i m_i w_i^2 - \sum_i b_i w_i + \tau \psi(w)

    and each is written in terms of the other: **a subclass overrides one of them** (a frozen
    dataclass, with `value`; the remaining methods are right as they stand for a penalty that acts
    on each entry alone). The strength is an argument, never a field, so that a schedule may drive
    it. Everything is pure, and computed in the precision of `u` and `metric`, at least float32,
    which is also the precision of the result.
    """

    constraint: ClassVar[bool] = False  # infinite somewhere: a strength of 0 does not lift it

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        concrete = not getattr(cls.value, "__isabstractmethod__", False)
        if concrete and (cls.prox, cls.minimise) == (Regularizer.prox, Regularizer.minimise):
            raise TypeError(f"{cls.__name__} must define prox or minimise: each calls the other")

    @property
    def penalizes(self) -> bool:
        """Whether the prox depends on the strength, as that of a mere constraint does not."""
        return not self.constraint

    @abc.abstractmethod
    def value(self, w: ArrayLike) -> jax.Array:
        r""":math:`\psi(w)`, a scalar, summed in float32 or better."""

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        r"""The minimiser of half the squared `metric` distance to `u` plus `strength` times psi.

        Args:
          u: the point to be moved, any shape.
          metric: positive; a scalar, or one number per entry of `u`.
          strength: scalar of at least 0, traced or not.

        Returns:
          The global minimiser, shaped like `u`; on a tie, the one nearer to zero.
        """
        u, metric, strength = promote(u, metric, strength)
        return self.minimise(metric * u, metric, strength)

    def minimise(self, b: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        """The same point from `b = metric * u`, the form in which subproblems arrive."""
        b, metric, strength = promote(b, metric, strength)
        return self.prox(b / metric, metric, strength)

    def support(self, w: ArrayLike) -> jax.Array:
        """Which pieces of structure are left: per entry, per group or per singular value."""
        return jnp.asarray(w) != 0.0

    def is_zero(self, b: ArrayLike, strength: ArrayLike) -> jax.Array:
        """Where `minimise(b, metric, strength)` is exactly zero, shaped like the support.

        Raises:
          NotImplementedError: where the answer depends on the metric too (penalties that are not
            convex); look at the minimiser itself then.
        """
        raise NotImplementedError(
            f"the zero test of {type(self).__name__} depends on the metric; "
            "use ~support(minimise(b, metric, strength))"
        )

    def dual_norm(self, y: ArrayLike) -> jax.Array:
        r""":math:`\max \{\langle y, w\rangle : \psi(w) \le 1\}`, a scalar, where psi is a norm.

        At the gradient of the loss in `w = 0` this is the smallest strength that keeps `w = 0`.

        Raises:
          NotImplementedError: where psi is not a norm.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a norm and has no dual norm")

    def coupled_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes over which psi ties entries together (inside a group, of a matrix); () for none.

        `minimise` has a closed form in a metric with ones on these axes, constant on each unit.
        """
        return ()

    def screen(self, b: ArrayLike, strength: ArrayLike) -> jax.Array:
        """Entries that iterative solvers set to zero at once, since the minimiser is zero there.

        In any metric, and broadcastable to `b`. The default screens nothing; group norms do.
        """
        return jnp.zeros((), bool)

    def group_size(self, shape: tuple[int, ...]) -> int:
        """How many entries of a leaf of this shape one element of the support stands for."""
        return 1

    def check(self, shape: tuple[int, ...]) -> None:  # noqa: B027 - most take any leaf
        """Raises ValueError, with what to do instead, if a leaf of this shape cannot take it."""
