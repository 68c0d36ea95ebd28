"""Penalties on groups of entries that live or die together: one group per index of an axis."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Norm, promote
from optax_structured.regularizers.entrywise import soft
from optax_structured.regularizers.groups import Grouped
from optax_structured.regularizers.secular import solve_group
from optax_structured.trees.checks import check_fraction
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class ShrunkGroups(Grouped):
    """Penalties whose prox is that of a sum of norms, after a step that acts on each entry."""

    @abc.abstractmethod
    def shrunk(self, b: jax.Array, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
        """b and t such that the prox minimises half wPw, less bw, plus t times the norm of w.

        A group is zero iff the norm of its new b is at most t, for every metric.

        Args:
          b: P u, the linear term.
          strength: that of the penalty, a scalar.
        """

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        return self.minimise(metric * u, metric, strength)

    def minimise(self, b: jax.Array, metric: jax.Array, strength: jax.Array) -> jax.Array:
        """`prox(b / metric, metric, strength)` without the division."""
        b, threshold = self.shrunk(b, strength)
        return solve_group(b, metric, threshold, self.coupled_axes(b.ndim))


@dataclasses.dataclass(frozen=True)
class GroupLasso(ShrunkGroups, Norm):
    r"""The sum of the groups' norms: whole rows, columns, channels or heads become zero.

    .. math:: \psi(w) = \sum_g \omega \|w_g\|_2, \qquad
        \mathrm{prox}(u, m, \tau)_i = \frac{m_i u_i}{m_i + \tau\omega / \|w_g\|}

    with :math:`\|w_g\|` the root of one scalar equation per group, solved to rounding error by
    `solve_group`; for a scalar metric this is
    :math:`u_g \max(0, 1 - \tau\omega/(m\|u_g\|))`. A group is zero iff
    :math:`\|m_g u_g\| \le \tau\omega`, for every metric; the dual norm is
    :math:`\max_g \|y_g\|/\omega`. Equals `L1` on groups of one entry.

    Args:
      group_axis: the axis, or axes, that number the groups, one group per index; all other axes
        are inside. `-2` gives one group per input of a dense (in, out) or convolution
        (h, w, in, out) kernel. `()`: the whole leaf is one group.
      batch_axis: axes of stacked layers, which number further groups; default none.
      weight: :math:`\omega`, above 0; default the square root of the group size.

    Raises:
      TypeError: axes that are not ints.
      ValueError: a weight that is not above 0; from `check`, a leaf without these axes or with
        none left inside the group (a bias: use `L1` or leave it plain).

    References:
      Yuan and Lin, Model selection and estimation in regression with grouped variables, JRSS B,
      2006. The metric form: Deleu and Bengio, Structured sparsity inducing adaptive optimizers
      for deep learning, 2021.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.array([[3.0, 4.0], [0.3, 0.4]])  # (in, out): a group is a row
    >>> lasso = GroupLasso(group_axis=0, weight=1.0)
    >>> w = lasso.prox(kernel, metric=1.0, strength=2.5)
    >>> print(w)
    [[1.5 2. ]
     [0.  0. ]]
    >>> print(lasso.support(w))
    [ True False]
    """

    def value(self, w: ArrayLike) -> jax.Array:
        return self.group_weight(jnp.shape(w)) * jnp.sum(self.norms(w))

    def shrunk(self, b: jax.Array, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
        return b, strength * self.group_weight(b.shape)

    def dual_norm(self, y: ArrayLike) -> jax.Array:
        return jnp.max(self.norms(y), initial=0.0) / self.group_weight(jnp.shape(y))


@dataclasses.dataclass(frozen=True)
class SparseGroupLasso(ShrunkGroups, Norm):
    r"""Sparse groups, and sparse entries within the groups that live.

    .. math:: \psi(w) = \rho \|w\|_1 + (1-\rho) \sum_g \omega \|w_g\|_2

    The prox is that of `GroupLasso` at strength :math:`(1-\rho)\tau` with :math:`b = m u` replaced
    by its soft threshold :math:`S(b, \rho\tau)`; a group is zero iff
    :math:`\|S(b_g, \rho\tau)\| \le (1-\rho)\tau\omega`, for every metric. The support is that of
    the groups. Equals `GroupLasso` at `l1_ratio=0.0`.

    Args:
      group_axis, batch_axis, weight: as in `GroupLasso`.
      l1_ratio: :math:`\rho`, in [0, 1).

    Raises:
      TypeError, ValueError: as `GroupLasso`; an `l1_ratio` outside [0, 1) (at 1 this is `L1`).

    References:
      Simon, Friedman, Hastie, Tibshirani, A sparse-group lasso, JCGS, 2013.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.array([[4.0, 5.0, 1.0], [0.3, 0.4, 0.2]])
    >>> sparse = SparseGroupLasso(group_axis=0, l1_ratio=0.5, weight=1.0)
    >>> print(sparse.prox(kernel, metric=1.0, strength=2.0))
    [[2.4 3.2 0. ]
     [0.  0.  0. ]]
    """

    l1_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("l1_ratio", self.l1_ratio)

    def value(self, w: ArrayLike) -> jax.Array:
        entries, groups = jnp.sum(jnp.abs(at_least_float32(w))), jnp.sum(self.norms(w))
        weight = self.group_weight(jnp.shape(w))
        return self.l1_ratio * entries + (1 - self.l1_ratio) * weight * groups

    def shrunk(self, b: jax.Array, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
        threshold = (1 - self.l1_ratio) * strength * self.group_weight(b.shape)
        return soft(b, self.l1_ratio * strength), threshold

    def dual_norm(self, y: ArrayLike) -> jax.Array:
        y = at_least_float32(y)
        axes, slope = self.coupled_axes(y.ndim), (1 - self.l1_ratio) * self.group_weight(y.shape)
        high = self.norms(y) / slope

        # Per group the smallest strength that makes it zero: a decreasing function meets a line.
        def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bracket
            middle = (low + high) / 2
            threshold = self.l1_ratio * jnp.expand_dims(middle, axes)
            dead = self.norms(soft(y, threshold)) <= slope * middle
            return jnp.where(dead, low, middle), jnp.where(dead, middle, high)

        steps = jnp.finfo(y.dtype).nmant + 12
        _, high = jax.lax.fori_loop(0, steps, halve, (jnp.zeros_like(high), high))
        return jnp.max(high, initial=0.0)


@dataclasses.dataclass(frozen=True)
class GroupL0(Grouped):
    r"""The (weighted) number of nonzero groups: groups are kept unchanged or dropped.

    .. math:: \psi(w) = \sum_g \omega\,[w_g \ne 0], \qquad
        \mathrm{prox}(u, m, \tau)_g = u_g
            \text{ if } \tfrac12 \sum_{i \in g} m_i u_i^2 > \tau\omega \text{, else } 0

    Not convex: the prox is the global minimiser, and zero on a tie. Equals `L0` on groups of one
    entry.

    Args:
      group_axis, batch_axis: as in `GroupLasso`.
      weight: :math:`\omega`, above 0; default the square root of the group size; 1 counts groups.

    Raises:
      TypeError, ValueError: as `GroupLasso`.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    >>> print(GroupL0(group_axis=0).prox(kernel, metric=1.0, strength=1.0))
    [[3. 4.]
     [0. 0.]]
    """

    def value(self, w: ArrayLike) -> jax.Array:
        return self.group_weight(jnp.shape(w)) * jnp.sum(
            self.support(w), dtype=at_least_float32(w).dtype
        )

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        # In norms, not squares, so that nothing underflows.
        threshold = jnp.sqrt(2 * strength * self.group_weight(u.shape))
        dead = self.norms(jnp.sqrt(metric) * u) <= threshold
        return jnp.where(jnp.expand_dims(dead, self.coupled_axes(u.ndim)), 0.0, u)


@dataclasses.dataclass(frozen=True)
class NonNegativeGroupLasso(ShrunkGroups, Norm):
    r"""The group lasso on entries that stay at or above zero.

    .. math:: \psi(w) = \sum_g \omega \|w_g\|_2 \text{ if } w \ge 0 \text{, else } \infty

    The prox is that of `GroupLasso` with :math:`b = m u` replaced by its positive part; a group is
    zero iff :math:`\|\max(b_g, 0)\| \le \tau\omega`, for every metric. A strength of 0 does not
    lift the constraint: there it equals `NonNegative`.

    Args:
      group_axis, batch_axis, weight: as in `GroupLasso`.

    Raises:
      TypeError, ValueError: as `GroupLasso`.

    >>> import jax.numpy as jnp, numpy as np
    >>> kernel = jnp.array([[3.0, 4.0], [3.0, -4.0], [0.3, 0.4]])
    >>> lasso = NonNegativeGroupLasso(group_axis=0, weight=1.0)
    >>> print(np.asarray(lasso.prox(kernel, metric=1.0, strength=2.0)).round(3))
    [[1.8 2.4]
     [1.  0. ]
     [0.  0. ]]
    """

    constraint: ClassVar[bool] = True
    penalizes: ClassVar[bool] = True

    def value(self, w: ArrayLike) -> jax.Array:
        w = at_least_float32(w)
        norms = self.group_weight(w.shape) * jnp.sum(self.norms(w))
        return jnp.where(jnp.all(w >= 0), norms, jnp.inf).astype(w.dtype)

    def shrunk(self, b: jax.Array, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.maximum(b, 0.0), strength * self.group_weight(b.shape)

    def dual_norm(self, y: ArrayLike) -> jax.Array:
        """The largest product with a w of value 1: of the positive parts alone."""
        norms = self.norms(jnp.maximum(y, 0.0))
        return jnp.max(norms, initial=0.0) / self.group_weight(jnp.shape(y))
