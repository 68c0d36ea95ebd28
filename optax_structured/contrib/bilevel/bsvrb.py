"""BSVRB: variance-reduced gradients of bilevel problems with many lower blocks."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from optax_structured.contrib.bilevel.msvr import check_blocks
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.transforms.storm import corrected_average
from optax_structured.trees.checks import check_nonnegative, check_positive, check_share
from optax_structured.trees.precision import at_least_float32

Version = Literal["v1", "v2"]


class BSVRBState(NamedTuple):
    """State of `bsvrb`; the rows of all but the first four fields are blocks."""

    clock: Clock  # steps since init, for schedules
    x: Any  # x of the step before
    z: Any  # like x: estimate of the gradient of F
    seen: jax.Array  # (m,) int32: the step at which a block was sampled last
    y: jax.Array  # (m, dy): the lower variables
    y_prev: jax.Array  # (m, dy): before the last step
    slope: jax.Array  # (m, dy): s, estimates of the gradients of g
    inverse: jax.Array  # v1: (m, dy, dy), H; v2: (m, dy), v, H^{-1} times the gradient of f in y
    inverse_prev: jax.Array  # like `inverse`: before the last step
    residual: jax.Array  # v2: (m, dy), u, estimates of H v minus that gradient; v1: (m, 0)


class Estimator(NamedTuple):
    """A gradient estimate of the upper level, for any optax optimizer to follow."""

    init: Callable[..., Any]  # x, y, upper_batches, lower_batches -> state
    estimate: Callable[..., tuple[Any, Any]]  # x, state, blocks, upper_..., lower_... -> z, state


def bsvrb(
    upper: Callable[[Any, jax.Array, Any], jax.Array],
    lower: Callable[[Any, jax.Array, Any], jax.Array],
    *,
    num_blocks: int,
    blocks_per_step: int,
    version: Version = "v2",
    alpha: ScalarOrSchedule = 0.9,
    alpha_bar: ScalarOrSchedule = 0.9,
    beta: ScalarOrSchedule = 0.9,
    tau: ScalarOrSchedule = 0.5,
    tau_v: ScalarOrSchedule = 0.5,
    gamma: ScalarOrSchedule | None = None,
    gamma_bar: ScalarOrSchedule | None = None,
    mu: float = 1e-3,
    v_bound: float = 10.0,
    lazy: bool = False,
) -> Estimator:
    r"""Estimates the gradient of a mean over many lower-level problems from a few at a time.

    .. math:: F(x) = \frac1m \sum_{i=1}^m f_i(x, y_i(x)), \qquad y_i(x) = \arg\min_y g_i(x, y)

    Each block has a running estimate s of the gradient of g in y, and either one of its Hessian,
    with eigenvalues raised to :math:`\mu` (`"v1"`), or of the solution v of
    :math:`\nabla^2_{yy} g\,v = \nabla_y f` by products alone (`"v2"`), each of them corrected as
    in `msvr`. With :math:`G` the mean of :math:`\nabla_x f_i - \nabla^2_{xy} g_i\,v_i` over the
    sampled blocks, and :math:`G^-` the same at the previous step's x, y, v,

    .. math:: z \leftarrow (1-\beta)(z - G^-) + G .

    Then :math:`y_i \leftarrow y_i - \tau s_i`, in v1 for all blocks, in v2 for the sampled ones,
    where also :math:`v_i \leftarrow v_i - \tau_v u_i`, in a ball.

    Args:
      upper: f, `upper(x, y_i, batch_i)`, () ; y_i is (dy,): ravel a tree.
      lower: g, `lower(x, y_i, batch_i)`, () , strongly convex in y_i.
      num_blocks: m.
      blocks_per_step: I.
      version: `"v1"` stores m * dy^2 numbers, `"v2"` m * dy.
      alpha: share of a new gradient in s, in (0, 1]; below 1 if I < m.
      alpha_bar: the same for the Hessian or u.
      beta: share of a new gradient in z; 1 is G itself.
      tau: step of y.
      tau_v: step of v.
      gamma: multiplier of differences in s; None: the rule of `msvr`, which is (m - I) / I and
        more: small I take small steps of x and y.
      gamma_bar: the same for the Hessian or u.
      mu: `"v1"`: least eigenvalue of a Hessian, above 0.
      v_bound: `"v2"`: largest norm of v.
      lazy: `"v2"`: take the steps of y and v once for each step since the block was seen.

    Returns:
      An `Estimator`. `init(x, y, upper_batches, lower_batches)` takes y (m, dy) and batches with
      leaves (m, ...), and starts at exact values of these. `estimate(x, state, blocks,
      upper_batches, lower_batches)` takes blocks, (I,) different integers, and batches with leaves
      (I, ...); it returns z, for an optimizer of x, and the state. `state.y` are the lower
      variables. All arrays of blocks can be sharded over them.

    Raises:
      ValueError: values out of the ranges above; y that is not (m, dy).

    Equals, for I = m and all shares 1, alternating descent with the hypergradient of H and y as
    they are.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> targets = jnp.arange(4.0)
      >>> solver = bsvrb(
      ...     lambda x, y, t: 0.5 * jnp.sum((y - t) ** 2),
      ...     lambda x, y, _: 0.5 * jnp.sum((y - x) ** 2),
      ...     num_blocks=4, blocks_per_step=2, alpha=0.5, alpha_bar=0.5, tau=0.2, tau_v=0.2)
      >>> x, optimizer = jnp.zeros(1), optax.sgd(0.05)
      >>> state, opt_state = solver.init(x, jnp.zeros((4, 1)), targets, targets), optimizer.init(x)
      >>> @jax.jit
      ... def step(x, state, opt_state, key):
      ...     blocks = jax.random.choice(key, 4, (2,), replace=False)
      ...     z, state = solver.estimate(x, state, blocks, targets[blocks], targets[blocks])
      ...     updates, opt_state = optimizer.update(z, opt_state)
      ...     return optax.apply_updates(x, updates), state, opt_state
      >>> for key in jax.random.split(jax.random.key(0), 300):
      ...     x, state, opt_state = step(x, state, opt_state, key)
      >>> print(bool(abs(x[0] - 1.5) < 0.2))
      True

    References:
      Hu et al., `Blockwise Stochastic Variance-Reduced Methods with Parallel Speedup for
      Multi-Block Bilevel Optimization <https://arxiv.org/abs/2305.18730>`_, 2023. Its code scales
      H up where its norm is small, which leaves small eigenvalues; has the sign of a logistic
      Hessian wrong; and takes gamma = 1.
    """
    if version not in get_args(Version):
        raise ValueError(f"version must be 'v1' or 'v2', got {version!r}")
    gamma = check_blocks("alpha", alpha, num_blocks, blocks_per_step, gamma)
    gamma_bar = check_blocks("alpha_bar", alpha_bar, num_blocks, blocks_per_step, gamma_bar)
    check_share("beta", beta)
    check_nonnegative("tau", tau)
    check_nonnegative("tau_v", tau_v)
    check_positive("mu", mu)
    check_positive("v_bound", v_bound)
    dense = version == "v1"
    lower_slope = jax.grad(lower, argnums=1)

    def product(x: Any, y: jax.Array, v: jax.Array, batch: Any) -> jax.Array:
        return jax.jvp(lambda y: lower_slope(x, y, batch), (y,), (v,))[1]

    def hypergradient(x: Any, y: jax.Array, inverse: jax.Array, f: Any, g: Any) -> Any:
        direct, slope = jax.grad(upper, argnums=(0, 1))(x, y, f)
        v = jnp.linalg.solve(inverse, slope) if dense else inverse
        indirect = jax.grad(lambda x: jnp.vdot(lower_slope(x, y, g), v))(x)
        return jax.tree.map(jnp.subtract, direct, indirect)

    def curvature(x: Any, y: jax.Array, inverse: jax.Array, f: Any, g: Any) -> jax.Array:
        """What is averaged beside s: the Hessian, or the residual of v."""
        if dense:
            return jax.hessian(lower, argnums=1)(x, y, g)
        return product(x, y, inverse, g) - jax.grad(upper, argnums=1)(x, y, f)

    def mean_over_blocks(trees: Any) -> Any:
        return jax.tree.map(lambda a: jnp.mean(at_least_float32(a), 0), trees)

    over_blocks = (None, 0, 0, 0, 0)

    def init(x: Any, y: Any, upper_batches: Any, lower_batches: Any) -> BSVRBState:
        if jnp.ndim(y) != 2 or len(y) != num_blocks:
            raise ValueError(
                f"bsvrb: y must be of shape ({num_blocks}, dy), a row for each block, got "
                f"{jnp.shape(y)}; ravel what is a tree in jax.flatten_util.ravel_pytree"
            )
        # A copy: sharing the buffers of x and y would make their donation fail.
        x, y = jax.tree.map(lambda a: jnp.array(at_least_float32(a)), (x, y))

        def start(y: jax.Array, f: Any, g: Any) -> tuple[jax.Array, jax.Array]:
            if dense:
                return _raised(jax.hessian(lower, argnums=1)(x, y, g), mu), jnp.zeros((0,), y.dtype)
            slope = jax.grad(upper, argnums=1)(x, y, f)
            tolerance = float(jnp.finfo(y.dtype).eps)
            v, _ = cg(lambda v: product(x, y, v, g), slope, tol=tolerance, maxiter=2 * y.size)
            return v, curvature(x, y, v, f, g)

        inverse, residual = jax.vmap(start)(y, upper_batches, lower_batches)
        gradients = jax.vmap(hypergradient, over_blocks)(
            x, y, inverse, upper_batches, lower_batches
        )
        slope = jax.vmap(lower_slope, (None, 0, 0))(x, y, lower_batches)
        seen = jnp.zeros(num_blocks, jnp.int32)
        z = mean_over_blocks(gradients)
        return BSVRBState(new_clock(), x, z, seen, y, y, slope, inverse, inverse, residual)

    def estimate(
        x: Any, state: BSVRBState, blocks: jax.Array, upper_batches: Any, lower_batches: Any
    ) -> tuple[Any, BSVRBState]:
        batches = upper_batches, lower_batches
        here = x, state.y[blocks], state.inverse[blocks]
        before = state.x, state.y_prev[blocks], state.inverse_prev[blocks]

        def both(of: Callable[..., Any]) -> tuple[Any, Any]:
            """The same samples at this step's point and at the one before."""
            many = jax.vmap(of, over_blocks)
            return many(*here, *batches), many(*before, *batches)

        def scalar(value: ScalarOrSchedule) -> Any:
            return now(value, state.clock)

        def moved(average: jax.Array, of: Callable[..., Any], share: Any, excess: Any) -> jax.Array:
            return corrected_average(average[blocks], *both(of), scalar(share), scalar(excess))

        new, old = (mean_over_blocks(gradients) for gradients in both(hypergradient))
        share = scalar(beta)
        z = jax.tree.map(
            lambda z, new, old: corrected_average(z, new, old, share, 1 - share), state.z, new, old
        )
        slope = moved(state.slope, lambda x, y, _, f, g: lower_slope(x, y, g), alpha, gamma)
        slopes = state.slope.at[blocks].set(slope)
        inverse, residuals = state.inverse, state.residual
        waited = (state.clock.count + 1 - state.seen[blocks])[:, None] if lazy else 1
        if dense:
            hessians = moved(inverse, curvature, alpha_bar, gamma_bar)
            inverse = inverse.at[blocks].set(jax.vmap(_raised, (0, None))(hessians, mu))
            y = state.y - scalar(tau) * slopes
        else:
            residual = moved(residuals, curvature, alpha_bar, gamma_bar)
            residuals = residuals.at[blocks].set(residual)
            v = _in_ball(inverse[blocks] - scalar(tau_v) * waited * residual, v_bound)
            inverse = inverse.at[blocks].set(v)
            y = state.y.at[blocks].add(-scalar(tau) * waited * slope)
        return z, BSVRBState(
            clock=tick(state.clock),
            x=jax.tree.map(lambda now, kept: now.astype(kept.dtype), x, state.x),
            z=z,
            seen=state.seen.at[blocks].set(state.clock.count + 1),
            y=y,
            y_prev=state.y,
            slope=slopes,
            inverse=inverse,
            inverse_prev=state.inverse,
            residual=residuals,
        )

    return Estimator(init, estimate)


def _raised(hessian: jax.Array, mu: float) -> jax.Array:
    """The nearest symmetric matrix with eigenvalues of at least mu."""
    eigenvalues, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
    return (vectors * jnp.maximum(eigenvalues, mu)) @ vectors.T


def _in_ball(v: jax.Array, radius: float) -> jax.Array:
    norm = jnp.linalg.norm(v, axis=-1, keepdims=True)
    return v * jnp.minimum(1, radius / jnp.where(norm > 0, norm, 1))
