"""Updates of some modules only, which may change from step to step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structured.trees.tree_checks import check_same_tree

Labels = Any | Callable[[Any], Any]


def mask_modules(
    inner: optax.GradientTransformation, labels: Labels
) -> optax.GradientTransformationExtraArgs:
    """Lets `inner` update the modules that are active at each step, and leaves the rest as it is.

    Like `optax.masked` with a mask that may be traced: moments of inactive modules do not decay.

    Args:
      inner: any optimizer whose state `optax.tree_map_params` understands.
      labels: a tree like the parameters of names of modules, or a function of the parameters to
        one, such as the `labels` of `rules`.

    Returns:
      An optimizer whose update takes `active=`, a dictionary of booleans by name, and passes other
      arguments
      on. What `inner` holds beside trees like the parameters, such as counters, always goes on. Its
      state is that of `inner`.

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

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        active: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        if params is not None:
            check_same_tree("mask_modules", updates, params, whose="the parameters")
        modules = labelled(labels, updates)
        names = set(jax.tree.leaves(modules))
        if active is None or not names <= set(active):
            raise ValueError(
                f"mask_modules needs to know which of {sorted(names)} are active: call "
                "update(grads, state, params, active={name: bool, ...})"
            )
        stepped, new = inner.update(updates, state, params, **extra)
        on = jax.tree.map(lambda name: jnp.asarray(active[name]), modules)
        moves = optax.tree.map_params(
            inner, lambda _, m: m, new, on, transform_non_params=lambda _: jnp.asarray(True)
        )
        kept = jax.tree.map(jnp.where, moves, new, state)
        stepped = jax.tree.map(lambda u, m: jnp.where(m, u, jnp.zeros_like(u)), stepped, on)
        return stepped, kept

    return optax.GradientTransformationExtraArgs(inner.init, update)


def labelled(labels: Labels, tree: Any) -> Any:
    """The names of the modules of a tree: `labels` itself, or what it makes of the tree."""
    return labels(tree) if callable(labels) else labels
