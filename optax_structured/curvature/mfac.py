"""M-FAC: the inverse of an empirical Fisher matrix of the last gradients as a preconditioner."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.curvature.empirical_fisher import window_factor
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import Estimate, Factor, FirstMoment
from optax_structured.trees.checks import check_fraction, check_nonnegative, check_positive
from optax_structured.trees.precision import as_updates, at_least_float32, scalar_dtype
from optax_structured.trees.products import rows_times
from optax_structured.trees.tree_checks import check_real, check_same_tree


class MfacState(NamedTuple):
    """State of `scale_by_mfac`."""

    clock: Clock  # steps since init, for schedules
    slot: jax.Array  # () int32: row of the window that the next gradient overwrites
    window: Estimate[Any]  # like params with m in front: the last gradients, 0 before
    gram: Factor[Any]  # (m, m) float32 or wider, or a tree of them per leaf: their inner products
    momentum: FirstMoment[Any]  # like params, float32 or wider; None without momentum
    mask: Any  # like params, bool: what takes part; None for all


def scale_by_mfac(
    num_grads: int,
    damping: ScalarOrSchedule = 1e-5,
    momentum: ScalarOrSchedule = 0.0,
    *,
    block: Literal["all", "leaf"] = "all",
    mask: Any | Callable[[Any], Any] = None,
    window_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of the Fisher matrix of the last m of them.

    With the gradients of the last m steps as rows of G, the current one in row j, zeros before the
    first,

    .. math:: U = \Big(\lambda I + \tfrac1m G^\top G\Big)^{-1} G_t
        = m\, G^\top (m\lambda I + G G^\top)^{-1} e_j, \qquad
        V \leftarrow \beta V + (1-\beta)\, U

    The second form loses no digits in float32, where the first is useless for small damping. The
    products are taken leaf by leaf, so shardings stay. A step costs m D twice and a Cholesky
    factor of m by m.

    Args:
      num_grads: m, 64 to 1024 (512 for small tasks): so many copies of the parameters.
      damping: :math:`\lambda` above 0, in the unit of the squared gradient, a number or schedule;
        1e-6 to 1e-3, to be tuned together with the learning rate.
      momentum: :math:`\beta` in [0, 1), of the direction, without correction of bias, a number or
        schedule.
      block: "all" for one matrix, "leaf" for one per leaf, as block-diagonal as the paper's.
      mask: a tree like the parameters of booleans or arrays of them, or a function of the
        parameters to one, for what takes part; other entries get no update. For sparse training:
        `lambda p: jax.tree.map(lambda x: x != 0, p)`.
      window_dtype: of the stored gradients, such as `jnp.bfloat16`; float32 or wider by default.

    Returns:
      An element whose state, `MfacState`, is m copies of the parameters, one more with momentum,
      and m by m products. A gradient that is not finite gives a NaN update and does not enter the
      window. Averages over devices go before it.

    Raises:
      ValueError: a value out of the ranges above.

    Equals, for large damping, `optax.scale(1 / damping)`; for `num_grads=1` it divides by
    :math:`\lambda + \|G\|^2`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> element = oxs.curvature.scale_by_mfac(num_grads=4, damping=1.0)
      >>> gradient = jnp.array([2.0, 0.0])
      >>> updates, _ = element.update(gradient, element.init(jnp.zeros(2)))
      >>> bool(jnp.allclose(updates, jnp.array([1.0, 0.0])))  # 2 / (1 + 4/4)
      True

    References:
      Frantar, Kurtic and Alistarh, `M-FAC <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021. The
      code adds weight decay to the gradient: put `optax.add_decayed_weights` before this.
    """
    if isinstance(num_grads, bool) or not isinstance(num_grads, int) or num_grads < 1:
        raise ValueError(
            f"num_grads must be a whole number above 0, got {num_grads!r}; where "
            "optax.inject_hyperparams traces it, name it in static_args"
        )
    check_positive("damping", damping)
    check_fraction("momentum", momentum)
    if block not in ("all", "leaf"):
        raise ValueError(f"block must be 'all' or 'leaf', got {block!r}")
    averaging = callable(momentum) or not isinstance(momentum, int | float) or momentum > 0

    def init(params: Any) -> MfacState:
        check_real("scale_by_mfac", params)
        wide = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        rows = lambda x: jnp.broadcast_to(  # noqa: E731
            x.astype(window_dtype or x.dtype), (num_grads, *x.shape)
        )
        gram = lambda x: jnp.zeros((num_grads, num_grads), x.dtype)  # noqa: E731
        grams = jax.tree.map(gram, wide)
        if block == "all":
            grams = _total(grams, jnp.zeros((num_grads, num_grads), scalar_dtype(params)))
        chosen = mask(params) if callable(mask) else mask
        if chosen is not None:
            chosen = jax.tree.map(lambda m: jnp.asarray(m, bool), chosen)
        return MfacState(
            new_clock(),
            jnp.zeros((), jnp.int32),
            jax.tree.map(rows, wide),
            grams,
            wide if averaging else None,
            chosen,
        )

    def update(
        updates: Any, state: MfacState, params: Any = None, **_: Any
    ) -> tuple[Any, MfacState]:
        known = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), state.window)
        check_same_tree("scale_by_mfac", updates, known)
        grads = jax.tree.map(at_least_float32, updates)
        if state.mask is not None:
            grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, state.mask)
        slot = state.slot
        window = jax.tree.map(lambda w, g: w.at[slot].set(g.astype(w.dtype)), state.window, grads)
        rows = jax.tree.map(_products, window, grads)
        if block == "all":
            rows = _total(rows, jnp.zeros(num_grads, state.gram.dtype))
        fine = jnp.asarray(True)
        for row in jax.tree.leaves(rows):
            fine &= jnp.all(jnp.isfinite(row))
        enter = lambda K, r: K.at[slot].set(r.astype(K.dtype)).at[:, slot].set(r.astype(K.dtype))  # noqa: E731
        grams = jax.tree.map(enter, state.gram, rows)
        damp = now(damping, state.clock)

        def weigh(gram: jax.Array) -> jax.Array:
            unit = jnp.zeros(num_grads, gram.dtype).at[slot].set(num_grads)
            return jax.scipy.linalg.cho_solve((window_factor(gram, damp), True), unit)

        weights = jax.tree.map(weigh, grams)
        if block == "all":
            weights = jax.tree.map(lambda w: weights, window)
        direction = jax.tree.map(_combined, window, weights, grads)
        kept = None
        if averaging:
            share = now(momentum, state.clock)
            direction = jax.tree.map(
                lambda v, u: share * v + (1 - share) * u, state.momentum, direction
            )
            kept = _where(fine, direction, state.momentum)
        new = MfacState(
            tick(state.clock),
            jnp.where(fine, (slot + 1) % num_grads, slot).astype(jnp.int32),
            # Only the one row can differ: rewriting it is cheaper than choosing between windows.
            jax.tree.map(
                lambda w, o: w.at[slot].set(jnp.where(fine, w[slot], o[slot])), window, state.window
            ),
            _where(fine, grams, state.gram),
            kept,
            state.mask,
        )
        direction = jax.tree.map(lambda u: jnp.where(fine, u, jnp.nan), direction)
        return as_updates(direction, updates, params), new

    return optax.GradientTransformationExtraArgs(init, update)


