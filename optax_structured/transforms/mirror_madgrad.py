"""The direction of MirrorMADGRAD: gradients over the cube root of a fading sum of their squares."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import (
    Clock,
    ScalarOrSchedule,
    new_clock,
    now,
    root_of_count,
    tick,
)
from optax_structured.states.roles import SecondMoment
from optax_structured.trees.checks import check_nonnegative
from optax_structured.trees.precision import at_least_float32
from optax_structured.trees.tree_checks import check_real, check_same_tree
from optax_structured.xla.cube_root import cube_root


class ScaleByMirrorMadgradState(NamedTuple):
    """State of `scale_by_mirror_madgrad`."""

    clock: Clock  # steps since init, for schedules
    steps: jax.Array  # () int32: k, steps in the sum
    square_sum: SecondMoment[Any]  # like params, float32 or wider: U


def scale_by_mirror_madgrad(
    eps: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the cube root of a sum of their squares, and grows with its length.

    With k = 1, 2, ... the number of steps, elementwise,

    .. math:: U_k = \sqrt{\tfrac{k-1}{k}}\, U_{k-1} + G_k^2, \qquad
        N_k = \frac{\sqrt[3]{k}\; G_k}{\sqrt[3]{U_k} + \epsilon}

    Args:
      eps: :math:`\epsilon \ge 0`, in the unit of :math:`G^{2/3}`; a number or schedule. At 0,
        entries that never received a gradient have the direction 0.

    Returns:
      An element that needs no `params`, whose updates are float32 at least. Its state is
      `ScaleByMirrorMadgradState`.

    Raises:
      ValueError: a negative eps; another tree than that of `init`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> mirror = oxs.transforms.scale_by_mirror_madgrad()
      >>> updates, _ = mirror.update(jnp.array([8.0, -1.0, 0.0]), mirror.init(jnp.zeros(3)))
      >>> print(updates.round(3))
      [ 2. -1.  0.]

    References:
      Defazio and Jelassi, `Adaptivity without Compromise
      <https://arxiv.org/abs/2101.11075>`_, JMLR 2022, and its code.
    """
    check_nonnegative("eps", eps)

    def init(params: Any) -> ScaleByMirrorMadgradState:
        check_real("scale_by_mirror_madgrad", params)
        squares = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        return ScaleByMirrorMadgradState(new_clock(), jnp.zeros((), jnp.int32), squares)

    def update(
        updates: Any, state: ScaleByMirrorMadgradState, params: Any = None, **_: Any
    ) -> tuple[Any, ScaleByMirrorMadgradState]:
        check_same_tree("scale_by_mirror_madgrad", updates, state.square_sum)
        steps, floor = optax.safe_increment(state.steps), now(eps, state.clock)

        def add_square(u: jax.Array, g: Any) -> jax.Array:
            total = at_least_float32(u)
            before, after = (root_of_count(k, total.dtype) for k in (state.steps, steps))
            total = before / after * total + jnp.square(jnp.asarray(g, total.dtype))
            return total.astype(u.dtype)

        def divide(u: jax.Array, g: Any) -> jax.Array:
            u = at_least_float32(u)
            root = cube_root(u) + jnp.asarray(floor, u.dtype)
            grown = jnp.cbrt(steps.astype(u.dtype)) * jnp.asarray(g, u.dtype)
            return jnp.where(root == 0, 0, grown / jnp.where(root == 0, 1, root))

        squares = jax.tree.map(add_square, state.square_sum, updates)
        directions = jax.tree.map(divide, squares, updates)
        return directions, ScaleByMirrorMadgradState(tick(state.clock), steps, squares)

    return optax.GradientTransformationExtraArgs(init, update)
