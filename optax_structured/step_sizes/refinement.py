"""Learning-rate schedules from the gradient norms of a run."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structured.states.clock import Clock, new_clock, tick
from optax_structured.states.roles import Factor
from optax_structured.trees.precision import at_least_float32, scalar_dtype
from optax_structured.trees.tree_checks import check_real

_WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sgd": lambda norms: norms**-2.0,
    "adam": lambda norms: norms**-1.0,
}


class RecordNormsState(NamedTuple):
    """State of `record_norms`."""

    clock: Clock  # steps since init
    norms: Factor[jax.Array]  # (capacity,), float32 or wider: one per `every` steps, then zeros


def record_norms(
    ord: Literal[1, 2] = 2, *, capacity: int, every: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Passes gradients through, and records the norm of all leaves together.

    Put it first in a chain, where it sees raw gradients, and give what it recorded to
    `refined_schedule`.

    Args:
      ord: 2 for `weighting="sgd"`, 1 (the sum of absolute values) for `weighting="adam"`.
      capacity: how many norms are kept: the number of steps over `every`. Later ones are dropped.
      every: steps between two records; 10 of a thousand or more is enough.

    Returns:
      An element that returns its updates unchanged and needs no `params`. Its state is
      `RecordNormsState`; `recorded_norms` reads it.

    Raises:
      ValueError: another ord, or a capacity or `every` that is not a whole number above 0.

    Equals `optax.identity` in its updates.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = optax.chain(oxs.step_sizes.record_norms(capacity=2, every=1), optax.sgd(0.1))
      >>> state = optimizer.init(jnp.zeros(2))
      >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), state)
      >>> oxs.step_sizes.recorded_norms(state)
      array([5.], dtype=float32)

    References:
      Defazio et al., `When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement
      <https://arxiv.org/abs/2310.07831>`_, 2023.
    """
    if ord not in (1, 2):
        raise ValueError(f"ord must be 1 or 2, got {ord!r}")
    for name, count in {"capacity": capacity, "every": every}.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {count!r}")

    def init(params: Any) -> RecordNormsState:
        check_real("record_norms", params)
        return RecordNormsState(new_clock(), jnp.zeros(capacity, scalar_dtype(params)))

    def update(
        updates: Any, state: RecordNormsState, params: Any = None, **_: Any
    ) -> tuple[Any, RecordNormsState]:
        leaves = [jnp.abs(at_least_float32(g)) for g in jax.tree.leaves(updates)]
        powers = [jnp.sum(g**ord).astype(state.norms.dtype) for g in leaves]
        total = sum(powers, jnp.zeros((), state.norms.dtype))
        norm = total if ord == 1 else jnp.sqrt(total)
        due = state.clock.count % every == 0
        place = jnp.where(due, state.clock.count // every, capacity)  # beyond the end: dropped
        norms = state.norms.at[place].set(norm, mode="drop")
        return updates, RecordNormsState(tick(state.clock), norms)

    return optax.GradientTransformationExtraArgs(init, update)


def recorded_norms(state: Any) -> np.ndarray:
    """The norms that `record_norms` has recorded so far.

    Args:
      state: that of a chain with one `record_norms` somewhere in it.

    Returns:
      A float array on the host, oldest first. Steps without any gradient are left out.

    Raises:
      ValueError: no such state in it, or several.

    Example: see `record_norms`.
    """
    is_record = lambda node: isinstance(node, RecordNormsState)  # noqa: E731
    found = [s for s in jax.tree.leaves(state, is_leaf=is_record) if is_record(s)]
    if len(found) != 1:
        raise ValueError(f"expected one state of record_norms, found {len(found)}")
    norms = np.asarray(found[0].norms)
    return norms[norms != 0]


def refined_schedule(
    gradient_norms: Sequence[float] | np.ndarray,
    weighting: Literal["sgd", "adam"] | Callable[[np.ndarray], np.ndarray] = "sgd",
    *,
    smoothing: float = 0.1,
    drop_nonfinite: bool = True,
) -> np.ndarray:
    r"""The schedule that is optimal for the last iterate, given these gradient norms.

    With the norms after a running median, :math:`\hat G_t`, and weights
    :math:`w_t = \hat G_t^{-2}` for SGD and :math:`\hat G_t^{-1}` for Adam,

    .. math:: \eta_t \propto w_t \sum_{p > t} w_p

    Large norms at the start make a warm-up, norms that grow towards the end a faster decay. Tune
    the peak again for the new schedule. The theory is of the last iterate, without momentum or
    weight decay: compare the last parameters of runs, not the best of many.

    Args:
      gradient_norms: (T,), of raw gradients in the order of the run, with the batch size of the run
        to come: `"sgd"` wants the l2 norm, `"adam"` the l1 norm over all parameters.
      weighting: as above, or a function of smoothed norms to weights.
      smoothing: width of the median as a share of T, in [0, 1); 0 leaves the norms as they are.
      drop_nonfinite: leave out norms that are NaN or infinite; False raises for them.

    Returns:
      (T,) float64 in [0, 1] with largest entry 1 and last entry 0, fewer where norms were dropped.
      `interpolated_schedule` makes an optax schedule of any length of it.

    Raises:
      ValueError: fewer than two norms, norms of at most 0 or not finite, an unknown weighting.

    Equals linear decay to 0 for constant norms.

    Example:
      >>> import optax_structured as oxs
      >>> print(oxs.step_sizes.refined_schedule([1.0, 1.0, 1.0]))
      [1.  0.5 0. ]
      >>> print(oxs.step_sizes.refined_schedule([2.0, 1.0, 1.0], smoothing=0).round(2))
      [0.5 1.  0. ]

    References:
      Defazio et al., `When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement
      <https://arxiv.org/abs/2310.07831>`_, 2023. The median is relative to the length of the run,
      as in the paper; plots of its code use a fixed width.
    """
    norms = np.asarray(gradient_norms, np.float64)
    if norms.ndim != 1:
        raise ValueError(f"gradient_norms must be of shape (T,), got {norms.shape}")
    if drop_nonfinite:
        norms = norms[np.isfinite(norms)]
    if len(norms) < 2 or not np.all(np.isfinite(norms)) or np.any(norms < 0):
        raise ValueError(
            "gradient_norms must be at least two finite numbers above 0, got "
            f"{np.asarray(gradient_norms)!r}"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing!r}")
    if not callable(weighting) and weighting not in _WEIGHTS:
        raise ValueError(f"weighting must be 'sgd', 'adam' or a function, got {weighting!r}")
    smoothed = running_median(norms, smoothing)
    if np.any(smoothed <= 0):
        raise ValueError("gradient_norms are 0 over a whole window: leave out steps without any")
    # Only ratios of weights count, and powers of ratios do not overflow.
    weights = (weighting if callable(weighting) else _WEIGHTS[weighting])(smoothed / smoothed.max())
    after = np.cumsum(weights[::-1])[::-1] - weights
    after[-1] = 0.0
    rates = weights * after
    return rates / rates.max()


def running_median(values: np.ndarray, share: float) -> np.ndarray:
    """Median over a window that is a share of the length, continued at both ends.

    Args:
      values: (T,).
      share: of T that the window is wide, rounded down to an odd number of entries.

    Returns:
      (T,). On the left the first value is repeated, on the right the values are reflected.

    Example:
      >>> running_median(np.array([1.0, 1.0, 9.0, 1.0, 1.0, 1.0]), 0.5)
      array([1., 1., 1., 1., 1., 1.])
    """
    half = int(share * len(values)) // 2
    if half == 0:
        return values
    padded = np.pad(values, (0, min(4 * half + 2, 2 * len(values))), mode="reflect")
    padded = np.pad(padded, (half, 0), mode="edge")[: len(values) + 2 * half]
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return np.median(windows, axis=-1)


def interpolated_schedule(
    values: Sequence[float] | np.ndarray, total_steps: int, peak: float, warmup_steps: int = 0
) -> optax.Schedule:
    """A schedule through equally spaced values, for any number of steps.

    Args:
      values: (n,), n at least 2, from the first step to the last, such as `refined_schedule` gives.
      total_steps: of the run, at least 2; later steps get the last value.
      peak: the learning rate where a value is 1.
      warmup_steps: the first step is scaled by 1/(warmup_steps + 1), and so on linearly up to 1. A
        refined schedule has its own warm-up.

    Returns:
      A schedule that may be traced.

    Raises:
      ValueError: fewer than two values or steps.

    Example:
      >>> import optax_structured as oxs
      >>> schedule = oxs.step_sizes.interpolated_schedule([1.0, 0.0], total_steps=101, peak=0.5)
      >>> print(schedule(0), schedule(50), schedule(1000))
      0.5 0.25 0.0

    References:
      Defazio et al., `When, Why and How Much? <https://arxiv.org/abs/2310.07831>`_, 2023.
    """
    grid = np.asarray(values, np.float64)
    if grid.ndim != 1 or len(grid) < 2 or total_steps < 2:
        raise ValueError(
            f"interpolated_schedule needs two values and two steps at least, got {grid.shape} "
            f"values and {total_steps} steps"
        )

    def schedule(count: jax.Array | int) -> jax.Array:
        time = jnp.asarray(count, float) / (total_steps - 1)
        heights = jnp.asarray(peak * grid, time.dtype)
        value = jnp.interp(time, jnp.linspace(0, 1, len(grid), dtype=time.dtype), heights)
        warm = jnp.minimum((jnp.asarray(count, float) + 1) / (warmup_steps + 1), 1)
        return value * warm

    return schedule


def last_iterate_bound(
    schedule: jax.Array, gradient_norms: jax.Array, distance: float = 1.0
) -> jax.Array:
    r"""Bound on the loss of the last iterate of subgradient descent, above the optimum.

    .. math:: \frac{D^2}{2 S_0} + \frac{1}{2 S_0}\sum_t \eta_t^2 G_t^2
        + \frac12 \sum_{k=0}^{T-2} \frac{\eta_k Q_k}{S_k S_{k+1}}, \qquad
        S_k = \sum_{t \ge k} \eta_t, \quad Q_k = \sum_{t \ge k} \eta_t^2 G_t^2

    Args:
      schedule: (T,), learning rates above 0: a last one of 0 has no bound of this form.
      gradient_norms: (T,), l2 norms.
      distance: D, from the start to the optimum.

    Returns:
      The bound, () ; it is differentiable in `schedule`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> print(f"{oxs.step_sizes.last_iterate_bound(jnp.full(4, 0.5), jnp.ones(4)):.3f}")
      0.958

    References:
      Defazio et al., `When, Why and How Much? <https://arxiv.org/abs/2310.07831>`_, 2023.
    """
    schedule = at_least_float32(schedule)
    squares = jnp.square(schedule * jnp.asarray(gradient_norms, schedule.dtype))
    rates = jnp.cumsum(schedule[::-1])[::-1]
    tails = jnp.cumsum(squares[::-1])[::-1]
    start = (distance**2 + tails[0]) / (2 * rates[0])
    return start + jnp.sum(schedule[:-1] * tails[:-1] / (rates[:-1] * rates[1:])) / 2
