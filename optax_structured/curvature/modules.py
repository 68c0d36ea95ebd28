"""MAT: train only the modules whose neural tangent kernel says that they still learn."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.trees.products import dot

Mode = Literal["relative", "quantile"]


class ModularState(NamedTuple):
    """State of `modular_adaptive`."""

    inner_state: Any  # of the wrapped optimizer; that of inactive modules does not change
    evaluations: jax.Array  # () int32: how often eigenvalues were given
    first: dict[str, jax.Array]  # () per module: its first eigenvalue
    first_change: dict[str, jax.Array]  # () per module: distance of the second one from it
    change: dict[str, jax.Array]  # () per module: of the last one
    frozen: dict[str, jax.Array]  # () bool per module: stopped for good
    active: dict[str, jax.Array]  # () bool per module: updated until the next evaluation


def mntk_eigenvalues(
    outputs: Callable[[Any], jax.Array],
    params: Any,
    labels: Any,
    key: jax.Array,
    *,
    iterations: int = 8,
) -> dict[str, jax.Array]:
    r"""Largest eigenvalue of the neural tangent kernel of each module.

    .. math:: \lambda_l = \lambda_{\max}(J_l J_l^\top), \qquad J_l = \partial z / \partial w_l

    by power iteration: one pass forward and one backward through the model each.

    Args:
      outputs: `outputs(params)`, an array: the outputs z for 16 to 64 examples, in evaluation mode.
      params: w.
      labels: a tree like the parameters of names of modules, as for `optax.partition`.
      key: of the random start.
      iterations: 5 to 10.

    Returns:
      Eigenvalues by name, each from below. The kernels of modules add up to that of the network.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> X = jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> found = oxs.curvature.mntk_eigenvalues(
      ...     lambda w: X @ jnp.stack([w["a"], w["b"]]), {"a": 0.0, "b": 0.0},
      ...     {"a": "first", "b": "second"}, jax.random.key(0),
      ... )
      >>> print({name: round(float(x), 3) for name, x in found.items()})
      {'first': 9.0, 'second': 2.0}

    References:
      Shi et al., `Train Faster, Perform Better: Modular Adaptive Training in Over-Parameterized
      Models <https://arxiv.org/abs/2405.07527>`_, NeurIPS 2023.
    """
    params = jax.tree.map(lambda p: jnp.asarray(p), params)
    z, forward = jax.linearize(outputs, params)
    backward = jax.linear_transpose(forward, params)
    start = jax.random.normal(key, z.shape, z.dtype)

    def largest(name: str) -> jax.Array:
        def apply(v: jax.Array) -> jax.Array:
            (gradient,) = backward(v)
            return forward(
                jax.tree.map(lambda g, at: g if at == name else jnp.zeros_like(g), gradient, labels)
            )

        def iterate(_: Any, v: jax.Array) -> jax.Array:
            image = apply(v)
            norm = jnp.sqrt(dot(image, image))
            return image / jnp.where(norm > 0, norm, 1).astype(image.dtype)

        v = jax.lax.fori_loop(0, iterations, iterate, start / jnp.sqrt(dot(start, start)))
        return dot(v, apply(v))

    return {name: largest(name) for name in sorted(set(jax.tree.leaves(labels)))}


def select_modules(
    eigenvalues: Mapping[str, jax.Array], alpha: float, mode: Mode = "relative"
) -> dict[str, jax.Array]:
    """The modules that are informative enough to be trained until the next evaluation.

    Args:
      eigenvalues: of `mntk_eigenvalues`.
      alpha: in [0, 1]. "relative": the share of the largest eigenvalue that a module has to reach,
        about 0.1; "quantile": the share of modules that is kept, rounded up.
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
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    if mode not in ("relative", "quantile"):
        raise ValueError(f"mode must be 'relative' or 'quantile', got {mode!r}")
    values = jnp.stack([jnp.asarray(x) for x in eigenvalues.values()])
    if mode == "relative":
        threshold = alpha * jnp.max(values)
    else:
        kept = max(1, math.ceil(alpha * len(values)))
        threshold = jnp.sort(values)[len(values) - kept]
    return {name: x >= threshold for name, x in eigenvalues.items()}