def mfac(
    learning_rate: ScalarOrSchedule,
    num_grads: int = 256,
    damping: ScalarOrSchedule = 1e-5,
    *,
    momentum: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    block: Literal["all", "leaf"] = "all",
    mask: Any | Callable[[Any], Any] = None,
    window_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer around `scale_by_mfac`, with weight decay added to the gradient.

    Args:
      learning_rate: a number or schedule; 1e-3 for vision, 1e-4 for fine-tuning.
      num_grads: see `scale_by_mfac`; published 512 and 1024.
      weight_decay: times the parameters, added to each gradient, a number or schedule.
      damping, momentum, block, mask, window_dtype: see `scale_by_mfac`.

    Returns:
      An optimizer whose update needs `params`.

    Raises:
      ValueError: as `scale_by_mfac`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.curvature.mfac(1e-3, num_grads=32)
      >>> state = optimizer.init(jnp.ones(3))

    References:
      Frantar, Kurtic and Alistarh, `M-FAC <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.
    """
    check_nonnegative("learning_rate", learning_rate)
    check_nonnegative("weight_decay", weight_decay)
    return optax.chain(
        optax.stateless(_of_the_same_tree),
        optax.add_decayed_weights(weight_decay),
        scale_by_mfac(
            num_grads, damping, momentum, block=block, mask=mask, window_dtype=window_dtype
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def _of_the_same_tree(updates: Any, params: Any) -> Any:
    if params is not None:
        check_same_tree("mfac", updates, params, whose="the parameters")
    return updates


def _products(window: jax.Array, gradient: jax.Array) -> jax.Array:
    wide = window.astype(gradient.dtype)
    stored = gradient.astype(window.dtype).astype(gradient.dtype)
    return rows_times(wide, stored)


def _combined(window: jax.Array, weights: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.tensordot(
        weights.astype(like.dtype), window.astype(like.dtype), 1, precision="highest"
    )


def _total(tree: Any, zero: jax.Array) -> jax.Array:
    return sum(jax.tree.leaves(tree), zero)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
