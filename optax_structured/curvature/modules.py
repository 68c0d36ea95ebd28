"""MAT: train only the modules whose neural tangent kernel says that they still learn."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.curvature.masking import Labels, labelled, mask_modules
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.trees.checks import check_nonnegative, check_share
from optax_structured.trees.precision import scalar_dtype

Mode = Literal["relative", "quantile"]


class ModularState(NamedTuple):
    """State of `modular_adaptive`."""

    clock: Clock  # steps since init, for schedules
    inner_state: Any  # of the wrapped optimizer; that of inactive modules does not change
    evaluations: jax.Array  # () int32: how often eigenvalues were given
    first: dict[str, jax.Array]  # () per module: its first eigenvalue
    first_change: dict[str, jax.Array]  # () per module: distance of the second one from it
    change: dict[str, jax.Array]  # () per module: of the last one
    frozen: dict[str, jax.Array]  # () bool per module: stopped for good
    active: dict[str, jax.Array]  # () bool per module: updated until the next evaluation


def select_modules(
    eigenvalues: Mapping[str, jax.Array], alpha: Any, mode: Mode = "relative"
) -> dict[str, jax.Array]:
    """The modules that are informative enough to be trained until the next evaluation.

    Args:
      eigenvalues: of `mntk_eigenvalues`.
      alpha: in [0, 1], may be traced. "relative": the share of the largest eigenvalue that a
        module has to reach, about 0.1; "quantile": the share of modules that is kept, rounded up.
      mode: which; the paper leaves its threshold open to both readings.

    Returns:
      Booleans by name, each (). Neither mode depends on the scale of the outputs.

    Raises:
      ValueError: an alpha out of range, another mode.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> chosen = oxs.curvature.select_modules({"a": jnp.array(9.0), "b": jnp.array(0.5)}, 0.1)
      >>> {name: bool(x) for name, x in chosen.items()}
      {'a': True, 'b': False}

    References:
      Shi et al., `Modular Adaptive Training <https://arxiv.org/abs/2405.07527>`_, NeurIPS 2023.
    """
    check_share("alpha", alpha)
    if mode not in ("relative", "quantile"):
        raise ValueError(f"mode must be 'relative' or 'quantile', got {mode!r}")
    if not eigenvalues:
        return {}
    values = jnp.stack([jnp.asarray(x) for x in eigenvalues.values()])
    if mode == "relative":
        threshold = alpha * jnp.max(values)
    else:
        share = alpha * (1 - 1e-6)  # 0.7 times 10 is a little more than 7
        kept = jnp.clip(jnp.ceil(share * len(values)), 1, len(values)).astype(jnp.int32)
        threshold = jnp.sort(values)[len(values) - kept]
    return {name: x >= threshold for name, x in eigenvalues.items()}


def modular_adaptive(
    inner: optax.GradientTransformation,
    labels: Labels,
    *,
    alpha: ScalarOrSchedule = 0.1,
    beta: ScalarOrSchedule = 1e-3,
    mode: Mode = "relative",
) -> optax.GradientTransformationExtraArgs:
    r"""Updates only modules whose tangent kernels are large, until they stop to change.

    At each evaluation, modules whose eigenvalue is below the threshold of `select_modules` pause
    until the next one; and with :math:`D_k = |\lambda_k - \lambda_0|` after k evaluations more, a
    module stops for good once :math:`|D_k - D_{k-1}| < \beta D_1`, from k = 2 on.

    A pause saves no time in a compiled step: the mask is traced. What saves time is a program for
    each set of modules: take `state.frozen`, which only grows, to the host now and then and put
    `jax.lax.stop_gradient` around what is frozen.

    Args:
      inner: any optimizer whose state `optax.tree_map_params` understands.
      labels: a tree like the parameters of names of modules, or a function of the parameters to
        one, such as the `labels` of `rules`.
      alpha: see `select_modules`, a number or schedule; 0 lets all take part.
      beta: at least 0, a number or schedule; 1e-3. 0 never stops a module.
      mode: see `select_modules`.

    Returns:
      An optimizer whose update takes `eigenvalues=`, of `mntk_eigenvalues`, at evaluations, once an
      epoch or every 1000 steps, and goes on with the same modules without. Paused modules have
      updates of 0, and their part of the inner state stays as it is. Its state is `ModularState`.

    Raises:
      ValueError: eigenvalues of other modules, an alpha or beta out of range.

    Equals `inner` for one module.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
      >>> labels = {"a": "first", "b": "second"}
      >>> optimizer = oxs.curvature.modular_adaptive(optax.sgd(1.0), labels)
      >>> grads = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> found = {"first": jnp.array(1.0), "second": jnp.array(0.01)}
      >>> updates, _ = optimizer.update(grads, optimizer.init(params), params, eigenvalues=found)
      >>> print(updates["a"], updates["b"])
      [-1. -1.] [0. 0.]

    References:
      Shi et al., `Modular Adaptive Training <https://arxiv.org/abs/2405.07527>`_, NeurIPS 2023; the
      rule of time follows a public port.
    """
    check_share("alpha", alpha)
    check_nonnegative("beta", beta)
    if mode not in ("relative", "quantile"):
        raise ValueError(f"mode must be 'relative' or 'quantile', got {mode!r}")
    masked = mask_modules(inner, labels)

    def init(params: Any) -> ModularState:
        names = sorted(set(jax.tree.leaves(labelled(labels, params))))
        # A buffer of its own each: a donated state may not hold one twice.
        each = lambda x, dtype: {name: jnp.full((), x, dtype) for name in names}  # noqa: E731
        dtype = scalar_dtype(params)
        if not names:  # the placeholder of optax.tree.map_params, or nothing to train
            nothing: Any = [jnp.zeros(()) for _ in range(5)]
            return ModularState(
                new_clock(), masked.init(params), jnp.zeros((), jnp.int32), *nothing
            )
        return ModularState(
            new_clock(),
            masked.init(params),
            jnp.zeros((), jnp.int32),
            each(0, dtype),
            each(0, dtype),
            each(0, dtype),
            each(False, bool),
            each(True, bool),
        )

    def evaluated(state: ModularState, found: Mapping[str, Any]) -> ModularState:
        names = sorted(state.active)
        if sorted(found) != names:
            raise ValueError(f"eigenvalues must be of the modules {names}, got {sorted(found)}")
        count = state.evaluations
        values = {n: jnp.asarray(found[n], state.first[n].dtype) for n in names}
        first = {n: jnp.where(count == 0, values[n], state.first[n]) for n in names}
        change = {n: jnp.abs(values[n] - first[n]) for n in names}
        start = {n: jnp.where(count == 1, change[n], state.first_change[n]) for n in names}
        least = now(beta, state.clock)
        stop = {n: temporal_stop(state.change[n], change[n], start[n], least) for n in names}
        frozen = {n: state.frozen[n] | ((count >= 2) & stop[n]) for n in names}
        chosen = select_modules(values, now(alpha, state.clock), mode)
        active = {n: chosen[n] & ~frozen[n] for n in names}
        return state._replace(
            evaluations=count + 1,
            first=first,
            first_change=start,
            change=change,
            frozen=frozen,
            active=active,
        )

    def update(
        updates: Any,
        state: ModularState,
        params: Any = None,
        *,
        eigenvalues: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, ModularState]:
        if not jax.tree.leaves(updates):
            return updates, state._replace(clock=tick(state.clock))
        if eigenvalues is not None:
            state = evaluated(state, eigenvalues)
        updates, inner_state = masked.update(
            updates, state.inner_state, params, active=state.active, **extra
        )
        return updates, state._replace(clock=tick(state.clock), inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def temporal_stop(before: Any, change: Any, first_change: Any, beta: Any) -> jax.Array:
    r"""Whether the eigenvalue of a module has stopped to change.

    .. math:: |D_k - D_{k-1}| < \beta D_1

    Args:
      before: :math:`D_{k-1}`, distance of the last eigenvalue but one from the first.
      change: :math:`D_k`, of the last.
      first_change: :math:`D_1`.
      beta: at least 0.

    Returns:
      () bool; False where there never was a change to compare with.

    Example:
      >>> print(temporal_stop(2.0, 2.001, 1.5, 1e-3), temporal_stop(2.0, 2.1, 1.5, 1e-3))
      True False
    """
    return jnp.abs(jnp.asarray(change) - before) < beta * jnp.asarray(first_change)