def modular_adaptive(
    inner: optax.GradientTransformation,
    labels: Any,
    *,
    alpha: float = 0.1,
    beta: float = 1e-3,
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
      labels: a tree like the parameters of names of modules.
      alpha: see `select_modules`; 0 lets all take part.
      beta: at least 0; 1e-3. 0 never stops a module.
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
    select_modules({"": jnp.zeros(())}, alpha, mode)
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta!r}")
    names = sorted(set(jax.tree.leaves(labels)))
    masked = mask_modules(inner, labels)

    def init(params: Any) -> ModularState:
        each = lambda x: {name: jnp.asarray(x) for name in names}  # noqa: E731
        zero = jnp.zeros((), jnp.float32)
        return ModularState(
            masked.init(params),
            jnp.zeros((), jnp.int32),
            each(zero),
            each(zero),
            each(zero),
            each(False),
            each(True),
        )

    def evaluated(state: ModularState, found: Mapping[str, Any]) -> ModularState:
        if sorted(found) != names:
            raise ValueError(f"eigenvalues must be of the modules {names}, got {sorted(found)}")
        count = state.evaluations
        now = {name: jnp.asarray(found[name], jnp.float32) for name in names}
        first = {n: jnp.where(count == 0, now[n], state.first[n]) for n in names}
        change = {n: jnp.abs(now[n] - first[n]) for n in names}
        start = {n: jnp.where(count == 1, change[n], state.first_change[n]) for n in names}
        stop = {n: temporal_stop(state.change[n], change[n], start[n], beta) for n in names}
        frozen = {n: state.frozen[n] | ((count >= 2) & stop[n]) for n in names}
        chosen = select_modules(now, alpha, mode)
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
        if eigenvalues is not None:
            state = evaluated(state, eigenvalues)
        updates, inner_state = masked.update(
            updates, state.inner_state, params, active=state.active, **extra
        )
        return updates, state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def temporal_stop(before: Any, change: Any, first_change: Any, beta: float) -> jax.Array:
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


def mask_modules(
    inner: optax.GradientTransformation, labels: Any
) -> optax.GradientTransformationExtraArgs:
    """Lets `inner` update the modules that are active at each step, and leaves the rest as it is.

    Like `optax.masked` with a mask that may be traced: moments of inactive modules do not decay.

    Args:
      inner: any optimizer whose state `optax.tree_map_params` understands.
      labels: a tree like the parameters of names of modules.

    Returns:
      An optimizer whose update takes `active=`, a dictionary of booleans by name, and passes other
      arguments on. What
      `inner` holds beside trees like the parameters, such as counters, always goes on. Its state is
      that of `inner`.

    Raises:
      ValueError: an update without `active`, or with one that lacks a module.

    Equals `inner` with all modules active.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.curvature.mask_modules(optax.sgd(1.0), {"a": "a", "b": "b"})
      >>> params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
      >>> updates, _ = optimizer.update(
      ...     {"a": jnp.ones(1), "b": jnp.ones(1)}, optimizer.init(params), params,
      ...     active={"a": True, "b": False},
      ... )
      >>> print(updates["a"], updates["b"])
      [-1.] [0.]
    """
    inner = optax.with_extra_args_support(inner)
    names = set(jax.tree.leaves(labels))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        active: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        if active is None or not names <= set(active):
            raise ValueError(
                f"mask_modules needs to know which of {sorted(names)} are active: call "
                "update(grads, state, params, active={name: bool, ...})"
            )
        stepped, new = inner.update(updates, state, params, **extra)
        on = jax.tree.map(lambda name: jnp.asarray(active[name]), labels)
        moves = optax.tree.map_params(
            inner, lambda _, m: m, new, on, transform_non_params=lambda _: jnp.asarray(True)
        )
        kept = jax.tree.map(jnp.where, moves, new, state)
        stepped = jax.tree.map(lambda u, m: jnp.where(m, u, jnp.zeros_like(u)), stepped, on)
        return stepped, kept

    return optax.GradientTransformationExtraArgs(inner.init, update)
